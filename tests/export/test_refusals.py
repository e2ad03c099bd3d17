"""What an export refuses, and that nothing half-written has a name."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET
from safetensors.torch import load_file, save_file
from tiny_runs import command, copy, refused

from diffvl.errors import ProofError
from diffvl.export import native, parity, sdar_v
from diffvl.export import run as export_run
from diffvl.export.run import Layout, export
from diffvl.export.source import Run, read_run
from diffvl.export.text_part import text_faults
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.store.tensorfiles import Header


def other(run: Run, **settings: Any) -> Run:
    """The same run with other settings of its configuration."""
    config = DiffVLConfig.from_pretrained(run.directory)
    for name, value in settings.items():
        part, _, inner = name.rpartition("__")
        setattr(getattr(config, part) if part else config, inner, value)
    return replace(run, config=config)


TEXT_FAULTS = [
    ({"text_config__sliding_window": 8}, "its attention has windows"),
    ({"text_config__rope_parameters": {"rope_type": "yarn"}}, "its rotation is scaled"),
    ({"text_config__rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "several axes"),
    ({"text_config__hidden_act": "gelu"}, "its activation is gelu"),
    ({"text_config__model_type": "olmo3"}, "its trunk is a olmo3; this layout holds a qwen3 or qwen3_moe"),
    ({"decoding": "ar"}, "it has not been trained on blocks: export the diffuse stage"),
    ({"context": "causal"}, "trained with context causal"),
    ({"grid": "response"}, "blocks begin with the answer"),
    ({"target": "shift"}, "predicts the next token"),
    ({"mask_token_id": 5}, "its mask token is 5, and the engines have 151669 in their code"),
]
VISION_FAULTS = [
    ({"vision_config__model_type": "dinov2"}, "its vision tower is a dinov2"),
    ({"connector": "linear"}, "its connector is linear"),
    ({"tiling": None}, "one square an image"),
    ({"image_size": 64}, "its tower sees 64 pixels a side"),
]


@pytest.mark.parametrize(("settings", "says"), TEXT_FAULTS)
def test_what_no_engine_expects_is_named(settings: dict[str, Any], says: str, run: Run):
    assert not text_faults(run)
    assert any(says in fault for fault in text_faults(other(run, **settings)))


@pytest.mark.parametrize(("settings", "says"), VISION_FAULTS)
def test_what_sdar_vl_does_not_have_is_named(settings: dict[str, Any], says: str, run: Run):
    assert not sdar_v.faults(run)
    assert any(says in fault for fault in sdar_v.faults(other(run, **settings)))


def test_biases_and_missing_norms_are_named(run: Run):
    names = {name: header for name, header in run.headers.items() if "_norm" not in name}
    names["language_model.model.layers.0.self_attn.q_proj.bias"] = Header(run.directory, "x", (4,), "F32")
    faults = text_faults(replace(run, headers=names))
    assert any("no norms of queries and keys" in fault for fault in faults) and any("has biases" in fault for fault in faults)


def test_a_native_vlm_is_refused_by_what_it_is(prepared: Callable[[str], Path]):
    faults = text_faults(read_run(prepared("qwen2_5_vl")))
    assert faults == ["it is a whole qwen2_5_vl model with its own vision part, image tokens and position ids"]


def test_the_message_names_the_layout_that_fits(prepared: Callable[[str], Path], tmp_path: Path):
    said = refused(
        *("export", prepared("llama"), "--layout", "sdar_v", "-o", tmp_path / "out"),
        says=["the layout sdar_v cannot express this model", "no norms of queries and keys", "native can: diffvl export"],
    )
    assert "not been trained on blocks" in said and not (tmp_path / "out").exists()


# --- bad input -------------------------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_told(tmp_path: Path):
    (tmp_path / "diffuse.partial").mkdir()
    for name in ("diffuse.partial", "diffuse"):
        refused("export", tmp_path / name, "-o", tmp_path / "out", says=["is unfinished", "--resume"])


def test_what_is_no_run_is_told(small: Run, tmp_path: Path):
    refused("export", tmp_path / "nowhere", "-o", tmp_path / "out", says=["no such directory"])
    (tmp_path / "folder").mkdir()
    refused("export", tmp_path / "folder", "-o", tmp_path / "out", says=["no config.json there"])
    (tmp_path / "root" / "align").mkdir(parents=True)
    (tmp_path / "root" / "align" / "diffvl.json").write_text("{}", encoding="utf-8")
    says = ["holds a run's directories", f"diffvl export {tmp_path / 'root' / 'align'}"]
    refused("export", tmp_path / "root", "-o", tmp_path / "out", says=says)
    made = copy(small.directory, tmp_path / "stateless")
    (made / "diffvl.json").unlink()
    refused("export", made, "-o", tmp_path / "out", says=["no diffvl.json there"])


def test_nothing_that_is_there_is_touched(small: Run, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    refused("export", small.directory, "-o", tmp_path / "full", says=["exists and is not empty; nothing was written"])
    (tmp_path / "stage.partial").mkdir()
    (tmp_path / "stage.partial" / "run.yaml").write_text("an interrupted run", encoding="utf-8")
    refused("export", small.directory, "-o", tmp_path / "stage", says=["no export left it; nothing was written"])
    assert (tmp_path / "stage.partial" / "run.yaml").is_file()
    (tmp_path / "file").write_text("", encoding="utf-8")
    refused("export", small.directory, "-o", tmp_path / "file" / "out", says=["is not a directory"])


def test_a_missing_shard_and_a_wrong_dtype_are_told(small: Run, tmp_path: Path):
    made = copy(small.directory, tmp_path / "run")
    (made / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused("export", made, "-o", tmp_path / "out", says=["2 of the 2 weight files", "are not there"])
    shutil.rmtree(made)
    copy(small.directory, made)
    tensors = load_file(made / "model.safetensors")
    tensors["connector.layers.0.bias"] = tensors["connector.layers.0.bias"].half()
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    says = ["connector.layers.0.bias: stored as F16, expected F32 (config.json says dtype float32)"]
    refused("export", made, "-o", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_not_there(small: Run, tmp_path: Path):
    words = ("export", small.directory, "-o", tmp_path / "out", "--keep-adapters")
    refused(*words, says=["has no adapter folder"])
    refused(*words, "--layout", "sdar", says=["--keep-adapters has no effect with --layout sdar"])


# --- the machine's fault -----------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_nothing_and_is_the_machine_s_fault(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parity, "reference", lambda *_: None)
    with files_up_to(20_000):
        ended = command("export", small.directory, "-o", tmp_path / "new" / "out")
    assert ended.code == 1 and "cannot be written: the file is larger than" in ended.err and "Traceback" not in ended.err
    assert not list(tmp_path.iterdir())


def wrong(run: Run, directory: Path) -> None:
    """As the native layout, with a tensor that is another."""
    native.write(run, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["connector.layers.2.bias"] += 1.0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def broken(run: Run, directory: Path) -> None:
    """As the native layout, without a file of its code."""
    native.write(run, directory)
    (directory / "head_diffvl.py").unlink()


def test_what_is_not_equal_gets_no_name(small: Run, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(export_run.LAYOUTS, "native", Layout(lambda run: [], wrong))
    with pytest.raises(ProofError, match="prefill logits with an image differ from the model's in memory by") as caught:
        export(small.directory, "native", tmp_path / "out", QUIET)
    assert caught.value.exit_code == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_cannot_be_loaded_gets_no_name(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(export_run.LAYOUTS, "native", Layout(lambda run: [], broken))
    monkeypatch.setattr(parity, "reference", lambda run, folder, text_only: parity.Reference({}, [], folder, text_only, 0.0))
    ended = command("export", small.directory, "-o", tmp_path / "out")
    assert ended.code == 1 and "a clean process cannot use what was written" in ended.err and "head_diffvl" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_name_and_the_next_export_goes_through(small: Run, in_this_process: None, tmp_path: Path):
    """kill -9 while the weights are written, and again while parity is proven."""
    for place in ("write", "prove"):
        child = os.fork()
        if child == 0:  # pragma: no cover  (it ends by a kill)
            if place == "write":
                export_run.LAYOUTS["native"] = Layout(lambda run: [], dying)
            else:
                parity.prove = lambda *_: _die()  # type: ignore[assignment]
            export(small.directory, "native", tmp_path / "out", QUIET)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    export(small.directory, "native", tmp_path / "out", QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def dying(run: Run, directory: Path) -> None:
    native.write(run, directory)
    _die()


def _die() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)
