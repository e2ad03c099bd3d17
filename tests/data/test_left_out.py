"""Runs that leave records out: the steps are those of a function of the seed whatever is missing, on any number of processes and
after a resume; what was left out is counted and listed; too much of it stops all processes together."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from helpers import metrics, stage_recipe, weights_of
from tiny_runs import record, write_data
from training_runs import BETA, crash, require_same_steps, run, run_two, two_processes

from diffvl.config.recipe import Recipe
from diffvl.config.resolve import resolve
from diffvl.errors import DataError
from diffvl.store.checkpoint import partial
from diffvl.store.metrics import read_json_lines
from diffvl.train import loop

NUM = 10
IMAGES, LONG = (2, 7), 5  # numbers, from 0, of the records with a damaged image, and of one that is too long


def data_file(folder: Path) -> Path:
    """Ten records, of which three cannot be used; that is seen only when their turn comes."""
    values = [record(answer="Red. " * (number + 1)) for number in range(NUM)]
    for number in IMAGES:
        values[number]["image"] = "bad.png"
    values[LONG] = record(answer="Yes. " * 200)
    (folder / "bad.png").write_text("I am no image", encoding="utf-8")
    return write_data(folder, *values)


def recipe_of(file: Path, batch_size: int, accumulation: int, **more: Any) -> Recipe:
    """Three steps of 8 samples out of 10."""
    data = {"max_length": 400, "on_error": "skip", "max_skipped": 0.3, **more.pop("data", {})}
    settings = {"objective": BETA, "steps": 3, "batch_size": batch_size, "accumulation": accumulation, **more}
    recipe = stage_recipe(file, holdout=data.get("holdout", 0), **settings).model_dump(mode="json")
    return resolve(recipe, [f"stages.diffuse.data.{key}={json.dumps(value)}" for key, value in data.items()], "test")


def listed(directory: Path) -> list[tuple[int, int, str]]:
    return [(line["step"], line["record"] - 1, line["kind"]) for line in read_json_lines(directory / "left_out.jsonl")]


@pytest.fixture(scope="module")
def whole(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that takes all 8 samples at once."""
    folder = tmp_path_factory.mktemp("whole")
    return run(prepared("llama"), recipe_of(data_file(folder), 8, 1), folder / "run")


def test_what_is_left_out_is_counted_and_listed(whole: Path):
    found = listed(whole)
    assert sorted(number for _, number, _ in found) == sorted((*IMAGES, LONG))
    assert {kind for _, number, kind in found if number == LONG} == {"too long"}
    state = json.loads((whole / "diffvl.json").read_text(encoding="utf-8"))
    assert sum(state["left_out"].values()) == 3 and state["left_out"]["too long"] == 1
    assert state["data"]["train"]["records"] == NUM
    assert [line["left_out"] for line in metrics(whole)][-1] == 3


def test_the_others_are_learnt_as_if_nothing_were_missing(whole: Path, prepared: Callable[[str], Path], tmp_path: Path):
    """Each sample in its own step with its own noise: what a corrected file changes in a step is what it adds to it."""
    seen: list[tuple[int, list[int]]] = []
    loss_of = loop.loss_of

    def spy(*arguments: Any) -> Any:
        seen.append((arguments[-1].step, arguments[2]["sample"].tolist()))
        return loss_of(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "loss_of", spy)
        run(prepared("llama"), recipe_of(data_file(tmp_path), 8, 1), tmp_path / "bad")
        steps, seen[:] = dict(seen), []
        file = write_data(tmp_path, *[record(answer="Red. " * (number + 1)) for number in range(NUM)])
        run(prepared("llama"), recipe_of(file, 8, 1, data={"on_error": "stop", "max_skipped": 0.01}), tmp_path / "good")
    for step, samples in seen:
        assert steps[step] == [number for number in samples if number not in (*IMAGES, LONG)]


@pytest.mark.parametrize("cut", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_how_a_step_is_cut_changes_nothing(cut: int, whole: Path, prepared: Callable[[str], Path], tmp_path: Path):
    """With one sample a micro-batch, some of them are empty."""
    ours = run(prepared("llama"), recipe_of(data_file(tmp_path), cut, 8 // cut), tmp_path / "run")
    require_same_steps(metrics(ours), metrics(whole))
    assert sorted(listed(ours)) == sorted(listed(whole))


def test_two_processes_leave_out_the_same(forks: Forks, whole: Path, prepared: Callable[[str], Path], tmp_path: Path):
    """One sample a micro-batch: an empty one of one process stands beside a full one of the other."""
    two = run_two(forks, prepared("llama"), recipe_of(data_file(tmp_path), 1, 4), tmp_path)
    require_same_steps(two, metrics(whole))
    assert sorted(listed(partial(tmp_path / "run"))) == sorted(listed(whole))


def test_two_processes_stop_together(forks: Forks, prepared: Callable[[str], Path], tmp_path: Path):
    """Though each bad record is met by one of them alone."""
    recipe = recipe_of(data_file(tmp_path), 1, 4, data={"max_skipped": 0.1})
    ended = two_processes(forks, prepared("llama"), recipe, tmp_path)
    told = [re.findall(r"\d of 10 records cannot be used .*more than data.max_skipped=0.1 .*", said) for _, said in ended]
    assert [code for code, _ in ended] == [1, 1] and told[0] == told[1] != [], ended


def test_a_resumed_run_has_the_same_list(prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With loader processes, a step of which nothing is left, and evaluation on records of which one cannot be used."""
    more = {"steps": 12, "save_every": 2, "eval_every": 4, "data": {"workers": 1, "holdout": 3}}
    recipe, start = recipe_of(data_file(tmp_path), 1, 1, **more), prepared("llama")
    uncut = run(start, recipe, tmp_path / "whole")
    crash(start, recipe, tmp_path / "cut", step=5, resume=False, patch=monkeypatch)
    cut = run(start, recipe, tmp_path / "cut", resume=True)
    assert metrics(cut) == metrics(uncut) and listed(cut) == listed(uncut) and len(listed(cut)) == 3
    ours, theirs = weights_of(cut), weights_of(uncut)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_packed_rows_lose_their_samples(prepared: Callable[[str], Path], tmp_path: Path):
    """What is too long is not packed; an image is found damaged when its row's turn comes."""
    more = {"data": {"row_length": 512}, "steps": None, "epochs": 1}
    work = run(prepared("llama"), recipe_of(data_file(tmp_path), 1, 1, **more), tmp_path / "run")
    assert listed(work)[0] == (0, LONG, "too long")
    assert sorted(number for step, number, _ in listed(work) if step) == sorted(IMAGES)


def test_a_run_on_nothing_stops(prepared: Callable[[str], Path], tmp_path: Path):
    file = write_data(tmp_path, *[record(answer="Yes. " * 200)] * 4)
    recipe = recipe_of(file, 1, 1, steps=100, data={"too_long": "drop", "on_error": "stop", "max_skipped": 0.01})
    with pytest.raises(DataError, match=r"data.json: all records cannot be used \(4 too long\); the first is "):
        run(prepared("llama"), recipe, tmp_path / "run")


def test_dropped_records_need_no_budget(prepared: Callable[[str], Path], tmp_path: Path):
    values = [record(), record(answer="Yes. " * 200), record(answer="Yes. " * 200)]
    more = {"steps": None, "epochs": 1, "data": {"too_long": "drop", "on_error": "stop", "max_skipped": 0.01}}
    work = run(prepared("llama"), recipe_of(write_data(tmp_path, *values), 1, 1, **more), tmp_path / "run")
    state = json.loads((work / "diffvl.json").read_text(encoding="utf-8"))
    assert state["left_out"] == {"too long": 2} and state["state"]["steps"] == 3
