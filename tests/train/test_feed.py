"""Runs that are fed by mixtures and by streams: exact on a resume, and refused where they would read other records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from helpers import metrics, weights_of
from shards import write_tars
from training_runs import crash, run

from diffvl.config.recipe import Recipe
from diffvl.config.resolve import resolve

NUM = 9  # records of each of the tars


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(data: dict[str, Any], **stage: Any) -> Recipe:
    """Four steps of two rows."""
    settings = {
        "objective": {"kind": "block_diffusion", "block_size": 4},
        "trainable": {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3},
        "data": {"max_length": 400, **data},
        "steps": 4,
        "batch_size": 1,
        "accumulation": 2,
        "precision": "fp32",
        **stage,
    }
    return resolve({"stages": {"diffuse": settings}}, [], "test")


def streamed(folder: Path, **data: Any) -> dict[str, Any]:
    return {"train": str(write_tars(folder, 3, NUM)), "streaming": True, "window": 4, "workers": 0, **data}


def same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("data", ({}, {"workers": 2}, {"row_length": 900}), ids=("alone", "workers", "packed"))
def test_a_stream_goes_on_exactly(
    data: dict[str, Any], prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a window, and of the round of the loader's processes."""
    recipe = recipe_of(streamed(tmp_path, **data), save_every=3, steps=5, accumulation=3)
    whole = run(prepared("llama"), recipe, tmp_path / "whole")
    crash(prepared("llama"), recipe, tmp_path / "resumed", 5, False, monkeypatch)
    same(run(prepared("llama"), recipe, tmp_path / "resumed", resume=True), whole)
