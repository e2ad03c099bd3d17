"""Finished directories to export, made once a session; not to be written into."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers import QUIET
from transformers import dynamic_module_utils

from diffvl.config.resolve import resolve
from diffvl.demo import standins
from diffvl.export import parity, visitor
from diffvl.export.source import Run, read_run
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store import checkpoint
from diffvl.terminal.bars import quiet_libraries

BLOCK = 4
RECIPE = {
    "prepare": {"vision_layer": -1, "tiling": {"kind": "anyres", "grids": ["1x1-2x2"], "max_tiles": 3}},
    "stages": {
        "diffuse": {"objective": {"kind": "block_diffusion", "block_size": BLOCK}, "trainable": {"trunk": 1e-3}, "steps": 1}
    },
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tower: Path) -> Callable[[str], Path]:
    """Model type -> a Qwen3 with the published ids and tiles, as a stage leaves it: it decodes in blocks."""

    @cache
    def make(model_type: str) -> Path:
        quiet_libraries()
        folder = tmp_path_factory.mktemp(f"finished-{model_type}")
        trunk = standins.make_trunk(folder / "trunk", model_type, published_ids=True)
        recipe = resolve({**RECIPE, "model": str(trunk)}, [], "test")
        start = prepare(Source(str(trunk), None, str(tower)), recipe, folder / "run" / "prepared", QUIET)
        model, processor = checkpoint.load_checkpoint(start)
        model.config.set_decoding("blocks", BLOCK, "block", "absolute", "same")
        directory = folder / "run" / "diffuse"
        directory.mkdir()
        checkpoint.write_checkpoint(model, processor, directory)
        state = {"kind": "diffuse", "parents": [str(start)], "state": {"steps": 1}, "data": {}, "left_out": {}}
        checkpoint.write_state(directory, recipe, state)
        return directory

    return make


@pytest.fixture(scope="session")
def run(finished: Callable[[str], Path]) -> Run:
    return read_run(finished("qwen3"))


@pytest.fixture(scope="session")
def small(prepared: Callable[[str], Path]) -> Run:
    """A directory that is quick to read: for what no layout but the native one is needed for."""
    return read_run(prepared("llama"))


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers puts the code of checkpoints, in the place of the user's cache; one for all, for it is imported."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, modules: Path) -> None:
    """The clean process costs seconds. Here its program runs in the tests' own, with the checkpoint's own code all the same."""

    def visited(directory: Path, expected: parity.Reference, adapter: Path | None) -> object:
        out = expected.folder / "found.safetensors"
        request = {
            "directory": str(directory),
            "adapter": None if adapter is None else str(adapter),
            "chats": expected.chats,
            "text_only": expected.text_only,
            "threads": 1,
            "out": str(out),
        }
        visitor.main(request)
        return parity.load_file(out)

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    if (package := sys.modules.get("transformers_modules")) is not None:
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(modules / "transformers_modules")])
    monkeypatch.setattr(parity, "_visited", visited)
