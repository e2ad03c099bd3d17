"""The mask row as a parameter of its own, and the parameter groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ORDINARY, stage_recipe, trunks

from diffvl.config.recipe import Stage
from diffvl.hub.gate_diffvl import attach_mask_row
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train.parts import fold_mask_row, freeze_others, parameter_groups, parts_of, upcast


def stage(**settings: Any) -> Stage:
    return stage_recipe(Path("none.json"), **settings).stages["diffuse"]


@pytest.mark.parametrize("model_type", trunks())
@torch.no_grad()
def test_the_mask_row_stands_for_its_row_of_the_table(model_type: str, prepared: Callable[[str], Path]):
    """Attached, it changes nothing; trained, it moves the logits as the folded table does (gemma scales its embeddings)."""
    model = load_checkpoint(prepared(model_type))[0].eval()
    names = [name for name, _ in model.named_parameters()]
    ids = torch.randint(0, ORDINARY, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[0, [3, 7]] = model.config.mask_token_id
    plain = model(ids).logits
    attach_mask_row(model)
    assert torch.equal(model(ids).logits, plain)
    row = model.get_parameter("mask_row")
    assert row.dtype == torch.float32
    row.add_(torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    trained = model(ids).logits
    assert (trained - plain).abs().max() > 0.1
    fold_mask_row(model)
    assert [name for name, _ in model.named_parameters()] == names
    given = [token for token in range(plain.shape[-1]) if token != model.config.mask_token_id]  # a tied head has the row, too
    torch.testing.assert_close(model(ids).logits[..., given], trained[..., given], rtol=1e-5, atol=1e-5)


def test_only_what_trains_asks_for_gradients_and_is_fp32(prepared: Callable[[str], Path]):
    model, _ = load_checkpoint(prepared("llama"), dtype=torch.bfloat16)
    attach_mask_row(model)
    freeze_others(model, stage(trainable={"connector": 1e-3, "mask_row": 1e-4}))
    upcast(model)
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parts_of(model)[name] for name in training} == {"connector", "mask_row"}
    assert training == {name for name, _ in model.named_parameters() if parts_of(model)[name] in ("connector", "mask_row")}
    assert all((parameter.dtype == torch.float32) == (name in training) for name, parameter in model.named_parameters())


def test_groups_have_their_parts_rate_and_spare_vectors_the_decay(prepared: Callable[[str], Path]):
    rates = {"tower": 1e-5, "connector": 2e-4, "trunk": 3e-5, "mask_row": 4e-4}
    settings = stage(trainable=rates, optim={"weight_decay": 0.1})
    model, _ = load_checkpoint(prepared("qwen2"))
    attach_mask_row(model)
    freeze_others(model, settings)
    groups = parameter_groups(model, settings)
    assert {group["part"]: group["lr"] for group in groups} == rates
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert all((parameter.ndim >= 2) == (group["weight_decay"] == 0.1) for parameter in group["params"])
        assert group["weight_decay"] in (0.0, 0.1)
    assert [group["part"] for group in groups if group["part"] == "mask_row"] == ["mask_row"]
