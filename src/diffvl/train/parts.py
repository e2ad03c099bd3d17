"""Which parameters move, and how fast: parts, their learning rates, the mask row as a parameter of its own, and low-rank
adapters on the trunk, through peft.

Parts: tower, connector, trunk, mask_row. In a native vision-language model the trunk is its text part with embeddings and head,
the tower its image encoder, and the connector whatever else it has; elsewhere the newline of tiled images belongs to the
connector. The mask row is one row of the trunk's embedding; while a stage trains it stands apart (`attach_mask_row`), so that it
can have a learning rate, move under LoRA, and leave the rest of a frozen table bit-identical. `fold_mask_row` writes it back.
Connector and mask row are trained in full beside adapters.
"""

import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from diffvl.config.families import ALL_LINEAR
from diffvl.config.recipe import Lora, Part, Stage
from diffvl.errors import ConfigError, UnsupportedModelError
from diffvl.hub.gate_diffvl import MASK_ROW
from diffvl.hub.images_diffvl import stock, vision_parameters
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration


def parts_of(model: DiffVLForConditionalGeneration) -> dict[str, Part]:
    """Gives the part that each parameter of the DiffVL model belongs to, by its name."""
    if model.is_native:
        return _native_parts(model)
    prefixes: dict[str, Part] = {
        "vision_tower": "tower",
        "connector": "connector",
        "image_newline": "connector",
        "language_model": "trunk",
        MASK_ROW: "mask_row",
    }
    return {name: prefixes[name.split(".", 1)[0]] for name, _ in model.named_parameters()}


def _native_parts(model: DiffVLForConditionalGeneration) -> dict[str, Part]:
    source = stock(model.source)
    vision = {id(parameter) for parameter in vision_parameters(source).values()}
    tower = {id(parameter) for parameter in image_encoder(source).parameters()}

    def part(name: str, parameter: nn.Parameter) -> Part:
        if name == MASK_ROW:
            return "mask_row"
        if id(parameter) not in vision:
            return "trunk"
        return "tower" if id(parameter) in tower else "connector"

    return {name: part(name, parameter) for name, parameter in model.named_parameters()}


def image_encoder(source: Any) -> nn.Module:
    """The module that a stock vision-language model names as its image encoder; an empty one where it names none."""
    try:
        encoder = source.get_encoder(modality="image")
    except (AttributeError, TypeError, ValueError):
        encoder = None
    return encoder if isinstance(encoder, nn.Module) and encoder is not source else nn.Module()


def fold_mask_row(model: DiffVLForConditionalGeneration) -> None:
    """Writes the trained mask row back into the embedding table and removes the parameter.

    Raises:
        UnsupportedModelError: in a model with gated adapters, whose table is its parent's.
    """
    _refuse_gated(model, "its mask row cannot be folded into the table, which its parent's answers come from")
    embedding: Any = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[model.config.mask_token_id] = getattr(model, MASK_ROW).to(embedding.weight.dtype)
    model.mask_row_hook.remove()  # type: ignore[union-attr]
    del model.mask_row_hook
    delattr(model, MASK_ROW)


def require_parts(model: DiffVLForConditionalGeneration, stage: Stage) -> None:
    """Raises ConfigError if the model lacks a part that is to train, or what adapters of a native one are to go on."""
    there = {*parts_of(model).values(), MASK_ROW}
    if missing := [part for part in stage.trainable if part not in there]:
        raise ConfigError(f"trainable.{missing[0]}: this model has no parameters of that part; leave it out")
    if model.is_native and stage.lora is not None and stage.lora.targets is not None:
        _text_linears(stock(model.source), stage.lora.targets)


def freeze_others(model: DiffVLForConditionalGeneration, stage: Stage) -> None:
    """Only the parts in `trainable` require gradients; under LoRA, only adapters within the trunk.

    Raises:
        ConfigError: if the model has nothing of a part that is to train.
    """
    require_parts(model, stage)
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        part = parts[name]
        trains = part in stage.trainable and (part != "trunk" or stage.lora is None or "lora_" in name)
        parameter.requires_grad_(trains)


def upcast(module: nn.Module, everything: bool = False) -> None:
    """Puts what trains in fp32, in place; or everything that a checkpoint of the module holds."""
    for tensor in module.state_dict(keep_vars=True).values() if everything else module.parameters():
        if tensor.is_floating_point() and (everything or tensor.requires_grad) and tensor.dtype != torch.float32:
            tensor.data = tensor.data.float()


def parameter_groups(model: DiffVLForConditionalGeneration, stage: Stage) -> list[dict[str, Any]]:
    """AdamW groups: one per part, split into weights that decay and vectors (biases, norms, the mask row) that do not."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parts[name], parameter.ndim >= 2), []).append(parameter)
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
    if model.is_native:
        targets = _text_linears(model.source, targets)
    model.put_trunk(with_adapters(model.trunk, lora, targets))


def with_adapters(trunk: PreTrainedModel, lora: Lora, targets: str) -> PeftModel:
    """A trunk, changed in place, in its wrapper. Raises ConfigError if the target expression matches no module that can have
    adapters."""
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with warnings.catch_warnings():
            # peft asks transformers by the old name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(trunk, config)  # type: ignore[return-value]
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: {error}") from error


def _text_linears(source: Any, targets: str) -> str:
    """The linear layers in the blocks of the text part that an expression means, as an expression that reaches no others.

    Raises:
        ConfigError: if there are none.
    """
    decoder = source.get_decoder()
    path = next(name for name, module in source.named_modules() if module is decoder)
    linears = [
        f"{path}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear) and "layers." in name
    ]
    try:
        meant = linears if targets == ALL_LINEAR else [name for name in linears if re.fullmatch(targets, name)]
    except re.error as error:
        raise ConfigError(f"lora.targets {targets!r} is no regular expression: {error}") from error
    if not meant:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: it names no linear layer of its text part, {path}")
    names = sorted({name.rsplit(".", 1)[-1] for name in meant})
    return rf"{re.escape(path)}(\..+)?\.layers\.\d+\..+\.({'|'.join(names)})"


def merge_adapters(model: DiffVLForConditionalGeneration) -> None:
    """Adds the adapters into the trunk's weights and unwraps it. Nothing to do without adapters.

    Raises:
        UnsupportedModelError: if the adapters have a gate.
    """
    _refuse_gated(model, "its adapters cannot be merged, because the same weights serve the clean tokens")
    if isinstance(model.trunk, PeftModel):
        model.put_trunk(model.trunk.merge_and_unload())


def _refuse_gated(model: DiffVLForConditionalGeneration, told: str) -> None:
    if model.gate is not None:
        raise UnsupportedModelError(f"a lossless conversion changes no weight: {told}")
