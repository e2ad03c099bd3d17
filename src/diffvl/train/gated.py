"""Low-rank adapters with a gate: which layers get them, and the proof that they act on noisy tokens only.

Place in the flow: `stage.fit_to_stage` calls this for an objective that drafts. The layers are peft's, put into the stock trunk
where its own stand. A layer that does not see tokens in their rows and columns cannot be gated and is left out: experts see the
tokens that were routed to them, and those stored as one tensor are no linear layers at all.
"""

import logging
import re
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffvl.config.families import ALL_LINEAR
from diffvl.config.recipe import Lora
from diffvl.errors import ConfigError, UnsupportedModelError
from diffvl.hub.gate_diffvl import PROBED, AdapterGate, require_gate, text_ids
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration

log = logging.getLogger(__name__)


def add_gated_adapters(model: DiffVLForConditionalGeneration, lora: Lora, family_targets: str) -> None:
    """Puts fresh adapters and a gate into the trunk, in place, and proves the gate.

    Raises:
        ConfigError: if the target expression means no layer that can be gated.
        UnsupportedModelError: if the gate does not hold in this architecture.
    """
    targets = lora.targets or family_targets
    linears = _meant(model, targets)
    seen = _gateable(model, linears)
    if not seen:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: it names no linear layer that a gate can be put on")
    _tell_left_out(model, [name for name in linears if name not in seen])
    expression = "|".join(re.escape(name) for name in seen)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=f"(?:{expression})")
    model.trunk.add_adapter(config)
    model.gate = AdapterGate.attach(model.trunk)
    try:
        require_gate(model)
    except ValueError as error:
        raise UnsupportedModelError(f"{model.config.text_config.model_type}: no lossless conversion: {error}") from error


def _meant(model: DiffVLForConditionalGeneration, targets: str) -> list[str]:
    """Names, in the trunk, of the linear layers in the decoder's layers that an expression means.

    Raises:
        ConfigError: for what is no regular expression.
    """
    decoder = model.trunk.get_decoder()
    path = next(name for name, module in model.trunk.named_modules() if module is decoder)
    # As adapters without a gate are named: from the trunk on, in a native model from its text part on.
    start = f"{path}." if path else ""
    found = {
        name: name if model.is_native else f"{start}{name}"
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"(^|\.)(layers|h)\.\d+\.", name)
    }
    try:
        return [f"{start}{name}" for name, known in found.items() if targets == ALL_LINEAR or re.fullmatch(targets, known)]
    except re.error as error:
        raise ConfigError(f"lora.targets {targets!r} is no regular expression: {error}") from error


@torch.no_grad()
def _gateable(model: DiffVLForConditionalGeneration, names: list[str]) -> list[str]:
    """Those of the layers that see every token in its row and column, by a short forward."""
    seen: dict[str, bool] = {}

    def look(name: str) -> Any:
        def note(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen[name] = seen.get(name, True) and given[0].shape[:-1] == PROBED

        return note

    hooks = [model.trunk.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    training = model.training
    try:
        model.eval()(text_ids(model))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return [name for name in names if seen.get(name, False)]


def _tell_left_out(model: DiffVLForConditionalGeneration, linears: list[str]) -> None:
    """Says what gets no adapters: experts, as modules and as tensors."""
    tensors = [name for name, parameter in model.trunk.get_decoder().named_parameters() if parameter.dim() == 3]
    kinds = sorted({re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in (*linears, *tensors)})
    if kinds:
        log.warning("no gated adapters on %s: experts see tokens in another order than they stand in", ", ".join(kinds))
