"""Samples that join a batch which is being decoded, at a block border.

What a `BlockDecoder` holds between two blocks is rows: the cache, the layout of what is in it, the open blocks, what waits to be
committed. Two decoders become one by putting their rows on top of each other and filling up with padding. Invariant: padding is
not valid in the layout, so nobody sees it, and what a sample answers does not depend on who joined. Each join moves the
padding in the cache to its end and drops what no sample needs, so a batch that is never empty does not grow for ever.

Shapes: B batch, n and C tokens, A rotary axes, H heads.
"""

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch.nn.functional import pad

from diffvl.hub.blocks_diffvl import OpenBlock, Piece, Prefix, Prompt
from diffvl.hub.cache_diffvl import BlockCache, BufferLayer
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.layout_diffvl import Layout, Rope


def join(first: BlockDecoder, second: BlockDecoder) -> None:
    """Adds the samples of `second`, of which nothing waits to be committed, behind those of `first`; `second` is used up. No open
    block may show an image: the rows of the images are known to the decoder that took their prompt in, and to no other."""
    assert second.waiting is None and not first.block.shows_image and not second.block.shows_image
    both = len(first.block.counts), len(second.block.counts)
    first.committed = _prefixes(first.committed, second.committed)
    if first.waiting is not None:
        first.committed.has_gaps = True  # from the next commit on: for the new samples it is padding
        first.waiting = _with_padding(first.waiting, both[1])
    first.prompt = _prompts(first.prompt, second.prompt)
    first.block = _blocks(first.block, second.block)
    first.last_logits = _logits(first.last_logits, second.last_logits, both)


def _stacked(first: torch.Tensor, second: torch.Tensor, fill: int = 0) -> torch.Tensor:
    """[B, n] on [B', m] -> [B + B', max(n, m)]; [B] on [B'] -> [B + B']."""
    if first.dim() == 1:
        return torch.cat([first, second])
    width = max(first.shape[1], second.shape[1])
    return torch.cat([pad(one, (0, width - one.shape[1]), value=fill) for one in (first, second)])


def _ropes(first: Rope, second: Rope) -> Rope:
    if first.table is None or second.table is None or first.length_B is None or second.length_B is None:
        return first
    tables = [_stacked(one, other) for one, other in zip(first.table, second.table, strict=True)]
    return Rope(torch.stack(tables), torch.cat([first.length_B, second.length_B]), first.first)


def _layouts(first: Layout, second: Layout) -> Layout:
    """Layouts on top of each other; what fills them up is not valid."""
    if (first.span is None) != (second.span is None):
        first, second = (
            one if one.span is not None else replace(one, span=torch.zeros_like(one.block)) for one in (first, second)
        )
    return first.with_rows({name: _stacked(row, second.rows[name]) for name, row in first.rows.items()})


def _with_padding(piece: Piece, samples: int) -> Piece:
    """The piece with further samples, that have no tokens in it."""
    assert piece.image_index is None
    rows = {name: pad(row, (0, 0, 0, samples)) for name, row in piece.layout.rows.items()}
    ids, rope_ids = (pad(one, (0, 0, 0, samples)) for one in (piece.ids, piece.rope_ids))
    return Piece(ids, piece.layout.with_rows(rows), rope_ids, None)


def _fields(first: Any, second: Any, fill: dict[str, int]) -> dict[str, torch.Tensor]:
    """The tensors of two objects of a class on top of each other, but for spans."""
    tensors = {name: value for name, value in vars(first).items() if isinstance(value, torch.Tensor) and "span" not in name}
    return {name: _stacked(value, getattr(second, name), fill.get(name, 0)) for name, value in tensors.items()}


def _spans(first: torch.Tensor | None, second: torch.Tensor | None, like: tuple[torch.Tensor, torch.Tensor]) -> Any:
    if first is None and second is None:
        return None
    found = [torch.zeros_like(own) if one is None else one for one, own in zip((first, second), like, strict=True)]
    return _stacked(found[0], found[1])


def _prompts(first: Prompt, second: Prompt) -> Prompt:
    span = _spans(first.span, second.span, (first.ids, second.ids))
    return replace(first, **_fields(first, second, {"image_index": -1}), span=span, rope=_ropes(first.rope, second.rope))


def _blocks(first: OpenBlock, second: OpenBlock) -> OpenBlock:
    return replace(
        first,
        **_fields(first, second, {}),
        span_BD=_spans(first.span_BD, second.span_BD, (first.ids_BD, second.ids_BD)),
        counts=first.counts + second.counts,
        rope=_ropes(first.rope, second.rope),
        is_whole=first.is_whole and second.is_whole,
    )


def _logits(first: torch.Tensor | None, second: torch.Tensor | None, samples: tuple[int, int]) -> torch.Tensor | None:
    """What the last committed tokens predict; nothing where a whole prompt stands in the first open block."""
    known = first if first is not None else second
    if known is None:
        return None
    rows = [
        known.new_zeros(count, known.shape[1]) if one is None else one
        for one, count in zip((first, second), samples, strict=True)
    ]
    return torch.cat(rows)


# --- what is committed ------------------------------------------------------------------------------------------------------


def _prefixes(first: Prefix, second: Prefix) -> Prefix:
    """Both prefixes, with the tokens of each sample first and padding only behind them. The images are dropped: every token that
    showed one is in the cache."""
    kept = [_without_padding(one) for one in (first, second)]
    ids = [one.ids if index is None else one.ids.gather(1, index) for one, index in zip((first, second), kept, strict=True)]
    layouts = [
        one.layout
        if index is None
        else one.layout.with_rows({name: row.gather(1, index) for name, row in one.layout.rows.items()})
        for one, index in zip((first, second), kept, strict=True)
    ]
    layout = _layouts(layouts[0], layouts[1])
    cache = _caches((first.cache, second.cache), kept, (len(first.ids), len(second.ids)), layout.valid.shape[1])
    has_gaps = not bool(layout.valid.all())
    return Prefix(_stacked(ids[0], ids[1]), layout, cache, {}, None, has_gaps)


def _without_padding(prefix: Prefix) -> torch.Tensor | None:
    """Which cached tokens stay, in which order: [B, C'], the valid ones of each sample first; None for all as they are."""
    if not prefix.has_gaps:
        return None
    valid = prefix.layout.valid
    longest = int(valid.sum(1).max()) if valid.numel() else 0
    return torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, :longest]


def _caches(caches: tuple[Any, Any], kept: list[torch.Tensor | None], samples: tuple[int, int], length: int) -> BlockCache:
    """One cache of `length` tokens for both batches; one that holds nothing yet has no layers. Layer by layer, so that no more than
    one stands in memory twice."""
    joined = BlockCache()
    for layers in zip_longest(*(cache.layers for cache in caches)):
        known = next(layer for layer in layers if layer is not None)
        fresh = BufferLayer(joined)
        fresh.keys, fresh.values = (
            torch.cat(
                [
                    _states(
                        None if layer is None else getattr(layer, name),
                        index,
                        (count, *getattr(known, name).shape[1:]),
                        length,
                        known,
                    )
                    for layer, index, count in zip(layers, kept, samples, strict=True)
                ]
            )
            for name in ("keys", "values")
        )
        fresh.dtype, fresh.device, fresh.is_initialized = known.dtype, known.device, True
        joined.layers.append(fresh)
        for layer in layers:
            if layer is not None:
                layer.keys = layer.values = layer.room = None
    return joined


def _states(
    states: torch.Tensor | None, index: torch.Tensor | None, shape: tuple[int, ...], length: int, like: Any
) -> torch.Tensor:
    """Keys or values [B, H, C, head] -> those at `index`, filled up to `length`."""
    if states is None:
        return torch.zeros(shape[0], shape[1], length, shape[3], dtype=like.dtype, device=like.device)
    if index is not None:
        states = states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
    return pad(states, (0, 0, 0, length - states.shape[2]))
