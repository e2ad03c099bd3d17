"""Tiles: an image as a view of the whole and a grid of tiles, as LLaVA-NeXT and LLaVA-OneVision cut it ("anyres").

The grid that keeps most of the image's pixels is filled with the image at its own aspect, black at the edges, and cut into tiles
of the size that the tower sees. In the text stand the tokens of the whole view, then those of the grid row by row: what was black
is cut off again, what is more than `max_tiles` tiles is reduced bilinearly, and every row ends with one learned newline. Where
several images stand in one question, each is one view, made a square with the mean colour at its edges, and one newline.

So the tokens of an image follow from its size. The same figures say where its features are cut: both come from `Tiling`.

Shapes: N images, T views of an image (the whole first), P tokens of a view, H trunk width, S pixels per side of a view.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.image_processing_utils import select_best_resolution

from .seen_diffvl import Size

NUM_TILES = "num_tiles"  # a caller may leave it out if each image stands alone in its question
TILED_INPUTS = ("pixel_values", "image_sizes", NUM_TILES)
TOLERANCE = 1.1  # a side may be this much longer than `max_tiles` tiles make it before the grid is reduced
MOST_VIEWS = 64  # that the tower sees at once: what it remembers of its layers is bounded


@dataclass(frozen=True)
class Tiling:
    """How images are cut. side: tokens per side of a view; pixels: per side of a view. grids: (rows, columns); of two that keep
    as much of an image, the smaller one is taken. max_tiles: how many tiles' tokens a grid may have."""

    side: int
    pixels: int
    grids: tuple[tuple[int, int], ...]
    max_tiles: int

    @classmethod
    def of(cls, settings: dict[str, Any], side: int, pixels: int) -> "Tiling":
        """As configurations hold it: `grids` and `max_tiles`."""
        grids = tuple((int(rows), int(columns)) for rows, columns in settings["grids"])
        return cls(side, pixels, grids, settings["max_tiles"])

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the tiles of an image."""
        canvases = [(rows * self.pixels, columns * self.pixels) for rows, columns in self.grids]
        height, width = select_best_resolution(size, canvases)
        return height // self.pixels, width // self.pixels

    def margins(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tokens at each edge of the grid that show no more than what was added to fill it."""
        (height, width), (rows, columns) = size, self.grid(size)
        full_height, full_width = rows * self.side, columns * self.side
        if width / height > full_width / full_height:
            return (full_height - int(round(height * (full_width / width), 7))) // 2, 0
        return 0, (full_width - int(round(width * (full_height / height), 7))) // 2

    def shape(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tokens that are left of the grid, newlines apart."""
        rows, columns = self.grid(size)
        top, left = self.margins(size)
        height, width = rows * self.side - 2 * top, columns * self.side - 2 * left
        ratio = math.sqrt(height * width / (self.max_tiles * self.side**2))
        if ratio <= TOLERANCE:
            return height, width
        return max(int(height // ratio), 1), max(int(width // ratio), 1)

    def views(self, size: Size, alone: bool = True) -> int:
        """How many views the tower sees of an image."""
        return 1 + math.prod(self.grid(size)) if alone else 1

    def tokens(self, size: Size, alone: bool = True) -> int:
        """Tokens of an image. alone: whether it is the only one of its question."""
        height, width = self.shape(size) if alone else (1, 0)
        return self.side**2 + height * (width + 1)

    def packed(self, views: torch.Tensor, size: Size, newline: torch.Tensor) -> torch.Tensor:
        """The tokens of an image, [tokens, H].

        Args:
            views: what connector and tower made of its views, [T, P, H]. newline: [H].
        """
        newline = newline.to(views.dtype)
        if len(views) == 1:
            return torch.cat([views[0], newline[None]])
        rows, columns = self.grid(size)
        grid = views[1:].view(rows, columns, self.side, self.side, -1).permute(4, 0, 2, 1, 3)
        grid = grid.flatten(3, 4).flatten(1, 2)
        top, left = self.margins(size)
        grid = grid[:, top : grid.shape[1] - top, left : grid.shape[2] - left]
        if grid.shape[1:] != self.shape(size):
            grid = functional.interpolate(grid[None], self.shape(size), mode="bilinear")[0]
        ended = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], -1)
        return torch.cat([views[0], ended.flatten(1).T])


def views_of(tiling: Tiling, pixels: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Size], list[int]]:
    """The views of all images in order, [all, 3, S, S], the images' sizes, and how many views each has.

    Args:
        pixels: pixel_values [N, T, 3, S, S], filled up with views that nobody sees; image_sizes [N, 2]; and, unless each image
            has its tiles, num_tiles [N].
    Raises:
        ValueError: if these do not fit together.
    """
    shown = pixels["pixel_values"]
    if shown.dim() != 5:
        raise ValueError(f"pixel_values have the shape {tuple(shown.shape)}, expected [images, views, 3, height, width]")
    sizes: list[Size] = [(int(height), int(width)) for height, width in pixels["image_sizes"].tolist()]
    told = pixels.get(NUM_TILES)
    counts = [tiling.views(size) for size in sizes] if told is None else told.tolist()
    for size, count in zip(sizes, counts, strict=True):
        if count not in (1, tiling.views(size)) or count > shown.shape[1]:
            raise ValueError(
                f"{min(count, shown.shape[1])} views of an image of {size[0]} x {size[1]} pixels, expected {tiling.views(size)}, "
                "or 1 for an image of several in one question"
            )
    return torch.cat([image[:count] for image, count in zip(shown, counts, strict=True)]), sizes, counts


def tiled_rows(
    tiling: Tiling, pixels: dict[str, torch.Tensor], newline: torch.Tensor, look: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The rows of all images, [all, H], and how many each has.

    Args:
        pixels: see `views_of`. look: views [n, 3, S, S] -> their tokens [n, P, H]; called once for up to MOST_VIEWS views.
    Raises:
        ValueError: see `views_of`.
    """
    views, sizes, counts = views_of(tiling, pixels)
    seen = torch.cat([look(part) for part in views.split(MOST_VIEWS)]).split(counts)
    rows = [tiling.packed(own, size, newline) for own, size in zip(seen, sizes, strict=True)]
    return torch.cat(rows), tuple(len(own) for own in rows)
