"""The attention rule as a block-sparse mask.

A training row has two kinds of empty area: what lies after a token, and the noisy blocks of others. A dense mask computes
both and then throws them away, and holds one value for each pair of tokens. Here the mask is a `BlockMask` of torch's
FlexAttention, built from the bounds of each tile's rows (no tensor of T x T), and only tiles that can hold an allowed pair are
computed. Which pairs are allowed inside a tile is `layout_diffvl.attends`, the one rule. tests/attention/test_attention.py proves
block masks and results against the dense form.

Shapes: B batch, T tokens, H heads, QT and KT tiles along queries and keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from diffvl.attention.cpu import CPU_TILE, TILED
from diffvl.hub.layout_diffvl import BEYOND_WINDOW, Layout, attends
from diffvl.hub.masks_diffvl import attention_masks, for_layers

FLEX = "flex_attention"
FLEX_TILE = 128  # FlexAttention's own tile, on both sides


def training_masks(text_config: Any, layout: Layout, dtype: torch.dtype) -> Any:
    """Gives the masks of a whole training row for the trunk's attention implementation: dense for sdpa and eager, else block
    masks; one per layer type where the config lists them."""
    implementation = text_config._attn_implementation
    if implementation not in (TILED, FLEX):
        return attention_masks(text_config, layout, slice(None), dtype)
    tile = FLEX_TILE if implementation == FLEX else CPU_TILE
    return for_layers(text_config, lambda window, chunk: block_mask(layout, tile, window, chunk))


def block_mask(layout: Layout, tile: int, window: int | None = None, chunk: int | None = None) -> BlockMask:
    """Gives the layout as a BlockMask with square tiles of `tile` tokens; FlexAttention skips empty tiles and does not evaluate
    the rule in full ones. Memory grows with (T / tile)^2."""
    possible, full = _tiles(layout, tile, window, chunk)
    rows, context, image_attention = layout.rows, layout.context, layout.image_attention
    invalid = ~layout.valid

    def rule(b: torch.Tensor, _: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        q = {name: row[b, q_index] for name, row in rows.items()}
        k = {name: row[b, k_index] for name, row in rows.items()}
        return attends(q, k, context, window, chunk, image_attention) | ((q_index == k_index) & invalid[b, q_index])

    partial = _listed(possible & ~full)
    whole = _listed(full)
    length = layout.position.shape[1]
    mask = BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=tile, mask_mod=rule, seq_lengths=(length, length))
    mask.ndim = 4  # type: ignore[attr-defined]  # gpt2 asks a mask for it, where others ask for its shape
    return mask


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists tiles: bool [B, QT, KT] -> how many key tiles each query tile has, int32 [B, 1, QT], and their indices first, [B, 1,
    QT, KT]."""
    order = torch.argsort((~tiles).to(torch.int8), dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


@dataclass
class _Bounds:
    """Least and greatest value of a row over some tokens of each tile, [B, tiles]; least > greatest where there are none."""

    least: torch.Tensor
    greatest: torch.Tensor

    @classmethod
    def over(cls, row: torch.Tensor, chosen: torch.Tensor, tile: int) -> "_Bounds":
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
        """Tells whether the two ranges overlap."""
        return (self.least <= other.greatest) & (other.least <= self.greatest)

    def is_one(self) -> torch.Tensor:
        return self.least == self.greatest


def _tiled(row: torch.Tensor, tile: int, filler: int) -> torch.Tensor:
    """Cuts a row into tiles: [B, T] -> [B, tiles, tile], the last tile filled up."""
    short = -row.shape[1] % tile
    return torch.nn.functional.pad(row, (0, short), value=filler).unflatten(1, (-1, tile))


def _tiles(layout: Layout, tile: int, window: int | None, chunk: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tells which tiles may hold an allowed pair, and which hold allowed pairs only; both bool [B, QT, KT]. The first may say yes
    too often, the second no too often: that costs time, never a result."""
    noisy, valid = layout.noisy.bool(), layout.valid
    clean_tokens, noisy_tokens = valid & ~noisy, valid & noisy
    order = layout.position if layout.context == "causal" else layout.block
    clean_order = _Bounds.over(order, clean_tokens, tile)
    clean_block = _Bounds.over(layout.block, clean_tokens, tile)
    noisy_block = _Bounds.over(layout.block, noisy_tokens, tile)
    position, document = _Bounds.over(layout.position, valid, tile), _Bounds.over(layout.document, valid, tile)

    clean_clean = clean_order.keys().least <= clean_order.queries().greatest
    noisy_clean = clean_block.keys().least < noisy_block.queries().greatest
    noisy_noisy = noisy_block.keys().meets(noisy_block.queries())
    possible = clean_clean | noisy_clean | noisy_noisy
    spans = _span_tiles(layout, clean_tokens, tile, window)
    if spans is not None:
        possible = possible | spans
    possible = possible & document.keys().meets(document.queries())

    all_clean = _tiled(clean_tokens.long(), tile, 0).amin(-1).bool()
    all_noisy = _tiled(noisy_tokens.long(), tile, 0).amin(-1).bool()
    before = clean_order.keys().greatest <= clean_order.queries().least
    before_block = clean_block.keys().greatest < noisy_block.queries().least
    full = (all_clean[:, :, None] & before) | (all_noisy[:, :, None] & before_block)
    one_document = document.queries().is_one() & document.keys().is_one()
    full = full & all_clean[:, None, :] & one_document & document.keys().meets(document.queries())

    if window is not None:
        within = position.keys().greatest > position.queries().least - window
        if spans is not None and layout.image_attention in BEYOND_WINDOW:
            within = within | spans
        possible = possible & within
        full = full & (position.keys().least > position.queries().greatest - window)
    if chunk is not None:
        chunks = _Bounds.over(torch.div(layout.position, chunk, rounding_mode="floor"), valid, tile)
        possible = possible & chunks.keys().meets(chunks.queries())
        full = full & chunks.queries().is_one() & chunks.keys().is_one() & chunks.keys().meets(chunks.queries())
    # A padding token sees itself.
    pads = _tiled((~valid).long(), tile, 0).amax(-1).bool()
    possible = possible | torch.diag_embed(pads)
    return possible, full & possible


def _span_tiles(layout: Layout, clean_tokens: torch.Tensor, tile: int, window: int | None) -> torch.Tensor | None:
    """Tells which tiles may hold a pair of tokens of one span, bool [B, QT, KT]; None where spans have no part in the rule."""
    if layout.span is None or layout.image_attention == "causal":
        return None
    if layout.image_attention == "runs_sliding" and window is None:
        return None
    span = _Bounds.over(layout.span, clean_tokens & (layout.span > 0), tile)
    return span.keys().meets(span.queries())


def bucket(tokens: int) -> int:
    """Gives the row length that a GPU step is padded to: a multiple of the tile, eight of them in each doubling, so that compiled
    kernels are reused at the price of one padding token in nine at most."""
    step = max(FLEX_TILE, 2 ** max((tokens - 1).bit_length() - 4, 0))
    return -(-tokens // step) * step
