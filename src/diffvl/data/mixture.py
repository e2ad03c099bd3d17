"""Several data sets as one, and which of them each draw comes from.

Weights are shares of the rows, and exact: in every cycle of draws each source has as many as its weight says, spread evenly over
the cycle. Which draw comes from which source, and which of its rows it is, follows from the seed and the number of the draw, so
that a mix has no state to lose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from diffvl.data.records import Record
from diffvl.data.sample_dataset import SampleDataset
from diffvl.errors import ConfigError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.seeding import sample_generator

_LONGEST_CYCLE = 1_000_000  # draws
# What stands in the place of a sample's index, so that no two draws of a run have one generator.
_PATTERN, _SOURCES = -2, -16


@dataclass(frozen=True)
class Shares:
    """counts: draws of each source in a cycle, all at least 1."""

    counts: tuple[int, ...]

    @property
    def cycle(self) -> int:
        return sum(self.counts)

    def source_of(self, draw: int, seed: int, stream: int = 0, streams: int = 1) -> tuple[int, int]:
        """Gives the source of a draw, and how many draws of that source came before it. Each of several streams of draws has a
        pattern of its own."""
        cycle, inside = divmod(draw, self.cycle)
        sources, ranks = _pattern(self, seed, cycle * streams + stream)
        source = int(sources[inside])
        return source, cycle * self.counts[source] + int(ranks[inside])

    def told(self, source: int) -> str:
        """Gives a source's share in words."""
        return f"{self.counts[source]} of {self.cycle}"


def shares_of(weights: Sequence[float]) -> Shares:
    """Turns weights into whole draws of a cycle. Raises ConfigError for weights that no short cycle meets."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * math.lcm(*(one.denominator for one in exact))) for weight in exact]
    shares = Shares(tuple(number // math.gcd(*whole) for number in whole))
    if shares.cycle > _LONGEST_CYCLE:
        raise ConfigError(
            f"data.train: the weights {', '.join(f'{weight:g}' for weight in weights)} are met exactly in a cycle of "
            f"{shares.cycle} rows, and at most {_LONGEST_CYCLE} are allowed: give them fewer digits"
        )
    return shares


@lru_cache(maxsize=2)  # a step may reach over the end of a cycle
def _pattern(shares: Shares, seed: int, cycle: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Gives the source of each draw of a cycle, and the number of the draw among those of its source; both [cycle]."""
    shift = torch.rand(len(shares.counts), generator=sample_generator(seed, cycle, _PATTERN), dtype=torch.float64).tolist()
    moments = [(numpy.arange(count) + start) / count for count, start in zip(shares.counts, shift, strict=True)]
    order = numpy.argsort(numpy.concatenate(moments), kind="stable")
    sources = numpy.repeat(numpy.arange(len(shares.counts)), shares.counts)[order]
    ranks = numpy.concatenate([numpy.arange(count) for count in shares.counts])[order]
    return sources, ranks


class MixOrder:
    """Which row of a mixture each draw is: of its source the next one in the source's own order, a permutation by seed and
    epoch of that source."""

    def __init__(self, sizes: Sequence[int], shares: Shares, seed: int) -> None:
        """`sizes`: rows of each source."""
        self._sizes, self._shares, self._seed = tuple(sizes), shares, seed
        self._starts = [sum(self._sizes[:source]) for source in range(len(self._sizes))]
        self._current: dict[int, tuple[int, torch.Tensor]] = {}  # by source: its epoch and the order of that

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Gives the rows, as places in the mixture, of the draws from `start` to `stop`; int64."""
        return torch.tensor([self._row(draw) for draw in range(start, stop)], dtype=torch.int64)

    def _row(self, draw: int) -> int:
        source, before = self._shares.source_of(draw, self._seed)
        epoch, inside = divmod(before, self._sizes[source])
        if self._current.get(source, (-1,))[0] != epoch:
            generator = sample_generator(self._seed, epoch, _SOURCES - source)
            self._current[source] = epoch, torch.randperm(self._sizes[source], generator=generator)
        return self._starts[source] + int(self._current[source][1][inside])


class Mixture(Dataset):
    """Data sets one after the other: their places and the indices of their samples are counted through."""

    def __init__(self, parts: Sequence[SampleDataset], shares: Shares | None) -> None:
        self.parts, self.shares = tuple(parts), shares
        self._ends = numpy.cumsum([len(part) for part in self.parts])

    @property
    def processor(self) -> DiffVLProcessor:
        return self.parts[0].processor

    @property
    def path(self) -> Any:
        """Gives the path of the first source, for a message that names one."""
        return self.parts[0].path

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> Any:
        part, inside = self._part(row)
        return part[inside]

    def record(self, place: int) -> Record:
        """Gives the place-th record of a mixture that is not packed."""
        part, inside = self._part(place)
        return part.record(inside)

    def place_of(self, index: int) -> str:
        """Tells where a sample's record stands, by the sample's index."""
        return next(part for part in reversed(self.parts) if part.offset <= index).place_of(index)

    def packed(self, row_length: int, seed: int) -> "Mixture":
        """Packs each source by itself, so that the shares are of rows."""
        return Mixture([part.packed(row_length, seed) for part in self.parts], self.shares)

    def order(self, seed: int) -> MixOrder | None:
        """Gives the order of the draws, None where each record is drawn once an epoch."""
        return None if self.shares is None else MixOrder([len(part) for part in self.parts], self.shares, seed)

    def _part(self, row: int) -> tuple[SampleDataset, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(numpy.searchsorted(self._ends, row, side="right"))
        return self.parts[number], row - int(self._ends[number - 1] if number else 0)
