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
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from diffvl.attention.choose import choose
from diffvl.config.families import ALL_LINEAR
from diffvl.config.objectives import DraftObjective
from diffvl.config.recipe import Lora, Stage
from diffvl.errors import ConfigError, UnsupportedModelError
from diffvl.hub.gate_diffvl import PROBED, AdapterGate, require_gate, short_text
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.train.sharding import decoder_layers

log = logging.getLogger(__name__)

WHOLE_ROWS = ("tiled", "flex_attention")  # attention that needs all tokens of a row at once
SAME = 1e-2  # std of the states: what rounding may do in bf16; a lost cache does far more


def fit_to_drafts(
    model: DiffVLForConditionalGeneration, stage: Stage, seed: int, family_targets: str, device: torch.device
) -> Stage:
    """Puts gated adapters into the trunk and chooses its attention for the objective's forwards, in place. A model on the meta
    device, of which a plan is made, has no numbers to prove anything by: it is taken for one that will pass.

    Args:
        seed: of the fresh adapters. device: that it will train on.
    Returns:
        the stage with the objective's forwards settled.
    Raises:
        ConfigError: for targets, an attention or forwards that the trunk cannot take.
        UnsupportedModelError: if the gate does not hold in this architecture.
    """
    objective = stage.objective
    assert isinstance(objective, DraftObjective)
    assert stage.lora is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        add_gated_adapters(model, stage.lora, family_targets)
    forwards = _forwards(model, stage, objective)
    if forwards == "one" or stage.attention != "auto":
        choose(model.trunk, stage.attention, device)
    return stage.model_copy(update={"objective": objective.model_copy(update={"forwards": forwards})})


def wanted_forwards(stage: Stage, objective: DraftObjective) -> str:
    """What `forwards` will be if the trunk allows it."""
    if objective.forwards == "auto":
        return "one" if stage.attention in WHOLE_ROWS else "two"
    return objective.forwards


def _is_empty(model: DiffVLForConditionalGeneration) -> bool:
    return model.trunk.device.type == "meta"


def _forwards(model: DiffVLForConditionalGeneration, stage: Stage, objective: DraftObjective) -> str:
    """Settles `forwards`. Raises ConfigError where two are asked for and the trunk's cache does not allow them."""
    if wanted_forwards(stage, objective) == "one":
        return "one"
    for layer in decoder_layers(model):
        # The masks only read the cache of the clean tokens, which their repetition in the backward pass finds as it was.
        layer._can_checkpoint_with_cache = True  # pyright: ignore[reportArgumentType]
    if _is_empty(model) or _goes_on_from_cache(model, stage.gradient_checkpointing):
        return "two"
    without = " under gradient_checkpointing" if stage.gradient_checkpointing else ""
    told = f"{model.trunk.config.model_type} does not go on from its cache{without}, as forwards: two wants it"
    if objective.forwards == "two":
        raise ConfigError(f"objective.forwards: {told}. Leave it at auto, or set one")
    log.warning("%s: drafts and clean tokens go through it in one forward", told)
    return "one"


@torch.no_grad()
def _goes_on_from_cache(model: DiffVLForConditionalGeneration, checkpointed: bool) -> bool:
    """Tells by short forwards whether tokens that read a cache have the states that they have in a whole text, as a model in
    training does it."""
    training, before = model.training, PROBED[1] - 1
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        _without_dropout(model)
        cache = DynamicCache()
        whole = model(**short_text(model), keep_states=True).hidden_states[0]
        model(**short_text(model, last=before), past_key_values=cache, keep_states=True)
        if cache.get_seq_length() != before:
            return False
        after = short_text(model, first=before)
        last = model(**after, past_key_values=cache, store_kv=False, keep_states=True).hidden_states[0]
        return bool((last - whole[:, -1:]).abs().max() <= SAME * whole.float().std())
    finally:
        if checkpointed:
            model.activation_checkpointing_disable()
        model.train(training)


def _without_dropout(model: nn.Module) -> None:
    """Puts a model in training mode, but for its dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def add_gated_adapters(model: DiffVLForConditionalGeneration, lora: Lora, family_targets: str) -> None:
    """Puts fresh adapters and a gate into the trunk, in place, and proves the gate.

    Raises:
        ConfigError: if the target expression means no layer that can be gated.
        UnsupportedModelError: if the gate does not hold in this architecture.
    """
    targets = lora.targets or family_targets
    linears = _meant(model, targets)
    seen = [name for name in linears if ".experts." not in name] if _is_empty(model) else _gateable(model, linears)
    if not seen:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: it names no linear layer that a gate can be put on")
    _tell_left_out(model, [name for name in linears if name not in seen])
    expression = "|".join(re.escape(name) for name in seen)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=f"(?:{expression})",
        fan_in_fan_out=any(isinstance(model.trunk.get_submodule(name), Conv1D) for name in seen),
    )
    model.trunk.add_adapter(config)
    model.gate = AdapterGate.attach(model.trunk)
    # Decoding asks the configuration whether adapters draft, while they train too. Whose they are is said where they are written.
    model.config.gated_adapter = {}
    if _is_empty(model):
        return
    try:
        require_gate(model)
    except ValueError as error:
        raise UnsupportedModelError(f"{model.trunk.config.model_type}: no lossless conversion: {error}") from error


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
        model.eval()(**short_text(model))
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
