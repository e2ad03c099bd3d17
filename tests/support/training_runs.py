"""Whole runs of `train`: in one process, ended by a crash, and in two processes."""

from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from helpers import QUIET, metrics
from processes import on_processes

from diffvl.config.recipe import Recipe
from diffvl.config.resolve import dump
from diffvl.store.checkpoint import partial
from diffvl.train import loop
from diffvl.train import stage as training

BETA = {"kind": "block_diffusion", "block_size": 4, "weight": "effective", "noise": {"schedule": "beta", "draws": "stratified"}}


class Crash(Exception):
    """What stops a run here in the place of a kill."""


def run(start: Path, recipe: Recipe, directory: Path, resume: bool = False) -> Path:
    return training.train(start, recipe, "diffuse", directory, resume, QUIET)


def crash(start: Path, recipe: Recipe, directory: Path, step: int, resume: bool, patch: pytest.MonkeyPatch) -> None:
    """A run that dies right after an optimiser step, before that step can be saved."""
    whole = loop.Loop.train_step

    def train_step(self: Any, *arguments: Any) -> float:
        norm = whole(self, *arguments)
        if self.step + 1 == step:
            raise Crash
        return norm

    with patch.context() as inner, pytest.raises(Crash):
        inner.setattr(loop.Loop, "train_step", train_step)
        run(start, recipe, directory, resume)


def run_two(forks: Forks, start: Path, recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a run on two processes (gloo)."""
    ended = two_processes(forks, start, recipe, folder)
    assert [code for code, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    return metrics(partial(folder / "run"))


def two_processes(forks: Forks, start: Path, recipe: Recipe, folder: Path) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each of the two processes of a run."""
    (folder / "recipe.yaml").write_text(dump(recipe))
    words = (start, folder / "recipe.yaml", folder / "run")
    return [(ended.code, ended.out + ended.err) for ended in on_processes(forks, folder, "train", words)]


def require_same_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2, 3]
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("epoch", "learning_rate", "mask_ratio", "masked_accuracy"):
            assert one[key] == other[key], key
