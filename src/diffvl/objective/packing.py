"""The streams of several samples -> the rows that go through the trunk: padding squeezed out, samples side by side.

Everything that concerns one sample (grid, noise, who predicts what) is worked out on its own streams, [S, W] with one line a
sample; packing only moves tokens, so that a packed sample has the numbers that it has alone. Isolation is the layout's
`document` row. A sample's clean and noisy streams stand next to each other: attention is local to a sample.

Shapes: S samples, W tokens of a sample's streams, padded; B rows, T tokens of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffvl.hub.layout_diffvl import Layout


@dataclass(frozen=True)
class Packed:
    """layout: of the rows, [B, T]. place [S, W]: where each valid token went, as an index into the flattened rows.
    source [B, T]: where each comes from, as an index into the flattened streams; 0 for padding, which `layout.valid` tells."""

    layout: Layout
    place: torch.Tensor
    source: torch.Tensor

    def moved(self, stream_SW: torch.Tensor, filler: int) -> torch.Tensor:
        """Gives a value of each stream token, [S, W] (or several, [A, S, W]) -> of each row token, [B, T] ([A, B, T]); padding
        gets `filler`."""
        return torch.where(self.layout.valid, stream_SW.flatten(-2)[..., self.source], filler)


def pack(streams: Layout, row_S: torch.Tensor, length_for: Callable[[int], int] = int) -> Packed:
    """Moves valid tokens into rows.

    Args:
        streams: layout of the samples' streams, [S, W].
        row_S: the row of each sample, rising from 0 without gaps.
        length_for: tokens of the longest row -> T, where rows must have certain lengths; default: no more than needed.
    """
    counts = streams.valid.sum(1)
    rows = int(row_S[-1]) + 1
    filled = torch.zeros(rows, dtype=counts.dtype, device=counts.device).index_add_(0, row_S, counts)
    length = length_for(int(filled.max()))
    before = counts.cumsum(0) - counts - (filled.cumsum(0) - filled)[row_S]
    place = (row_S * length + before)[:, None] + streams.valid.cumsum(1) - 1
    source = torch.zeros(rows * length, dtype=torch.long, device=row_S.device)
    valid = torch.zeros(rows * length, dtype=torch.bool, device=row_S.device)
    at = place[streams.valid]
    source[at] = streams.valid.flatten().nonzero()[:, 0]
    valid[at] = True
    source, valid = source.view(rows, length), valid.view(rows, length)
    document = torch.arange(len(row_S), device=row_S.device)[:, None].expand_as(streams.document)
    moved = {name: row.flatten()[source] for name, row in {**streams.rows, "document": document}.items()}
    moved = {name: torch.where(valid, row, torch.zeros_like(row)) for name, row in moved.items()}
    return Packed(streams.with_rows(moved), place, source)
