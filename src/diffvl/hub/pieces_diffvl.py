"""What goes through the trunk together while a batch is decoded, and what of it is asked for.

Shapes: B batch, n tokens of a piece, M asked tokens.
"""

from dataclasses import dataclass

import torch

from .layout_diffvl import Layout


@dataclass
class Piece:
    """Tokens that go through the trunk together, each [B, n]: ids, their layout, and the image token that each shows or -1 (None
    where none does)."""

    ids: torch.Tensor
    rows: Layout
    image: torch.Tensor | None

    def joined(self, after: "Piece") -> "Piece":
        image = None
        if self.image is not None or after.image is not None:
            images = [torch.full_like(one.ids, -1) if one.image is None else one.image for one in (self, after)]
            image = torch.cat(images, 1)
        return Piece(torch.cat([self.ids, after.ids], 1), self.rows.joined(after.rows), image)

    def behind(self, count: int) -> "Piece":
        """Without the first so many tokens."""
        rows = {name: row[:, count:] for name, row in self.rows.rows.items()}
        image = None if self.image is None else self.image[:, count:]
        return Piece(self.ids[:, count:], Layout(**rows, context=self.rows.context), image)

    def selected(self, keep: torch.Tensor) -> "Piece":
        return Piece(self.ids[keep], rows_of(self.rows, keep), None if self.image is None else self.image[keep])


def rows_of(layout: Layout, keep: torch.Tensor) -> Layout:
    """Some samples of a layout."""
    return Layout(**{name: row[keep] for name, row in layout.rows.items()}, context=layout.context)


@dataclass(frozen=True)
class Places:
    """Tokens of a piece, in row-major order: their samples and their places in the piece, int64 [M]."""

    sample: torch.Tensor
    place: torch.Tensor

    @classmethod
    def of(cls, mask_Bn: torch.Tensor, count: int) -> "Places":
        """Where a mask of `count` True is True. Knowing the count is what spares the device from being waited for."""
        found = torch.argsort((~mask_Bn).flatten().to(torch.int8), stable=True)[:count]
        width = mask_Bn.shape[1]
        return cls(torch.div(found, width, rounding_mode="floor"), found % width)

    @classmethod
    def last_of(cls, rows: Layout) -> "Places":
        """The last valid token of every sample; where a sample has none, its first."""
        index = torch.arange(1, rows.valid.shape[1] + 1, device=rows.valid.device)
        last = (index * rows.valid).max(1).values - 1
        return cls(torch.arange(len(last), device=last.device), last.clamp_min(0))

    def flat(self, width: int, first: int = 0) -> torch.Tensor:
        """Indices into the flattened tokens of a piece of this width, in which these tokens' own piece begins at `first`."""
        return self.sample * width + first + self.place
