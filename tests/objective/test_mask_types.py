"""The masks of eager attention, which adds them to its scores: they have the type that the scores have, in training as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, batch, metrics, objective, sample, stage_recipe, text_only
from torch.utils._python_dispatch import TorchDispatchMode

from diffvl.attention.block_mask import training_masks
from diffvl.objective import losses as objectives
from diffvl.objective.losses import Draw, block_diffusion, scores_dtype
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train import stage as training


def eager(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, _ = load_checkpoint(directory, dtype=dtype)
    model.language_model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_stage_makes_masks_in_the_type_of_the_scores(
    precision: str, dtype: torch.dtype, prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The trainer's own forward runs under autocast, but masks are made before it."""
    seen: list[torch.dtype] = []

    def masks(text_config: Any, layout: Any, dtype: torch.dtype) -> Any:
        made = training_masks(text_config, layout, dtype)
        seen.extend({mask.dtype for mask in made.values()})
        return made

    monkeypatch.setattr(objectives, "training_masks", masks)
    data = text_only(tmp_path / "text.json", 4)
    recipe = stage_recipe(data, steps=2, precision=precision, attention="eager", holdout=2, eval_every=1)
    work = training.train(prepared("gemma2"), recipe, "diffuse", tmp_path / "out", False, QUIET)
    assert len(seen) >= 5 and set(seen) == {dtype}
    assert [line for line in metrics(work) if "loss" in line]


class Widened(TorchDispatchMode):
    """Counts sums of a bf16 and an fp32 tensor with an entry for every two tokens."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor and all(isinstance(one, torch.Tensor) and one.dim() == 4 for one in args[:2]):
            self.count += {one.dtype for one in args[:2]} == {torch.bfloat16, torch.float32}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", ["gemma2", "qwen2"])
def test_scores_stay_bf16_and_the_loss_stays_the_same(
    model_type: str, prepared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    model = eager(prepared(model_type))
    rows = batch([sample(model.config, [20, 9, 3, 7]), sample(model.config, [12, 14], 1)])
    found: dict[torch.dtype, tuple[float, int]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(objectives, "scores_dtype", lambda *_, dtype=dtype: dtype)
        with torch.autocast("cpu", torch.bfloat16), Widened() as widened:
            output = block_diffusion(model, model.config, rows, objective(), Draw(1, 2, 0.5))
        found[dtype] = float(output.loss.detach()) / float(output.sums["predicted"]), widened.count
    exact = block_diffusion(model, model.config, rows, objective(), Draw(1, 2, 0.5))
    loss = float(exact.loss.detach()) / float(exact.sums["predicted"])
    assert found[torch.bfloat16][1] == 0 and found[torch.float32][1] > 0, "the count notices what it is there for"
    assert found[torch.bfloat16][0] == pytest.approx(found[torch.float32][0], rel=5e-3)
    assert found[torch.bfloat16][0] == pytest.approx(loss, rel=2e-2)


def test_without_autocast_the_scores_have_the_type_of_the_weights():
    assert scores_dtype(torch.nn.Linear(2, 2).bfloat16(), "cpu") == torch.bfloat16
    assert scores_dtype(torch.nn.Linear(2, 2), "cpu") == torch.float32
    assert scores_dtype(lambda **_: None, "cpu") == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert scores_dtype(torch.nn.Linear(2, 2), "cpu") == torch.bfloat16
