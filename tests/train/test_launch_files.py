"""The launcher's configurations in recipes/accelerate, as accelerate itself reads them; one of them launches a run."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from helpers import metrics
from tiny_runs import short_records, stage, write_recipe

from diffvl.cli import main as cli
from diffvl.config.resolve import presets

FOLDER = presets("recipes") / "accelerate"
MACHINES = {1: 1, 2: 1, 8: 1, 64: 8}


@pytest.mark.parametrize("gpus", MACHINES)
def test_the_launcher_reads_it(gpus: int):
    file = FOLDER / f"gpus-{gpus}.yaml"
    read: Any = load_config_from_file(str(file))
    assert (read.num_processes, read.num_machines) == (gpus, MACHINES[gpus])
    assert read.distributed_type.value == ("NO" if gpus == 1 else "MULTI_GPU") and read.mixed_precision == "no"
    command = "accelerate launch --config_file recipes/accelerate/" + file.name
    assert command in file.read_text(encoding="utf-8")


def test_no_other_files_lie_there():
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(f"gpus-{gpus}.yaml" for gpus in MACHINES)


@pytest.mark.slow
def test_a_launched_run_is_sharded_and_finishes(prepared: Callable[[str], Path], tower: Path, tmp_path: Path):
    """Without a GPU the launcher starts the same two processes, which meet over gloo."""
    section = stage("diffuse", short_records(tmp_path, 8), steps=3, sharding="full", save_every=1)
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, diffuse=section)
    words = ["convert", "--from", prepared("llama"), "--stage", "diffuse", "--recipe", recipe, "--out", tmp_path / "run"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / "gpus-2.yaml", "-m", "diffvl.cli"]
    variables = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, [*launch, *words])), capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run" / "diffuse")] == [1, 2, 3]
    assert done.stdout.count("wrote ") == 1
    again = subprocess.run(list(map(str, [*launch, *words])), capture_output=True, text=True, check=False, env=variables)
    assert again.returncode != 0 and again.stderr.count("exists and is not empty") == 1
