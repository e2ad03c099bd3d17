"""What comes before any work never reads a weight."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import refused, short_records, stage, succeed


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_5_vl"])
def test_doctor_and_a_dry_run_do_not_see_that_no_weight_is_a_number(
    model_type: str, source: Callable[[str], Path], tower: Path, tmp_path: Path
):
    """Whatever loads weights refuses these."""
    model = tmp_path / "model"
    shutil.copytree(source(model_type), model)
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    diffuse = stage("diffuse", short_records(tmp_path, 4), trainable={"trunk": 1e-3, "mask_row": 1e-3})
    own = {"prepare": {"vision_tower": str(tower)}} if model_type == "qwen2" else {}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**own, "stages": {"diffuse": diffuse}}), encoding="utf-8")
    words = ["convert", model, "--recipe", recipe, "--out", tmp_path / "run"]
    succeed("doctor", model)
    assert "nothing was written" in succeed(*words, "--dry-run").out
    refused(*words, says=["values that are nan or infinite"])
