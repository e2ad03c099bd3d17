"""How images are cut before a tower of ours sees them, as a section of a recipe: `prepare.tiling`, and `tiling` of a stage.

`settings` is what a checkpoint's configuration and processor hold of it; the hub's `tiling_diffvl` says what is done by it.
"""

import itertools
import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from diffvl.config.section import Section

MAX_TILES = 9  # SDAR-VL's
LARGEST = 20  # tiles a side
_GRID = re.compile(r"(\d{1,3})x(\d{1,3})(?:-(\d{1,3})x(\d{1,3}))?")


class NoTiling(Section):
    """One square an image, whatever its shape."""

    kind: Literal["none"] = "none"

    @property
    def settings(self) -> None:
        return None


class AnyresTiling(Section):
    """A view of the whole image and a grid of tiles of the same size: `anyres_max_N` of LLaVA-OneVision."""

    kind: Literal["anyres"] = "anyres"
    grids: list[str] = Field(
        default=["1x1-6x6"],
        min_length=1,
        description="ROWSxCOLUMNS of tiles; each image gets the one that keeps most of its pixels. 1x1-6x6 means all between",
    )
    max_tiles: int = Field(
        default=MAX_TILES, ge=1, description="a grid with more image tokens than this many tiles have is reduced to as many"
    )

    @field_validator("grids")
    @classmethod
    def _are_grids(cls, grids: list[str]) -> list[str]:
        for text in grids:
            _pairs(text)
        return grids

    @model_validator(mode="after")
    def _maximum_has_effect(self) -> Self:
        largest = max(rows * columns for rows, columns in self.pairs)
        if self.max_tiles != MAX_TILES and self.max_tiles > largest:
            raise ValueError(f"max_tiles ({self.max_tiles}) has no effect: the largest of grids has {largest} tiles")
        return self

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Rows and columns of every grid, in order, each once."""
        return list(dict.fromkeys(pair for text in self.grids for pair in _pairs(text)))

    @property
    def settings(self) -> dict[str, Any]:
        return {"grids": [list(pair) for pair in self.pairs], "max_tiles": self.max_tiles}


def _pairs(text: str) -> list[tuple[int, int]]:
    """Rows and columns of the grids that one entry of `grids` names. Raises ValueError where it names none."""
    found = _GRID.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no grid: expected ROWSxCOLUMNS like 2x3, or a range of them like 1x1-6x6")
    row, column = int(found[1]), int(found[2])
    last_row, last_column = int(found[3] or row), int(found[4] or column)
    if not (1 <= row <= last_row <= LARGEST and 1 <= column <= last_column <= LARGEST):
        raise ValueError(f"{text!r}: a grid has 1 to {LARGEST} rows and columns, and a range goes from the smaller to the larger")
    return list(itertools.product(range(row, last_row + 1), range(column, last_column + 1)))


Tiling = Annotated[NoTiling | AnyresTiling, Field(discriminator="kind")]
