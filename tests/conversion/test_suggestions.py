"""What the program suggests to type: pasted into a shell it is the command that was meant, whatever stands in paths and texts."""

import errno
import io
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from shell_words import QUESTIONS, typed
from tiny_runs import command

from diffvl.cli import main as cli
from diffvl.conversion import run as convert
from diffvl.errors import MACHINE_CODE, UsageError
from diffvl.terminal.console import console

NASTY = "it's [x] $(touch y)\x1b é"


def next_lines(directory: Path, stages: tuple[str, ...]) -> list[list[str]]:
    """The words of every `next:` line that a conversion ends with, as bash takes them."""
    out = console(file=io.StringIO())
    plan: Any = SimpleNamespace(stages=stages, recipe=SimpleNamespace(stages=("align", "diffuse")))
    convert._say_next(directory, plan, out)
    assert isinstance(out.file, io.StringIO)
    lines = [line.removeprefix("next: ") for line in out.file.getvalue().splitlines() if line.startswith("next: ")]
    return [["diffvl", *(word.decode() for word in typed(line.replace("diffvl", "program", 1)))] for line in lines]


@pytest.mark.parametrize("question", QUESTIONS, ids=ascii)
def test_what_a_conversion_ends_with(question: str, tmp_path: Path):
    directory = tmp_path / NASTY
    directory.mkdir()
    image = str(directory / "a b's [x].png")
    Path(image).touch()
    sample = {"image": image, "question": question, "truth": "x", "before": "y", "after": "z"}
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    assert next_lines(directory, ("align",)) == [
        ["diffvl", "convert", "--from", str(directory), "--stage", "diffuse", "--data", "FILE"],
        ["diffvl", "generate", str(directory), "--image", image, "--prompt", question],
        ["diffvl", "evaluate", str(directory), "--data", "FILE"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == [NASTY]


def test_a_run_without_held_out_images(tmp_path: Path):
    (tmp_path / "samples.jsonl").touch()
    ask = ["diffvl", "generate", str(tmp_path), "--image", "FILE", "--prompt", "What does the image show?"]
    assert next_lines(tmp_path, ("diffuse",))[0] == ask


@pytest.mark.parametrize("question", QUESTIONS, ids=ascii)
def test_the_command_takes_what_was_suggested(question: str, monkeypatch: pytest.MonkeyPatch):
    """A leading dash does not make an option of it."""
    seen: list[Any] = []

    def ask(prompt: str, images: list[Path], videos: list[Path]) -> None:
        assert not videos
        seen.append((prompt, images))
        raise UsageError("enough")

    pretended = ModuleType("diffvl.decode.answer")
    vars(pretended).update(ask=ask, load_for_decoding=None)
    monkeypatch.setitem(sys.modules, "diffvl.decode.answer", pretended)
    ended = command("generate", "./-x/diffuse", "--image", "./-a.png", "--prompt", question)
    assert (ended.code, ended.err) == (2, "error: enough\n") and seen == [(question, [Path("-a.png")])]


@pytest.mark.parametrize("stop", ["convert", "from", "converted"])
def test_messages_quote_the_paths_in_what_they_suggest(stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "it's [x] $(touch y)"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "diffvl" if stop == "from" else "llama"}), encoding="utf-8")
    if stop == "convert":
        words, suggested = ["convert", folder, "--stage", "diffuse"], ["convert", str(folder), "--stage", "align"]
    elif stop == "from":
        words, suggested = ["convert", folder], ["convert", "--from", str(folder), "--stage", "diffuse"]
    else:
        words, suggested = ["generate", folder, "--prompt", "x"], ["convert", str(folder)]
    monkeypatch.chdir(tmp_path)
    ended = command(*words)
    assert ended.code == 2, ended.err
    message = " ".join(ended.err.split())
    assert message.endswith(shlex.join(["diffvl", *suggested])), message
    assert (f"runs/{folder.name}/align" if stop == "convert" else str(folder)) in ended.err, "elsewhere a path stands as it is"


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def app() -> None:
        raise SystemExit(cli.INTERRUPTED)

    words = ["convert", "m", "--out", NASTY, "--set", "stages.align.steps=2"]
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["diffvl", *words])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err.strip().removeprefix("interrupted. To continue: diffvl")
    assert [word.decode() for word in typed(f"program {said}")] == [*words, "--resume"]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),  # of a loader's process that cannot be forked, say
]


@pytest.mark.parametrize("fault", OUT_OF_MEMORY)
@pytest.mark.parametrize("words", [["convert", "m", "--out", NASTY], ["generate", "m", "--prompt", "x"]])
def test_memory_that_ran_out_is_one_message(
    fault: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def app() -> None:
        raise fault

    more = ["--resume"] if words[0] == "convert" else []
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["diffvl", *words, *more])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == MACHINE_CODE and said.startswith("error: memory ran out: ") and said.count("\n") == 1
    assert "documentation" not in said
    if words[0] == "convert":
        assert [word.decode() for word in typed(f"program {said.partition('fits: diffvl')[2]}")] == [*words, "--dry-run"]


@pytest.mark.parametrize("fault", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_ran_out_is_told_without_loading_more(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The import of torch, whose errors are asked for, may need more memory than there is."""

    def app() -> None:
        raise fault

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["diffvl", "generate", "m"])
    monkeypatch.setitem(sys.modules, "diffvl.faults", None)  # its import fails
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == MACHINE_CODE and capsys.readouterr().err.startswith("error: memory ran out: ")


@pytest.mark.parametrize("fault", [RuntimeError("shapes differ"), OSError(errno.EACCES, "shapes differ")])
def test_other_faults_keep_their_traceback(fault: Exception, monkeypatch: pytest.MonkeyPatch):
    def app() -> None:
        raise fault

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["diffvl", "generate", "m"])
    with pytest.raises(type(fault), match="shapes differ"):
        cli.main()
