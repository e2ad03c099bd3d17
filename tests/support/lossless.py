"""Models with gated adapters that have an effect, and data for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffvl.config.recipe import Stage
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train.parts import upcast
from diffvl.train.stage import fit_to_stage


def draft_stage(forwards: str = "two", checkpointed: bool = False, **objective: Any) -> Stage:
    """A stage of drafts in fp32."""
    settings = {"kind": "draft", "block_size": 4, "drafts": 5, "forwards": forwards, **objective}
    return Stage.model_validate(
        {
            "objective": settings,
            "trainable": {"trunk": 1e-3, "mask_row": 1e-3},
            "lora": {"rank": 4, "alpha": 4},
            "steps": 1,
            "precision": "fp32",
            "gradient_checkpointing": checkpointed,
        }
    )


def stir(model: DiffVLForConditionalGeneration, scale: float = 0.2) -> None:
    """Gives adapters and mask row values as if they were trained."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name == "mask_row":
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def fitted(prepared: Path, stage: Stage) -> tuple[DiffVLForConditionalGeneration, Stage]:
    """A prepared model that is fitted to a stage of drafts, with adapters that have an effect; and the stage, settled."""
    model, _ = load_checkpoint(prepared)
    stage = fit_to_stage(model, stage, seed=0)
    upcast(model)
    stir(model)
    return model, stage


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every gradient that there is, by name; they are taken away."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of gradients, relative to their norms."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm().clamp_min(1e-9)) for name in one)


Prepared = Callable[[str], Path]
