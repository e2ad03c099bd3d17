"""Samples that join a batch which is being decoded, at a block border, or between two rounds of drafts.

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
from diffvl.hub.cache_diffvl import BlockCache
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.drafts_diffvl import Drafter
from diffvl.hub.judge_diffvl import Drafts
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


def join_drafters(first: Drafter, second: Drafter) -> None:
    """Adds the samples of `second` behind those of `first`, between two rounds; `second` is used up. The blocks of the decoders
    are not what is being decoded, and images are all in the cache."""
    one, other = first.decoder, second.decoder
    one.committed, one.prompt = _prefixes(one.committed, other.committed), _prompts(one.prompt, other.prompt)
    one.committed.has_gaps = True  # of drafts that will not be accepted
    one.block = _blocks(one.block, other.block)
    first.at_B, first.known_B = _stacked(first.at_B, second.at_B), _stacked(first.known_B, second.known_B)
    first.last_B, first.live_B = _stacked(first.last_B, second.last_B), _stacked(first.live_B, second.live_B)
    first.drafts = Drafts(**_fields(first.drafts, second.drafts, {}), kept=None)
    first.filled += second.filled
    first.ended += second.ended
    first.has_drafts |= second.has_drafts
    first.answers.live += second.answers.live


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
        without = {one.span is None: one for one in (first, second)}[True]
        filled = replace(without, span=torch.zeros_like(without.block))
        first, second = (filled if one is without else one for one in (first, second))
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
    both = zip((first, second), samples, strict=True)
    return torch.cat([known.new_zeros(count, known.shape[1]) if one is None else one for one, count in both])


# --- what is committed ------------------------------------------------------------------------------------------------------


def _prefixes(first: Prefix, second: Prefix) -> Prefix:
    """Both prefixes, with the tokens of each sample first and padding only behind them. The images are dropped: every token that
    showed one is in the cache."""
    kept = _valid_first(first), _valid_first(second)
    ids, layouts = zip(*(_tokens_at(one, index) for one, index in zip((first, second), kept, strict=True)), strict=True)
    layout = _layouts(layouts[0], layouts[1])
    length = layout.valid.shape[1]
    cache = BlockCache()
    # Layer by layer, so that no more than one of them stands in memory twice. A cache that holds nothing yet has no layers.
    for above, below in zip_longest(first.cache.layers, second.cache.layers):
        known = above if above is not None else below
        states = [
            _layer_at(layer, index, known, len(one.ids), length)
            for layer, index, one in zip((above, below), kept, (first, second), strict=True)
        ]
        cache.add_layer(*(torch.cat(both) for both in zip(*states, strict=True)))
        for layer in (above, below):
            if layer is not None:
                layer.keys = layer.values = layer.room = None
    return Prefix(_stacked(ids[0], ids[1]), layout, cache, {}, None, has_gaps=not bool(layout.valid.all()))


def _valid_first(prefix: Prefix) -> torch.Tensor | None:
    """Which cached tokens stay, in which order, [B, C]: the valid ones of each sample first, as many as the longest has. None for
    all as they are."""
    if not prefix.has_gaps:
        return None
    valid = prefix.layout.valid
    longest = int(valid.sum(1).max())
    return torch.argsort((~valid).to(torch.int8), dim=1, stable=True)[:, :longest]


def _tokens_at(prefix: Prefix, index: torch.Tensor | None) -> tuple[torch.Tensor, Layout]:
    if index is None:
        return prefix.ids, prefix.layout
    rows = {name: row.gather(1, index) for name, row in prefix.layout.rows.items()}
    return prefix.ids.gather(1, index), prefix.layout.with_rows(rows)


def _layer_at(layer: Any, index: torch.Tensor | None, known: Any, samples: int, length: int) -> list[torch.Tensor]:
    """Keys and values [B, H, length, head] of a layer's tokens at `index`, filled up with zeros. A layer that holds nothing yet
    (None) is all zeros, in the form of one that is known."""
    if layer is None:
        return [one.new_zeros(samples, one.shape[1], length, one.shape[3]) for one in (known.keys, known.values)]
    found = [layer.keys, layer.values]
    if index is not None:
        found = [one.gather(2, index[:, None, :, None].expand(-1, one.shape[1], -1, one.shape[3])) for one in found]
    return [pad(one, (0, 0, 0, length - one.shape[2])) for one in found]
