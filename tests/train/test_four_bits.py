"""A trunk in 4 bits: what it needs is told before any work, and what is written is the adapters on the stored weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, metrics, stage_recipe, weights_of
from tiny_runs import refused, short_records, stage, write_recipe

from diffvl.errors import ConfigError
from diffvl.train import four_bits
from diffvl.train import stage as training
from diffvl.train.four_bits import require_four_bits


def packed(**settings: Any) -> Any:
    return stage_recipe(Path("x"), lora={"bits": 4}, **settings).stages["diffuse"]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch):
    require_four_bits(stage_recipe(Path("x"), lora={}).stages["diffuse"])
    with pytest.raises(ConfigError, match="does not go with sharding: full: .* Leave it at auto"):
        require_four_bits(packed(sharding="full"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="lora.bits: 4 needs a GPU with CUDA, and there is none here: leave bits out"):
        require_four_bits(packed())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(four_bits, "PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(
        ConfigError, match="needs the package a_package_that_nobody_has: pip install a_package_that_nobody_has, or"
    ):
        require_four_bits(packed())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_refuses_before_any_work(source: Callable[[str], Path], tower: Path, tmp_path: Path):
    section = stage("diffuse", short_records(tmp_path, 4), lora={"bits": 4})
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, diffuse=section)
    refused(
        "convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "run", says=["lora.bits: 4 needs a GPU with CUDA"]
    )
    assert not (tmp_path / "run").exists()


def test_only_the_layers_of_the_text_part_are_packed(prepared: Callable[[str], Path]):
    """Names of all other linear layers; of a native model its projector and image encoder among them."""
    own, native = (four_bits._others(prepared(model)) for model in ("qwen2", "qwen2_5_vl"))
    assert "language_model.lm_head" in own and "connector.layers.0" in own and any("vision_tower" in name for name in own)
    assert not [name for name in own if name.startswith("language_model.model.")]
    assert any("visual.blocks.0." in name for name in native) and not [name for name in native if "language_model" in name]


@pytest.mark.gpu
def test_a_packed_run_resumes_and_writes_plain_weights(prepared: Callable[[str], Path], tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    start, settings = prepared("llama"), {"steps": 6, "save_every": 3, "precision": "bf16", "lora": {"rank": 4, "bits": 4}}
    recipe = stage_recipe(short_records(tmp_path, 8), **settings)
    whole = training.train(start, recipe, "diffuse", tmp_path / "run", False, QUIET)
    lines, ours, before = metrics(whole), weights_of(whole), weights_of(start)
    assert ours.keys() == before.keys() and {key: tensor.dtype for key, tensor in ours.items()} == {
        key: tensor.dtype for key, tensor in before.items()
    }
    changed = {key for key in ours if not torch.equal(ours[key], before[key])}
    assert any(".layers." in key and key.startswith("language_model") for key in changed)
    assert not [key for key in changed if key.startswith("vision_tower")]
    again = training.train(start, recipe, "diffuse", tmp_path / "run", True, QUIET)
    assert metrics(again) == lines and lines[-1]["loss"] < lines[0]["loss"]
