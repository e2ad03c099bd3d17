"""Curricula in whole runs: block sizes and the Beta law of t move with the optimiser steps, as logs and checkpoints say, and an
interrupted run takes them up where they stood."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers import QUIET, metrics, stage_recipe, weights_of
from tiny_runs import refused, short_records, stage, succeed, tree, write_recipe

from diffvl.config.recipe import Recipe
from diffvl.demo.shapes import write_shapes
from diffvl.errors import TrainingError
from diffvl.objective import losses as objective
from diffvl.store.checkpoint import read_json
from diffvl.train import loop
from diffvl.train import stage as training

STEPS = 8
MOVING: dict[str, Any] = {
    "kind": "block_diffusion",
    "block_size": 8,
    "block_curriculum": {0.0: 2, 0.5: 4, 0.75: 8},
    "noise": {"schedule": "beta", "mean_start": 0.1, "mean_end": 0.9, "concentration_start": 4, "concentration_end": 40},
}
# What the two curricula are when so many of the eight steps are done.
BLOCK_SIZES = [2, 2, 2, 2, 4, 4, 8, 8, 8]
MEANS = [0.1 + 0.8 * done / STEPS for done in range(STEPS + 1)]
CONCENTRATIONS = [4 + 36 * done / STEPS for done in range(STEPS + 1)]


def run(start: Path, recipe: Recipe, directory: Path, resume: bool = False) -> Path:
    return training.train(start, recipe, "diffuse", directory, resume, QUIET)


@dataclass(frozen=True)
class Whole:
    """A run of eight steps with all its checkpoints. sizes: the block sizes that its batches were cut into, in order."""

    work: Path
    sizes: list[int]


@pytest.fixture(scope="module")
def whole(prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    sizes, block_index = [], objective.block_index

    def spy(answer: Any, block_size: int, grid: str) -> Any:
        sizes.append(block_size)
        return block_index(answer, block_size, grid)

    recipe = stage_recipe(shapes["train"], objective=MOVING, steps=STEPS, save_every=3, keep_checkpoints=STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "block_index", spy)
        work = run(prepared("llama"), recipe, tmp_path_factory.mktemp("curricula") / "diffuse")
    return Whole(work, sizes)


def test_each_step_trains_and_logs_where_its_curricula_stand(whole: Whole):
    lines = metrics(whole.work)
    assert whole.sizes == BLOCK_SIZES[:STEPS]
    assert [line["block_size"] for line in lines] == BLOCK_SIZES[:STEPS]
    assert [line["noise_mean"] for line in lines] == pytest.approx(MEANS[:STEPS])
    assert [line["noise_concentration"] for line in lines] == pytest.approx(CONCENTRATIONS[:STEPS])
    # Some two hundred tokens a step are masked as the law says: the farther on, the more, and the surer.
    ratios = [line["mask_ratio"] for line in lines]
    assert ratios == pytest.approx(MEANS[:STEPS], abs=0.1)
    assert ratios[-1] - ratios[0] > 0.5


def test_every_checkpoint_says_where_its_curricula_stand(whole: Whole):
    folders = sorted((whole.work / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    for folder, done in zip(folders, (3, 6, 8), strict=True):
        state = {"noise_mean": MEANS[done], "noise_concentration": CONCENTRATIONS[done], "block_size": BLOCK_SIZES[done]}
        saved = read_json(folder / "state.json")
        del saved["schedule"], saved["rows_per_step"]
        assert saved.pop("feed", {}) == {}
        assert saved == pytest.approx({"step": done, "steps": STEPS, **state})
    assert read_json(whole.work / "diffvl.json")["state"]["curriculum"] == pytest.approx(state)


def test_the_checkpoint_decodes_in_blocks_of_the_last_size(whole: Whole):
    for file in ("config.json", "generation_config.json"):
        assert read_json(whole.work / file)["block_size"] == 8
    assert read_json(whole.work / "config.json")["text_config"]["block_size"] == 8
    words = ("generate", whole.work, "--prompt", "What is it?", "--max-new-tokens", "8", "--steps")
    succeed(*words, "5")  # more than a block of 4 can take
    refused(*words, "9", says=["is 9, expected 1 to the block size, 8"])


# --- interrupted -----------------------------------------------------------------------------------------------------------


def stop_before(step: int, patch: pytest.MonkeyPatch) -> None:
    """Lets runs stop when so many steps are done."""
    loss_of = loop.loss_of

    def stop(*arguments: Any) -> Any:
        if arguments[-1].step == step:
            raise TrainingError("stopped")
        return loss_of(*arguments)

    patch.setattr(loop, "loss_of", stop)


@pytest.mark.parametrize("stopped", [4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_where_its_curricula_stood(
    stopped: int, whole: Whole, prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path
):
    """Where a size has just changed, and one step behind: both go on from checkpoint 3, which stood before the change."""
    recipe = stage_recipe(shapes["train"], objective=MOVING, steps=STEPS, save_every=3, keep_checkpoints=STEPS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingError, match="stopped"):
        stop_before(stopped, patch)
        run(prepared("llama"), recipe, tmp_path / "diffuse")
    work = run(prepared("llama"), recipe, tmp_path / "diffuse", resume=True)
    assert metrics(work) == metrics(whole.work)
    ours, theirs = weights_of(work), weights_of(whole.work)
    assert [name for name in ours.keys() | theirs.keys() if not ours[name].equal(theirs[name])] == []


@dataclass(frozen=True)
class Interrupted:
    """A run of the command that stopped after five of eight steps. data: its own file, which may be changed."""

    words: tuple[object, ...]
    out: Path
    data: Path

    def refuses(self, *words: object, says: list[str]) -> None:
        """Goes not on, and leaves its checkpoints and what it has measured as they are."""
        before = tree(self.out / "diffuse.partial" / "checkpoints"), metrics(self.out / "diffuse.partial")
        refused(*self.words, "--resume", *words, says=says)
        assert (tree(self.out / "diffuse.partial" / "checkpoints"), metrics(self.out / "diffuse.partial")) == before


@pytest.fixture(scope="module")
def stopped(prepared: Callable[[str], Path], tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """Four epochs of four records, two a step."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_shapes(folder / "set", align=1, train=4, test=1)["train"]
    settings = {"objective": MOVING, "steps": None, "epochs": 4, "save_every": 2}
    recipe = write_recipe(folder / "recipe.yaml", tower, diffuse=stage("diffuse", data, **settings))
    words = ("convert", "--from", prepared("llama"), "--stage", "diffuse", "--recipe", recipe, "--out", folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        stop_before(5, patch)
        refused(*words, says=["stopped"])
    assert read_json(folder / "out" / "diffuse.partial" / "checkpoints" / "checkpoint-4" / "state.json")["steps"] == STEPS
    return Interrupted(words, folder / "out", data)


@pytest.fixture
def interrupted(stopped: Interrupted, tmp_path: Path) -> Iterator[Interrupted]:
    """The stopped run, which is put back when the test has done with it."""
    for path in (stopped.out, stopped.data.parent):
        shutil.copytree(path, tmp_path / path.name)
    yield stopped
    for path in (stopped.out, stopped.data.parent):
        shutil.rmtree(path)
        (tmp_path / path.name).rename(path)


def test_a_run_goes_on_only_with_its_own_number_of_steps_and_curricula(interrupted: Interrupted):
    says = ["diffuse.partial has other settings, so --resume cannot continue it", "epochs: began with 4.0, asked for 5.0"]
    interrupted.refuses("--set", "stages.diffuse.epochs=5", says=says)
    changed = "stages.diffuse.objective.block_curriculum={0.0: 2, 0.25: 4, 0.75: 8}"
    says = ["block_curriculum.0.5: began with 4, asked for None", "block_curriculum.0.25: began with None, asked for 4"]
    interrupted.refuses("--set", changed, says=says)
    says = ["objective.noise.mean_end: began with 0.9, asked for 0.8"]
    interrupted.refuses("--set", "stages.diffuse.objective.noise.mean_end=0.8", says=says)


def test_a_run_goes_on_with_more_data_only_if_told_to(interrupted: Interrupted):
    """Same settings, but four epochs are now twelve steps: every curriculum jumps, which only who says so may want."""
    records = json.loads(interrupted.data.read_text(encoding="utf-8"))
    interrupted.data.write_text(json.dumps([*records, *records[:2]]), encoding="utf-8")
    interrupted.refuses(says=["the data is not what the run began with", "(4 records), now", "(6 records)"])
    assert "12 steps, going on after step 4" in succeed(*interrupted.words, "--resume", "--accept-changed-data").out


def test_a_checkpoint_whose_curriculum_stood_elsewhere(interrupted: Interrupted):
    file = interrupted.out / "diffuse.partial" / "checkpoints" / "checkpoint-4" / "state.json"
    good = file.read_text(encoding="utf-8")
    for key, value in {"steps": 9, "step": 3, "block_size": 2, "noise_mean": 0.4}.items():
        file.write_text(json.dumps({**json.loads(good), key: value}), encoding="utf-8")
        interrupted.refuses(says=[f"{file}: the curriculum stood at", f"'{key}': {value}", "this run would go on at {'step': 4"])
    file.write_text(good, encoding="utf-8")
    shutil.rmtree(file.parents[1] / "checkpoint-2")
    assert "going on after step 4" in succeed(*interrupted.words, "--resume").out


# --- how a step is cut -----------------------------------------------------------------------------------------------------


def test_eight_rows_at_once_are_eight_rows_one_by_one(prepared: Callable[[str], Path], tmp_path: Path):
    """Nine packed rows, so that an epoch ends inside a step, and blocks that grow."""
    data = short_records(tmp_path, 25)
    moving = {**MOVING, "complementary": True, "weight": "effective"}
    lines = []
    for batch_size in (8, 1):
        cut = {"batch_size": batch_size, "accumulation": 8 // batch_size}
        recipe = stage_recipe(data, row_length=192, objective=moving, steps=4, **cut)
        lines.append(metrics(run(prepared("llama"), recipe, tmp_path / f"run-{batch_size}")))
    assert [line["epoch"] for line in lines[0]] == [0.5, 1.0, 1.5, 2.0]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    assert [line["block_size"] for line in lines[0]] == [2, 2, 4, 8]
    for one, other in zip(*lines, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        for key in ("epoch", "learning_rate", "mask_ratio", "masked_accuracy", "block_size", "noise_mean", "noise_concentration"):
            assert one[key] == other[key], key
