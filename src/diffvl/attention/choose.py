"""Who executes the attention of training: FlexAttention on a GPU, torch's flash kernel tile by tile on a CPU, or the
architecture's own way.
"""

import logging

import torch
from transformers import PreTrainedModel

from diffvl.attention.block_mask import FLEX, training_masks
from diffvl.attention.cpu import TILED
from diffvl.errors import ConfigError
from diffvl.hub.layout_diffvl import clean_layout

log = logging.getLogger(__name__)

FLEX_WIDTH = 16  # of a head, at least


def choose(trunk: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Sets the trunk's attention implementation for training, in place, and returns it.

    Args:
        wanted: "auto" (FlexAttention on a GPU, tiles on a CPU, where the architecture can take them; its own default
            otherwise), "sdpa", "eager", "tiled" or "flex_attention".
    Raises:
        ConfigError: if the architecture or the device cannot take what was asked for by name.
    """
    automatic = wanted == "auto"
    if automatic:
        wanted = _best(trunk, device)
    kind = trunk.config.model_type
    _refuse(trunk, wanted, device)
    text_config = trunk.config.get_text_config(decoder=True)
    before = str(text_config._attn_implementation)
    try:
        set_attention(trunk, wanted)
        if wanted == TILED and trunk.device.type != "meta":  # an empty copy cannot run: it is tried before training
            _try_tiles(trunk)
    except (ValueError, ImportError) as error:
        set_attention(trunk, before)
        if not automatic:
            raise ConfigError(f"attention: {kind} cannot take {wanted}: {error}") from error
        log.warning("attention: %s cannot take %s (%s): it stays with %s", kind, wanted, error, before)
        return before
    if wanted == FLEX:
        # Row lengths, windows and evaluation each compile a kernel; past its limit torch would hold all scores, and only warn.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if text_config._attn_implementation != wanted:
        raise ConfigError(f"attention: {kind} cannot take {wanted}: it stays with {text_config._attn_implementation}")
    return wanted


def set_attention(trunk: PreTrainedModel, implementation: str) -> None:
    """Sets the attention implementation of the text part, in place. The vision part of a native vision-language model keeps its
    own: our masks are for text. (transformers' own setter refuses FlexAttention for whole models of which only the vision part
    has none.)"""
    text_config = trunk.config.get_text_config(decoder=True)
    if text_config is trunk.config:
        trunk.set_attn_implementation(implementation)
    else:
        text_config._attn_implementation = implementation


def _refuse(trunk: PreTrainedModel, wanted: str, device: torch.device) -> None:
    """Raises ConfigError for what is known to be impossible without a trial."""
    kind = trunk.config.model_type
    if wanted == FLEX and device.type != "cuda":
        raise ConfigError(f"attention: flex_attention needs a GPU to train (its CPU form has no backward); here: {device.type}")
    if wanted == TILED and device.type != "cpu":
        raise ConfigError(f"attention: tiled is for CPUs, this is {device.type}; use auto, flex_attention or sdpa")
    if wanted == FLEX and (odd := _flex_cannot(trunk)):
        raise ConfigError(f"attention: {kind} cannot take {wanted}: {odd}")
    if wanted == TILED and not _takes_tiles(trunk):
        raise ConfigError(f"attention: {kind} cannot take {wanted}: its attention is not pluggable; use auto, sdpa or eager")


@torch.no_grad()
def _try_tiles(trunk: PreTrainedModel) -> None:
    """Runs one short forward. Raises ValueError where the model rewrites its mask on the way to its attention."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    layout = clean_layout(torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool), context="causal")
    training = trunk.training
    masks = training_masks(trunk.config.get_text_config(decoder=True), layout, torch.float32)
    with torch.random.fork_rng(devices=[]):
        # In training mode, where a model may want dropout of its attention.
        trunk.train()(input_ids=ids, attention_mask=masks, position_ids=layout.position, use_cache=False)
    trunk.train(training)


def _best(trunk: PreTrainedModel, device: torch.device) -> str:
    is_native = trunk.config.get_text_config(decoder=True) is not trunk.config
    if device.type == "cuda" and (is_native or trunk._supports_flex_attn) and trunk._can_set_attn_implementation():
        if not (odd := _flex_cannot(trunk)):
            return FLEX
        log.warning("attention: %s cannot take %s (%s): it stays with sdpa", trunk.config.model_type, FLEX, odd)
    if device.type == "cpu" and _takes_tiles(trunk):
        return TILED
    return str(trunk.config.get_text_config(decoder=True)._attn_implementation)


def _flex_cannot(trunk: PreTrainedModel) -> str:
    """Tells what FlexAttention does not know of a trunk; empty where nothing stands against it."""
    config = trunk.config.get_text_config(decoder=True)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    if any(getattr(config, name, None) for name in names):
        return "it has dropout in its attention"
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else FLEX_WIDTH)
    return f"its heads are {width} wide, and {FLEX_WIDTH} is the least" if width < FLEX_WIDTH else ""


def _takes_tiles(trunk: PreTrainedModel) -> bool:
    return bool(trunk._supports_sdpa and trunk._can_set_attn_implementation())
