"""How sure a figure is: paired bootstrap over records.

The answers of one record are not independent, so records are drawn, with all their answers, and the same draws serve every run
that is compared. A difference between two runs is then a difference on the same records, and what is hard for both cancels out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

DRAWS = 10_000
LEVEL = 0.95
_MOST = 4_000_000  # indices that are held at once


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds it at `LEVEL`."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    values: Sequence[Sequence[float]], records: Sequence[int], seed: int = 0, draws: int = DRAWS
) -> tuple[list[Interval], list[Interval]]:
    """Computes the mean of every run over all answers, and its difference from the first run's.

    Args:
        values: of each run a figure for each answer, in one order. records: the record of each answer.
    Returns:
        the means, and the differences; that of the first run is 0.
    """
    table = numpy.asarray(values, dtype=float)
    numbers = numpy.unique(numpy.asarray(records), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    answers_N = numpy.bincount(numbers, minlength=count).astype(float)
    sums_RN = numpy.stack([numpy.bincount(numbers, weights=row, minlength=count) for row in table])
    drawn_RB = _drawn_means(sums_RN, answers_N, numpy.random.default_rng(seed), draws)
    mean_R = sums_RN.sum(1) / answers_N.sum()
    means = [_interval(float(mean), drawn) for mean, drawn in zip(mean_R, drawn_RB, strict=True)]
    differences = [_interval(float(mean - mean_R[0]), drawn - drawn_RB[0]) for mean, drawn in zip(mean_R, drawn_RB, strict=True)]
    return means, differences


def _drawn_means(
    sums_RN: numpy.ndarray, answers_N: numpy.ndarray, generator: numpy.random.Generator, draws: int
) -> numpy.ndarray:
    """Draws as many records as there are, again and again; gives the means of every run, [R, draws]."""
    count, parts = len(answers_N), []
    at_once = max(1, _MOST // count)
    for start in range(0, draws, at_once):
        chosen_BN = generator.integers(count, size=(min(at_once, draws - start), count))
        answers_B = answers_N[chosen_BN].sum(1)
        parts.append(numpy.stack([row[chosen_BN].sum(1) / answers_B for row in sums_RN]))
    return numpy.concatenate(parts, 1)


def _interval(value: float, drawn: numpy.ndarray) -> Interval:
    rest = (1 - LEVEL) / 2
    low, high = numpy.quantile(drawn, [rest, 1 - rest])
    return Interval(value, float(low), float(high))
