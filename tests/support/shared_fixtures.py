"""Shared fixtures. Directories and models are made once a session and shared: a test must not write into them, nor train a
shared model; it may set the decoding settings of one, and then sets all of them.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import datasets.config
import pytest
import torch
from forks import Forks
from helpers import QUIET

from diffvl.cli import main as cli
from diffvl.config.resolve import resolve
from diffvl.demo import shapes as scenes
from diffvl.demo import standin_dllms, standins
from diffvl.demo.shapes import write_shapes
from diffvl.demo.standin_processors import make_processor_files
from diffvl.demo.standin_vlms import VLMS, make_vlm
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint
from diffvl.terminal.bars import quiet_libraries

Loaded = tuple[DiffVLForConditionalGeneration, DiffVLProcessor]
TILED = "llama with tiles"  # in the place of a model type: a llama that sees tiles
TILING = {"kind": "anyres", "grids": ["1x1-2x2", "1x3", "3x1"], "max_tiles": 2}


def pytest_collection_finish() -> None:
    """Whatever is imported now stays for good: a stage's gc.collect(), one at its beginning and one at its end, need not walk
    through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's caches, and no hub is asked, here and in processes that tests start."""
    home = tmp_path_factory.mktemp("hf-home")
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(os, "fsync", lambda _: None)  # only a power cut loses what is written: no need to wait for a disk
        patch.setattr(scenes, "is_test", cache(scenes.is_test))  # of 83,520 scenes, for each split of each set
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield home


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """What runs the package in processes of their own; it has imported it once for all of them."""
    with Forks(tmp_path_factory.mktemp("forks") / "stderr") as started:
        yield started


@pytest.fixture(scope="session")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standins.make_tower(tmp_path_factory.mktemp("tower"), "siglip")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model type -> directory of a tiny AR checkpoint, of a language model or a vision-language model."""

    @cache
    def make(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp(f"source-{model_type}")
        if model_type not in VLMS:
            return standins.make_trunk(directory, model_type)
        return make_vlm(directory, model_type, tokenizer=make_processor_files(directory, model_type))

    return make


@pytest.fixture(scope="session")
def dllm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model type -> directory of a tiny diffusion language model, as published."""
    return cache(lambda model_type: standin_dllms.make_dllm(tmp_path_factory.mktemp(f"dllm-{model_type}"), model_type))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path) -> Callable[[str], Path]:
    """Model type, or TILED -> what `prepare` writes."""
    stages = {"align": {"objective": {"kind": "ar"}, "trainable": {"trunk": 1e-3}, "steps": 1}}

    @cache
    def make(model_type: str) -> Path:
        quiet_libraries()
        recipe = resolve({"stages": stages, **({"prepare": {"tiling": TILING}} if model_type == TILED else {})}, [], "test")
        model = source("llama" if model_type == TILED else model_type)
        start = Source(str(model), None, None if model_type in VLMS else str(tower))
        return prepare(start, recipe, tmp_path_factory.mktemp("prepared") / model_type, QUIET)

    return make


@pytest.fixture(scope="session")
def loaded(prepared: Callable[[str], Path]) -> Callable[[str], Loaded]:
    """Model type -> the prepared model and its processor in memory, in evaluation mode."""

    @cache
    def load(model_type: str) -> Loaded:
        model, processor = load_checkpoint(prepared(model_type))
        return model.eval(), processor

    return load


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Split -> data file, with 8, 10 and 2 records."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", align=8, train=10, test=2)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `diffvl WORDS` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer replaces it

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffvl", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    return call
