"""The attention rule as a block-sparse mask, and who executes it: FlexAttention on a GPU, torch's flash kernel tile by tile on a
CPU.

A training row has two kinds of empty area: what lies after a token, and the noisy blocks of others. A dense mask computes
both and then throws them away, and holds one value for each pair of tokens. Here the mask is a `BlockMask` of torch's
FlexAttention, built from the bounds of each tile's rows (no tensor of T x T), and only tiles that can hold an allowed pair are
computed. Which pairs are allowed inside a tile is `layout_diffvl.attends`, the one rule. tests/test_attention.py proves
block masks and results against the dense form.

Shapes: B batch, T tokens, H heads, QT and KT tiles along queries and keys.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from diffvl.attention.cpu import CPU_TILE, TILED
from diffvl.errors import ConfigError
from diffvl.hub.layout_diffvl import Layout, attends, attention_masks, clean_layout, for_layers

log = logging.getLogger(__name__)

FLEX = "flex_attention"
FLEX_WIDTH = 16  # of a head, at least
FLEX_TILE = 128  # FlexAttention's own tile, on both sides


# --- choosing --------------------------------------------------------------------------------------------------------------


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
    before = str(trunk.config._attn_implementation)
    try:
        trunk.set_attn_implementation(wanted)
        if wanted == TILED:
            _try_tiles(trunk)
    except (ValueError, ImportError) as error:
        trunk.set_attn_implementation(before)
        if not automatic:
            raise ConfigError(f"attention: {kind} cannot take {wanted}: {error}") from error
        log.warning("attention: %s cannot take %s (%s): it stays with %s", kind, wanted, error, before)
        return before
    if wanted == FLEX:
        # Row lengths, windows and evaluation each compile a kernel; past its limit torch would hold all scores, and only warn.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if trunk.config._attn_implementation != wanted:
        raise ConfigError(f"attention: {kind} cannot take {wanted}: it stays with {trunk.config._attn_implementation}")
    return wanted


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
    """One short forward. Raises ValueError where the model rewrites its mask on the way to its attention."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    layout = clean_layout(torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool), context="causal")
    training = trunk.training
    masks = training_masks(trunk.config.get_text_config(decoder=True), layout, torch.float32)
    with torch.random.fork_rng(devices=[]):
        # In training mode, where a model may want dropout of its attention.
        trunk.train()(input_ids=ids, attention_mask=masks, position_ids=layout.position, use_cache=False)
    trunk.train(training)


def _best(trunk: PreTrainedModel, device: torch.device) -> str:
    if device.type == "cuda" and trunk._supports_flex_attn and trunk._can_set_attn_implementation():
        if not (odd := _flex_cannot(trunk)):
            return FLEX
        log.warning("attention: %s cannot take %s (%s): it stays with sdpa", trunk.config.model_type, FLEX, odd)
    if device.type == "cpu" and _takes_tiles(trunk):
        return TILED
    return str(trunk.config._attn_implementation)


def _flex_cannot(trunk: PreTrainedModel) -> str:
    """What FlexAttention does not know of a trunk; empty where nothing stands against it."""
    config = trunk.config.get_text_config(decoder=True)
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    if any(getattr(config, name, None) for name in names):
        return "it has dropout in its attention"
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else FLEX_WIDTH)
    return f"its heads are {width} wide, and {FLEX_WIDTH} is the least" if width < FLEX_WIDTH else ""


def _takes_tiles(trunk: PreTrainedModel) -> bool:
    return bool(trunk._supports_sdpa and trunk._can_set_attn_implementation())


# --- the mask --------------------------------------------------------------------------------------------------------------


def training_masks(text_config: Any, layout: Layout, dtype: torch.dtype) -> Any:
    """The masks of a whole training row for the trunk's attention implementation: dense for sdpa and eager, else block masks;
    one per layer type where the config lists them."""
    implementation = text_config._attn_implementation
    if implementation not in (TILED, FLEX):
        return attention_masks(text_config, layout, slice(None), dtype)
    tile = FLEX_TILE if implementation == FLEX else CPU_TILE
    return for_layers(text_config, lambda window, chunk: block_mask(layout, tile, window, chunk))


def block_mask(layout: Layout, tile: int, window: int | None = None, chunk: int | None = None) -> BlockMask:
    """The layout as a BlockMask with square tiles of `tile` tokens; FlexAttention skips empty tiles and does not evaluate the
    rule in full ones. Memory grows with (T / tile)^2."""
    possible, full = _tiles(layout, tile, window, chunk)
    rows, context = layout.rows, layout.context
    invalid = ~layout.valid

    def rule(b: torch.Tensor, _: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        q = {name: row[b, q_index] for name, row in rows.items()}
        k = {name: row[b, k_index] for name, row in rows.items()}
        return attends(q, k, context, window, chunk) | ((q_index == k_index) & invalid[b, q_index])

    partial = _listed(possible & ~full)
    whole = _listed(full)
    length = layout.position.shape[1]
    mask = BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=tile, mask_mod=rule, seq_lengths=(length, length))
    mask.ndim = 4  # type: ignore[attr-defined]  # gpt2 asks a mask for it, where others ask for its shape
    return mask


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [B, QT, KT] -> how many key tiles each query tile has, int32 [B, 1, QT], and their indices first, [B, 1, QT, KT]."""
    order = torch.argsort((~tiles).to(torch.int8), dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


@dataclass
class _Bounds:
    """Least and greatest value of a row over some tokens of each tile, [B, tiles]; least > greatest where there are none."""

    least: torch.Tensor
    greatest: torch.Tensor

    @classmethod
    def of(cls, row: torch.Tensor, chosen: torch.Tensor, tile: int) -> "_Bounds":
        huge = torch.iinfo(torch.long).max // 4
        row = row.long()
        low = _tiled(torch.where(chosen, row, huge), tile, huge).amin(-1)
        high = _tiled(torch.where(chosen, row, -huge), tile, -huge).amax(-1)
        return cls(low, high)

    def queries(self) -> "_Bounds":
        return _Bounds(self.least[:, :, None], self.greatest[:, :, None])

    def keys(self) -> "_Bounds":
        return _Bounds(self.least[:, None, :], self.greatest[:, None, :])

    def meets(self, other: "_Bounds") -> torch.Tensor:
        """Whether the two ranges overlap."""
        return (self.least <= other.greatest) & (other.least <= self.greatest)

    def is_one(self) -> torch.Tensor:
        return self.least == self.greatest


def _tiled(row: torch.Tensor, tile: int, filler: int) -> torch.Tensor:
    """[B, T] -> [B, tiles, tile], the last tile filled up."""
    short = -row.shape[1] % tile
    return torch.nn.functional.pad(row, (0, short), value=filler).unflatten(1, (-1, tile))


def _tiles(layout: Layout, tile: int, window: int | None, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tiles may hold an allowed pair, and which hold allowed pairs only; both bool [B, QT, KT]. The first may say yes too
    often, the second no too often: that costs time, never a result."""
    noisy, valid = layout.noisy.bool(), layout.valid
    clean_tokens, noisy_tokens = valid & ~noisy, valid & noisy
    order = layout.position if layout.context == "causal" else layout.block
    clean_order = _Bounds.of(order, clean_tokens, tile)
    clean_block = _Bounds.of(layout.block, clean_tokens, tile)
    noisy_block = _Bounds.of(layout.block, noisy_tokens, tile)
    position, document = _Bounds.of(layout.position, valid, tile), _Bounds.of(layout.document, valid, tile)

    clean_clean = clean_order.keys().least <= clean_order.queries().greatest
    noisy_clean = clean_block.keys().least < noisy_block.queries().greatest
    noisy_noisy = noisy_block.keys().meets(noisy_block.queries())
    possible = (clean_clean | noisy_clean | noisy_noisy) & document.keys().meets(document.queries())

    all_clean = _tiled(clean_tokens.long(), tile, 0).amin(-1).bool()
    all_noisy = _tiled(noisy_tokens.long(), tile, 0).amin(-1).bool()
    before = clean_order.keys().greatest <= clean_order.queries().least
    before_block = clean_block.keys().greatest < noisy_block.queries().least
    full = (all_clean[:, :, None] & before) | (all_noisy[:, :, None] & before_block)
    one_document = document.queries().is_one() & document.keys().is_one()
    full = full & all_clean[:, None, :] & one_document & document.keys().meets(document.queries())

    if window is not None:
        possible = possible & (position.keys().greatest > position.queries().least - window)
        full = full & (position.keys().least > position.queries().greatest - window)
    if chunk is not None:
        chunks = _Bounds.of(torch.div(layout.position, chunk, rounding_mode="floor"), valid, tile)
        possible = possible & chunks.keys().meets(chunks.queries())
        full = full & chunks.queries().is_one() & chunks.keys().is_one() & chunks.keys().meets(chunks.queries())
    # A padding token sees itself.
    pads = _tiled((~valid).long(), tile, 0).amax(-1).bool()
    possible = possible | torch.diag_embed(pads)
    return possible, full & possible


def bucket(tokens: int) -> int:
    """The row length that a GPU step is padded to: a multiple of the tile, eight of them in each doubling, so that compiled
    kernels are reused at the price of one padding token in nine at most."""
    step = max(FLEX_TILE, 2 ** max((tokens - 1).bit_length() - 4, 0))
    return -(-tokens // step) * step
