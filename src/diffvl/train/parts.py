"""Which parameters move, and how fast: parts, their learning rates, the mask row as a parameter of its own, and low-rank
adapters on the trunk, through peft.

Parts: tower, connector, trunk, mask_row. The mask row is one row of the trunk's embedding; while a stage trains it stands
apart (`attach_mask_row`), so that it can have a learning rate, move under LoRA, and leave the rest of a frozen table
bit-identical. `fold_mask_row` writes it back. Connector and mask row are trained in full beside adapters.
"""

import re
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from diffvl.config.recipe import Lora, Part, Stage
from diffvl.errors import ConfigError
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration

MASK_ROW = "mask_row"


def part_of(name: str) -> Part:
    """The part that a parameter of the DiffVL model belongs to."""
    if name == MASK_ROW:
        return "mask_row"
    prefix = name.split(".", 1)[0]
    return {"vision_tower": "tower", "connector": "connector", "language_model": "trunk"}[prefix]  # type: ignore[return-value]


def attach_mask_row(model: DiffVLForConditionalGeneration) -> None:
    """Makes the embedding of the mask token a parameter of the model, in fp32. Its output row needs none: the mask token is
    never predicted."""
    embedding: Any = model.get_input_embeddings()
    mask_id = model.config.mask_token_id
    row = embedding.weight.detach()[mask_id].float().clone()
    model.register_parameter(MASK_ROW, nn.Parameter(row))

    def replace(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        is_mask = (inputs[0] == mask_id)[..., None]
        scaled = getattr(model, MASK_ROW) * getattr(module, "embed_scale", 1.0)
        return torch.where(is_mask, scaled.to(output.dtype), output)

    model.mask_row_hook = embedding.register_forward_hook(replace)  # type: ignore[assignment]


def fold_mask_row(model: DiffVLForConditionalGeneration) -> None:
    """Writes the trained mask row back into the embedding table and removes the parameter."""
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[model.config.mask_token_id] = getattr(model, MASK_ROW).to(embedding.weight.dtype)
    model.mask_row_hook.remove()  # type: ignore[union-attr]
    del model.mask_row_hook
    delattr(model, MASK_ROW)


def freeze_others(model: nn.Module, stage: Stage) -> None:
    """Only the parts in `trainable` require gradients; under LoRA, only adapters within the trunk. What trains is fp32."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = part in stage.trainable and (part != "trunk" or stage.lora is None or "lora_" in name)
        parameter.requires_grad_(trains)
        if trains and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """AdamW groups: one per part, split into weights that decay and vectors (biases, norms, the mask row) that do not."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": stage.trainable[part],  # type: ignore[index]
            "weight_decay": stage.optim.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def add_adapters(model: DiffVLForConditionalGeneration, lora: Lora, family_targets: str) -> None:
    """Wraps the trunk in place.

    Raises:
        ConfigError: if the target expression matches no module.
    """
    targets = lora.targets or family_targets
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        model.language_model = get_peft_model(model.language_model, config)
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: {error}") from error


def merge_adapters(model: DiffVLForConditionalGeneration) -> None:
    """Adds the adapters into the trunk's weights and unwraps it. Nothing to do without adapters."""
    if isinstance(model.language_model, PeftModel):
        model.language_model = model.language_model.merge_and_unload()
