"""What every written file has in common: the umask decides who may read it, and a disk that takes no more ends in one message."""

import errno
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import finished_run, refused, stage, succeed, write_recipe
from tokenizers import Tokenizer, models

from diffvl.errors import CheckpointError, DiskError
from diffvl.store.files import NO_ROOM, PARTIAL, Writing, no_room, replace_text, share
from diffvl.train import checkpoints
from diffvl.train.progress import MetricsLog


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes: writing on fails with EFBIG, as on a full disk with ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(directory: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in directory.rglob("*") if path.is_file()}


# --- who may read ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_weights(mask: int, mode: int, tmp_path: Path):
    with umask(mask):
        save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        share(tmp_path)
    assert modes(tmp_path) == {mode}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_every_file_of_a_run_has_the_same_mode(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
):
    run = finished_run(tmp_path_factory, source, tower, shapes)
    probe = run.root.parent / "probe"
    probe.touch()
    expected = {stat.S_IMODE(probe.stat().st_mode)}
    assert modes(run.root) == expected and modes(source("llama")) == expected and modes(tower) == expected


# --- no room ---------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_recognised_in_every_library(tmp_path: Path):
    """What their code says where a file cannot grow; none of it names the system's number in the same way."""
    writers: dict[str, Callable[[Path], object]] = {
        "python": lambda file: file.write_bytes(bytes(1000)),
        "safetensors": lambda file: save_file({"a": torch.zeros(1000)}, file),
        "torch": lambda file: torch.save(torch.zeros(1000), file),
        "tokenizers": lambda file: Tokenizer(models.BPE({str(n): n for n in range(1000)}, [])).save(str(file)),
    }
    for name, write in writers.items():
        file = tmp_path / name
        with pytest.raises(DiskError, match=f"{name} cannot be written: ") as caught, files_up_to(100), Writing(file):
            write(file)
        assert caught.value.__cause__ is not None, name


@pytest.mark.parametrize("number", NO_ROOM)
def test_every_way_to_have_no_room_is_told(number: int):
    told = NO_ROOM[number]
    assert no_room(OSError(number, os.strerror(number))) == told
    assert no_room(RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")) == told
    wrapped = RuntimeError("could not build the table")
    wrapped.__cause__ = OSError(number, os.strerror(number))
    assert no_room(wrapped) == told
    assert no_room(OSError(errno.ENOENT, "No such file")) is None and no_room(ValueError("File too large")) is None


def test_other_errors_pass_as_they_are(tmp_path: Path):
    for error in (ValueError("other"), CheckpointError("told already"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, Writing(tmp_path):
            raise error
        assert caught.value is error


def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path: Path):
    file = tmp_path / "run.yaml"
    replace_text(file, "old")
    with files_up_to(10), pytest.raises(DiskError, match="run.yaml cannot be written: the file is larger than"):
        replace_text(file, "new " * 100)
    assert file.read_text(encoding="utf-8") == "old" and [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_prepare_on_a_full_disk_leaves_nothing(
    source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, align=stage("align", shapes["align"]))
    words = ("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    with files_up_to(100_000):
        refused(*words, says=[f"prepared{PARTIAL} cannot be written: the file is larger than", "make room"])
    assert not (tmp_path / "out").exists()


def test_a_stage_on_a_full_disk_goes_on_from_its_last_checkpoint(
    source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second checkpoint does not fit; the first is kept, and from it the run comes to the weights of a run with room."""
    settings = stage("align", shapes["align"], steps=4, save_every=2)
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, align=settings)
    words = ("convert", source("llama"), "--recipe", recipe, "--out")
    succeed(*words, tmp_path / "whole")
    room = [1 << 40, 1000]
    original = checkpoints.save

    def save(*arguments: object) -> None:
        with files_up_to(room.pop(0)):
            original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoints, "save", save)
    refused(*words, tmp_path / "out", says=["cannot be written: the file is larger than", "with --resume"])
    work = tmp_path / "out" / f"align{PARTIAL}"
    assert [path.name for path in (work / "checkpoints").glob("*") if path.is_dir() and path.name != "runs"] == ["checkpoint-2"]
    monkeypatch.setattr(checkpoints, "save", original)
    succeed(*words, tmp_path / "out", "--resume")
    names = [tmp_path / name / "align" / "model.safetensors" for name in ("whole", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_log_that_does_not_fit_is_one_message(
    source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """metrics.jsonl is written line by line, outside of any checkpoint."""
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, align=stage("align", shapes["align"]))
    original = MetricsLog.log

    def log(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsLog, "log", log)
    words = ("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    refused(*words, says=[f"align{PARTIAL} cannot be written: no space is left on the device"])
    assert (tmp_path / "out" / "prepared").is_dir() and not (tmp_path / "out" / "align").exists()
    monkeypatch.setattr(MetricsLog, "log", original)
    succeed(*words, "--resume")
