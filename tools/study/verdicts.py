"""What the papers claim, and what the figures say of it: each verdict follows from a rule.

The rule. Each start gives one figure, larger where the claim fits better: a difference or a ratio of two runs of one seed from
the same align checkpoint, which share their samples. A seed without such a pair gives the figure of two runs from two starts,
whose difference is in it then, and in the interval. From these figures comes their mean with a t interval of 95 %. The claim is
`reproduced` if the whole interval lies above the claim's bound, `refuted` if it lies below it, and otherwise `undecided at this
scale`; so it is with fewer than two figures, and with figures that are all alike, unless they are 0: no spread is no certainty.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tools.study.results import Origin, Result, Sorted, mean_after_start
from tools.study.variants import TWIN

REPRODUCED, REFUTED, UNDECIDED, NOT_RUN = "reproduced", "refuted", "undecided at this scale", "not run"
CLOSE = 0.97  # of the AR twin's exact match: what counts as close to it
KEPT = 0.95  # of the AR twin's exact match, that a way to decode must keep to count as faster
FASTER = 1.8  # times the AR twin's tokens per second: the goal of this project
# Quantiles 0.975 of Student's t, from one degree of freedom on; beyond, the last is a little too wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)

Figure = Callable[[Result, Result], float | None]


@dataclass(frozen=True)
class Claim:
    """One claim. first, second: the variants whose runs `figure` compares. bound: above which it holds. form: how figures are
    written."""

    source: str
    text: str
    first: str
    second: str
    figure: Figure
    bound: float
    form: str = "+.3f"


@dataclass(frozen=True)
class Figured:
    """One figure. crossed: of runs from two starts."""

    value: float
    crossed: bool = False


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    figures: list[Figured]
    mean: float | None
    low: float | None
    high: float | None
    answer: str


# --- figures of two runs of one seed -----------------------------------------------------------------------------------------


def sooner(one: Result, other: Result) -> float:
    """How much higher exact match is on average over the evaluations."""
    return mean_after_start(one.exact_match) - mean_after_start(other.exact_match)


def better(one: Result, other: Result) -> float:
    """How much higher exact match on the test questions is."""
    return one.own.match - other.own.match


def steadier(one: Result, other: Result) -> float | None:
    """The logarithm of how many times less the gradient's norm varies."""
    if not one.gradient_noise or not other.gradient_noise:
        return None
    return math.log(other.gradient_noise / one.gradient_noise)


def share(one: Result, twin: Result) -> float | None:
    """Exact match over that of the twin."""
    return one.own.match / twin.own.match if twin.own.match else None


def speedup(one: Result, twin: Result) -> float | None:
    """Tokens per second over those of the twin, at the fastest way that keeps `KEPT` of the twin's exact match; 0 where none
    does."""
    if not one.speeds or not twin.own.match:
        return None
    fitting = [one.speeds[name] for name, way in one.ways.items() if way.match >= KEPT * twin.own.match and name in one.speeds]
    return max(fitting, default=0.0) / one.speeds[TWIN]


def speculative_speedup(one: Result, twin: Result) -> float | None:
    """Tokens per second of self-speculation over those of the twin."""
    return one.speeds["speculative"] / one.speeds[TWIN] if "speculative" in one.speeds else None


# --- claims ----------------------------------------------------------------------------------------------------------------


def _of_sdar_vl() -> list[Claim]:
    pairs = {
        ("c", "b"): "asynchronous noise",
        ("d", "c"): "effective mask ratio scaling",
        ("e", "d"): "the progressive Beta curriculum",
        ("e", "b"): "all three together",
    }
    said: dict[str, tuple[Figure, str]] = {
        "converges faster": (sooner, "+.3f"),
        "trains more steadily": (steadier, "+.2f"),
        "ends better": (better, "+.3f"),
    }
    return [
        Claim("SDAR-VL", f"{name}: {text}", *pair, figure, 0.0, form)
        for pair, name in pairs.items()
        for text, (figure, form) in said.items()
    ]


CLAIMS = [
    *_of_sdar_vl(),
    Claim(
        "DiffusionVL",
        f"the ramp with 1/t: close to AR finetuning (at least {CLOSE:g} of its exact match)",
        "g",
        TWIN,
        share,
        CLOSE,
        ".3f",
    ),
    Claim(
        "DiffusionVL",
        f"the ramp with 1/t: decodes faster than AR, at {KEPT:g} of its exact match",
        "g",
        TWIN,
        speedup,
        1.0,
        ".2f",
    ),
    Claim("this project", f"(f) reaches {CLOSE:g} of AR finetuning", "f", TWIN, share, CLOSE, ".3f"),
    Claim(
        "this project",
        f"(f) decodes {FASTER:g} times as fast as AR, at {KEPT:g} of its exact match",
        "f",
        TWIN,
        speedup,
        FASTER,
        ".2f",
    ),
    Claim("this project", "self-speculation of (f) is faster than AR", "f", TWIN, speculative_speedup, 1.0, ".2f"),
    Claim(
        "this project",
        "(h) is right as often as the AR twin",
        "h",
        TWIN,
        share,
        CLOSE,
        ".3f",
    ),
    Claim("this project", "(h) is faster than AR", "h", TWIN, speculative_speedup, 1.0, ".2f"),
]


def judge_all(results: Sorted, crossed: bool = True) -> list[Verdict]:
    """Judges every claim by the seeds that both its variants have. crossed: also by those that have them from two starts only."""
    return [judge_one(claim, results, crossed) for claim in CLAIMS]


def judge_one(claim: Claim, results: Sorted, crossed: bool = True) -> Verdict:
    """Judges a claim, as `judge_all`."""
    return judge(claim, [one for one in figures_of(claim, results) if crossed or not one.crossed])


def figures_of(claim: Claim, results: Sorted) -> list[Figured]:
    """Computes a claim's figure for each seed and start."""
    found = [
        (claim.figure(*pair), crossed) for *pair, crossed in pairs(results.get(claim.first, {}), results.get(claim.second, {}))
    ]
    return [Figured(value, crossed) for value, crossed in found if value is not None]


def pairs(first: Mapping[Origin, Result], second: Mapping[Origin, Result]) -> Iterator[tuple[Result, Result, bool]]:
    """Gives the pairs of each seed from the same start; one from two starts where a seed has none."""
    for seed in sorted({seed for seed, _ in first} & {seed for seed, _ in second}):
        of_first, of_second = (sorted(origin for origin in runs if origin[0] == seed) for runs in (first, second))
        if same := [origin for origin in of_first if origin in of_second]:
            yield from ((first[origin], second[origin], False) for origin in same)
        else:
            yield first[of_first[0]], second[of_second[0]], True


def judge(claim: Claim, figures: Sequence[Figured]) -> Verdict:
    """Applies the rule."""
    if not figures:
        return Verdict(claim, [], None, None, None, NOT_RUN)
    mean, low, high = mean_interval([one.value for one in figures])
    if low is None or high is None:
        return Verdict(claim, list(figures), mean, None, None, UNDECIDED)
    alike = low == high and mean != 0
    answer = UNDECIDED if alike else REPRODUCED if low > claim.bound else REFUTED if high < claim.bound else UNDECIDED
    return Verdict(claim, list(figures), mean, low, high, answer)


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Computes the mean and its 95 % t interval; no interval for fewer than two values."""
    if not values:
        return None, None, None
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    reach = _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach
