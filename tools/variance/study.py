"""How noisy and how biased the gradient is under each way to draw noise and each loss weight.

Two models: `exact` enumerates every mask of a model of a few parameters, so its figures have no sampling error; `sampled` draws
gradients of a small trunk through the objective that is trained. In both the answers are fixed and only the noise is drawn, so
the variance is that of the corruption alone. docs/objective.md says what the tables mean.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from rich.console import Console

from diffvl.bench.machine import describe_machine
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.terminal.bars import spinner_or_line, track
from tools.variance import exact, sampled

ANSWER = 64  # tokens; a multiple of every block size
BLOCK_SIZES = (4, 8, 16)
EXACT_ANSWERS = {4: 64, 8: 64, 16: 16}  # by block size: a block of 16 has 65,536 masks
SAMPLED_ANSWERS = 4
WEIGHTS = ("1/t", "effective", "none")
DRAWS = ("synchronous", "independent", "stratified", "complementary")
SCHEDULES: dict[str, tuple[dict[str, Any], float]] = {  # settings, and the progress at which they are measured
    "uniform": ({"schedule": "uniform"}, 0.0),
    "beta start": ({"schedule": "beta"}, 0.0),
    "beta end": ({"schedule": "beta"}, 1.0),
    "clamp": ({"schedule": "clamp", "t_min": 0.3, "t_max": 0.8}, 0.0),
}
# The opposite mask has ratio 1 - t, and 1 / (1 - t) has no finite second moment where t comes up to 1.
COMPLEMENTARY_BOUND = {"t_max": 0.999}
REFERENCE = 2  # times as many batches for the long-run gradient that bias is measured against


@dataclass(frozen=True)
class Case:
    """What one line of figures is measured for. model: the state of the model."""

    model: str
    block_size: int
    schedule: str
    weight: str
    draws: str

    @property
    def objective(self) -> BlockDiffusionObjective:
        """The objective, with the grid in the answer, so that every block is whole."""
        return build_objective(self.block_size, self.schedule, self.draws, self.weight)

    @property
    def progress(self) -> float:
        return SCHEDULES[self.schedule][1]


@dataclass(frozen=True)
class ExactFigures(Case):
    """A line of the exact table. The first three as in `exact.Moments`, of the gradient; masked_share, blocks_without_mask: as in
    `exact.Estimator`."""

    noise_to_signal: float
    scale: float
    cosine: float
    loss_noise_to_signal: float
    masked_share: float
    blocks_without_mask: float


@dataclass(frozen=True)
class SampledFigures(Case):
    """A line of the sampled table. As `ExactFigures`, with the standard error of noise_to_signal, and the tokens that go through
    the trunk for a sample."""

    noise_to_signal: float
    standard_error: float
    scale: float
    cosine: float
    masked_share: float
    tokens_per_forward: float


@dataclass(frozen=True)
class Study:
    """All that was measured, and on what."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    exact: list[ExactFigures]
    sampled: list[SampledFigures]


def measure_objectives(samples: int, seed: int, console: Console) -> Study:
    """Measures both tables; progress goes to `console`.

    Args:
        samples: gradients drawn for each line of the sampled table; whole batches of `sampled.BATCH`, at least two of them.
    """
    batches = max(2, round(samples / sampled.BATCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors so small that more threads only wait for each other
    try:
        with spinner_or_line(console, "enumerating every mask of a small model"):
            exactly = exact_figures(seed)
        drawn = list(track(console, sampled_figures(batches, seed), len(sampled_cases()), "drawing gradients of a small trunk"))
    finally:
        torch.set_num_threads(threads)
    settings = {
        "samples": batches * sampled.BATCH,
        "seed": seed,
        "answer_tokens": ANSWER,
        "exact_answers": {str(size): count for size, count in EXACT_ANSWERS.items()},
        "sampled_answers": SAMPLED_ANSWERS,
        "schedules": {name: {**chosen, "progress": progress} for name, (chosen, progress) in SCHEDULES.items()},
        "complementary_uniform": COMPLEMENTARY_BOUND,
    }
    return Study(describe_machine() | {"threads": 1}, settings, exactly, drawn)


def build_objective(block_size: int, schedule: str, draws: str, weight: str) -> BlockDiffusionObjective:
    """Builds the objective of a case."""
    noise = {**SCHEDULES[schedule][0], "draws": "independent" if draws == "complementary" else draws}
    if draws == "complementary" and schedule == "uniform":
        noise |= COMPLEMENTARY_BOUND
    settings = {"block_size": block_size, "grid": "response", "weight": weight, "noise": noise}
    return BlockDiffusionObjective.model_validate(settings | {"complementary": draws == "complementary"})


# --- the exact table -------------------------------------------------------------------------------------------------------


def exact_figures(seed: int) -> list[ExactFigures]:
    """Computes every model, block size, schedule, weight and way to draw."""
    figures = []
    for model, block_size in itertools.product(exact.COUPLING, BLOCK_SIZES):
        gradient, loss = exact.enumerate_masks(model, block_size, EXACT_ANSWERS[block_size], ANSWER, seed)
        for schedule, draws, weight in itertools.product(SCHEDULES, DRAWS, WEIGHTS):
            weights = exact.estimator(_quantiles(schedule, draws), block_size, draws, weight)
            case = Case(model, block_size, schedule, weight, draws)
            figures.append(
                ExactFigures(
                    **asdict(case),
                    **asdict(exact.moments(gradient, weights)),
                    loss_noise_to_signal=exact.moments(loss, weights).noise_to_signal,
                    masked_share=weights.masked_share,
                    blocks_without_mask=weights.blocks_without_mask,
                )
            )
    return figures


@cache
def _quantiles(schedule: str, draws: str) -> torch.Tensor:
    noise = build_objective(1, schedule, draws, "none").noise.model_copy(update={"draws": "stratified"})
    return exact.quantiles(noise, SCHEDULES[schedule][1])


# --- the sampled table -----------------------------------------------------------------------------------------------------


def sampled_cases() -> list[Case]:
    """Lists the cases: in blocks of 8 every weight, on the fitted trunk under every schedule; in other blocks `effective` under
    uniform noise."""
    cases = [Case("random", 8, "uniform", weight, draws) for draws, weight in itertools.product(DRAWS, WEIGHTS)]
    for block_size in BLOCK_SIZES:
        every = block_size == 8
        choices = itertools.product(SCHEDULES if every else ("uniform",), DRAWS, WEIGHTS if every else ("effective",))
        cases += [Case("fitted", block_size, schedule, weight, draws) for schedule, draws, weight in choices]
    return cases


def sampled_figures(batches: int, seed: int) -> Iterator[SampledFigures]:
    """Yields the figures of each of `sampled_cases`."""
    texts = sampled.Texts(ANSWER, seed)
    answers = [texts.sample() for _ in range(SAMPLED_ANSWERS)]
    model, state = sampled.random_trunk(seed), "random"
    references: dict[int, sampled.Gradients] = {}
    for case in sampled_cases():
        if case.model != state:
            sampled.fit(model, texts, [build_objective(size, "uniform", "stratified", "effective") for size in BLOCK_SIZES])
            state, references = case.model, {}
        if case.block_size not in references:
            steady = build_objective(case.block_size, "uniform", "complementary", "effective")
            references[case.block_size] = sampled.sample_gradients(model, answers, steady, 0.0, seed + 1, REFERENCE * batches)
        drawn = sampled.sample_gradients(model, answers, case.objective, case.progress, seed, batches)
        yield against_bound(case, drawn, references[case.block_size])


def against_bound(case: Case, drawn: sampled.Gradients, reference: sampled.Gradients) -> SampledFigures:
    """Compares drawn gradients with the bound's.

    That is the long-run mean of `effective` under uniform noise times (D + 1) / D: the mean is smaller than the bound's gradient
    by this factor (test_equations.py).
    """
    factor = (case.block_size + 1) / case.block_size
    bound, length = reference.mean() * factor, reference.signal() * factor**2
    along = float((drawn.mean() * bound).sum(1).mean())
    return SampledFigures(
        **asdict(case),
        noise_to_signal=drawn.noise_to_signal(),
        standard_error=drawn.standard_error(),
        scale=along / length,
        cosine=along / (length * drawn.signal()) ** 0.5,
        masked_share=drawn.masked / ANSWER,
        tokens_per_forward=drawn.tokens,
    )
