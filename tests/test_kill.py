"""Kill -9 at any moment, then `--resume`: the result is that of the uninterrupted run, to the bit, and nothing is left over."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killed_process
import pytest
from helpers import metrics
from tiny_runs import stage, succeed, write_recipe

from diffvl import cli

# Six steps, a checkpoint every two. A log line in between, so that an average would reach over a checkpoint; a curriculum, and
# adapters with dropout, whose random state must come back too.
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "save_every": 2,
    "log_every": 1,
    "eval_every": 2,
    "eval_limit": 2,
    "optim": {"warmup_ratio": 0.5},
    "data": {"holdout": 2},
}
NOISE = {"schedule": "beta", "mean_start": 0.2, "mean_end": 0.8, "concentration_start": 4, "concentration_end": 25}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.2}
# The checkpoints there when it is killed, where not the last two: older ones go when a newer one has its name.
KEPT = {"step": (2,), "checkpoint written": (2,), "checkpoint renamed": (2,), "last checkpoint renamed": (2, 4, 6)}
CASES = [*(("plain", moment) for moment in killed_process.MOMENTS), ("lora", "step")]


@dataclass(frozen=True)
class Runs:
    """folder/RECIPE is the uninterrupted run; folder/RECIPE-MOMENT were killed. signals: what ended each of these."""

    folder: Path
    signals: dict[str, int]
    words: Callable[[str, str], list[str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[str], Path], tower: Path, shapes: dict[str, Path]) -> Runs:
    folder = tmp_path_factory.mktemp("killed")
    objective = {"kind": "block_diffusion", "block_size": 4, "noise": NOISE}
    plain = stage("diffuse", shapes["train"], objective=objective, **SETTINGS)
    write_recipe(folder / "plain.yaml", tower, diffuse=plain)
    write_recipe(folder / "lora.yaml", tower, diffuse={**plain, "log_every": 5, "lora": LORA})

    def words(recipe: str, name: str) -> list[str]:
        start = ["convert", "--from", str(prepared("llama")), "--stage", "diffuse"]
        return [*start, "--recipe", str(folder / f"{recipe}.yaml"), "--out", str(folder / name)]

    for recipe in ("plain", "lora"):
        succeed(*words(recipe, recipe))
    jobs = [(moment, words(recipe, f"{recipe}-{moment}")) for recipe, moment in CASES]
    program = [sys.executable, killed_process.__file__, json.dumps(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    names = [f"{recipe}-{moment}" for recipe, moment in CASES]
    assert done.returncode == 0, done.stderr
    return Runs(folder, dict(zip(names, map(int, done.stdout.split()), strict=True)), words)


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(("recipe", "moment"), CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(recipe: str, moment: str, runs: Runs):
    name = f"{recipe}-{moment}"
    whole, killed = runs.folder / recipe / "diffuse", runs.folder / name / "diffuse"
    assert runs.signals[name] == signal.SIGKILL
    # It was killed where it should be: only the last moment is past the one at which the output exists.
    assert killed.exists() == (moment == "finished")
    work = killed if killed.exists() else killed.with_name("diffuse.partial")
    kept = {path.name for path in (work / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in KEPT.get(moment, (4, 6))}
    succeed(*runs.words(recipe, name), "--resume")
    assert listing(killed.parent) == listing(whole.parent)
    assert metrics(killed) == metrics(whole)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "samples.jsonl", "run.yaml"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    assert json.loads((killed / "diffvl.json").read_text())["state"] == json.loads((whole / "diffvl.json").read_text())["state"]


@pytest.mark.parametrize(("recipe", "steps"), [("plain", [1, 2, 3, 4, 5, 6]), ("lora", [2, 4, 5, 6])])
def test_what_the_uninterrupted_run_logs(recipe: str, steps: list[int], runs: Runs):
    """Every step once; where not every step is logged, every checkpoint and the last step."""
    lines = metrics(runs.folder / recipe / "diffuse")
    assert [line["step"] for line in lines if "loss" in line] == steps
    assert [line["step"] for line in lines if "eval_masked_loss" in line] == [0, 2, 4, 6]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(set(losses)) == len(losses)
    assert not [name for name in listing(runs.folder / recipe) if "partial" in name or "checkpoint" in name or "saving" in name]
