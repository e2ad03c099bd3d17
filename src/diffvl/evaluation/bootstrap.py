"""How sure a figure is: paired bootstrap over records.

The answers of one record are not independent, so records are drawn, with all their answers, and the same draws serve every run
that is compared. A difference between two runs is then a difference on the same records, and what is hard for both cancels out.

Records that are all alike give draws that are all alike, from which no interval follows; there Wilson's bound on the share of
records that are otherwise gives it. A handful of records has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy

DRAWS = 10_000
LEVEL = 0.95
FEWEST = 5  # records that an interval is made of
_ALIKE = 1e-9  # what rounding leaves between figures that are the same
_MOST = 4_000_000  # indices that are held at once


@dataclass(frozen=True)
class Interval:
    """A figure and the interval that holds it at `LEVEL`; low and high are None where the records are too few for one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def bootstrap(
    values: Sequence[Sequence[float]], records: Sequence[int], seed: int = 0, draws: int = DRAWS
) -> tuple[list[Interval], list[Interval]]:
    """Computes the mean of every run over all answers, and its difference from the first run's.

    Args:
        values: of each run a figure from 0 to 1 for each answer, in one order. records: the record of each answer.
    Returns:
        the means, and the differences; that of the first run, from itself, is exactly 0.
    """
    table = numpy.asarray(values, dtype=float)
    numbers = numpy.unique(numpy.asarray(records), return_inverse=True)[1]
    count = int(numbers.max()) + 1
    answers_N = numpy.bincount(numbers, minlength=count).astype(float)
    sums_RN = numpy.stack([numpy.bincount(numbers, weights=row, minlength=count) for row in table])
    drawn_RB = _drawn_means(sums_RN, answers_N, numpy.random.default_rng(seed), draws)
    mean_R = sums_RN.sum(1) / answers_N.sum()
    runs = list(zip(mean_R.tolist(), drawn_RB, sums_RN / answers_N, strict=True))
    means = [_interval(mean, drawn_B, own_N, 0.0) for mean, drawn_B, own_N in runs]
    first, first_B, first_N = runs[0]
    others = [_interval(mean - first, drawn_B - first_B, own_N - first_N, -1.0) for mean, drawn_B, own_N in runs[1:]]
    return means, [Interval(0.0, 0.0, 0.0), *others]


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


def _interval(value: float, drawn_B: numpy.ndarray, own_N: numpy.ndarray, least: float) -> Interval:
    """Gives a figure its interval.

    Args:
        drawn_B: the figure in each draw. own_N: that of each record alone. least: the least that it can be; the most is 1.
    """
    rest = (1 - LEVEL) / 2
    if len(own_N) < FEWEST:
        return Interval(value)
    if numpy.ptp(own_N) < _ALIKE:
        unseen = _share_unseen(len(own_N), NormalDist().inv_cdf(1 - rest))
        return Interval(value, value - unseen * (value - least), value + unseen * (1 - value))
    low, high = numpy.quantile(drawn_B, [rest, 1 - rest])
    return Interval(value, float(low), float(high))


def _share_unseen(count: int, z: float) -> float:
    """The largest share of other records of which `count` draws may hold none: Wilson's upper bound for none of them."""
    return z**2 / (count + z**2)
