"""`diffvl bench objective`: how noisy and how biased the gradient is under each way to draw noise and weigh tokens.

Two models: `exact` enumerates every mask of a model of a few parameters, so its figures have no sampling error; `sampled` draws
gradients of a small trunk through the objective that is trained. In both the answers are fixed and only the noise is drawn, so
the variance is that of the corruption alone. docs/objective.md says what the table means.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from rich.console import Console

from diffvl.bench import exact, sampled
from diffvl.bench.machine import describe
from diffvl.config.recipe import BlockDiffusionObjective
from diffvl.terminal.bars import spinner_or_line, track

ANSWER = 64  # tokens; a multiple of every block size
BLOCK_SIZES = (4, 8, 16)
EXACT_ANSWERS = {4: 64, 8: 64, 16: 16}  # by block size: a block of 16 has 65,536 masks
SAMPLED_ANSWERS = 4
WEIGHTS = ("1/t", "effective", "none")
DRAWS = ("synchronous", "independent", "stratified", "complementary")
SCHEDULES: dict[str, tuple[dict[str, Any], float]] = {  # settings, and the progress at which they are looked at
    "uniform": ({"schedule": "uniform"}, 0.0),
    "beta start": ({"schedule": "beta"}, 0.0),
    "beta end": ({"schedule": "beta"}, 1.0),
    "clamp": ({"schedule": "clamp", "t_min": 0.3, "t_max": 0.8}, 0.0),
}
# The opposite mask has ratio 1 - t, and 1 / (1 - t) has no finite second moment where t comes up to 1.
COMPLEMENTARY_BOUND = {"t_max": 0.999}
REFERENCE = 2  # times as many batches for the long-run gradient that bias is measured against
Table = tuple[list[str], list[tuple[str, ...]]]


def measure_objective(samples: int, seed: int, console: Console) -> dict[str, Any]:
    """The whole report, as `--json` prints it.

    Args:
        samples: gradients drawn for each row of the sampled table; whole batches of `sampled.ROWS`, at least two of them.
    """
    batches = max(2, round(samples / sampled.ROWS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors so small that more threads only wait for each other
    try:
        with spinner_or_line(console, "enumerating every mask of a small model"):
            exactly = exact_rows(seed)
        drawn = list(track(console, sampled_rows(batches, seed), len(cells()), "drawing gradients of a small trunk"))
    finally:
        torch.set_num_threads(threads)
    return {
        "machine": describe() | {"threads": 1},
        "settings": {
            "samples": batches * sampled.ROWS,
            "seed": seed,
            "answer_tokens": ANSWER,
            "exact_answers": {str(size): count for size, count in EXACT_ANSWERS.items()},
            "sampled_answers": SAMPLED_ANSWERS,
            "schedules": {name: {**settings, "progress": progress} for name, (settings, progress) in SCHEDULES.items()},
            "complementary_uniform": COMPLEMENTARY_BOUND,
        },
        "exact": exactly,
        "sampled": drawn,
    }


def settings_of(schedule: str, draws: str) -> dict[str, Any]:
    """A schedule's noise settings under a way to share draws."""
    settings = {**SCHEDULES[schedule][0], "draws": "independent" if draws == "complementary" else draws}
    if draws == "complementary" and schedule == "uniform":
        settings |= COMPLEMENTARY_BOUND
    return settings


def exact_rows(seed: int) -> list[dict[str, Any]]:
    """Every model, block size, schedule, weight and way to draw."""
    rows = []
    for model, block_size in itertools.product(exact.COUPLING, BLOCK_SIZES):
        gradient, loss = exact.enumerate_masks(model, block_size, EXACT_ANSWERS[block_size], ANSWER, seed)
        for schedule, draws, weight in itertools.product(SCHEDULES, DRAWS, WEIGHTS):
            law = exact.estimate(_quantiles(schedule, draws), block_size, draws, weight)
            row = {"model": model, "block_size": block_size, "schedule": schedule, "weight": weight, "draws": draws}
            row |= asdict(exact.exact(gradient, law))
            row["loss_noise_to_signal"] = exact.exact(loss, law).noise_to_signal
            rows.append(row | {"masked_share": law.masked_share, "blocks_without_mask": law.blocks_without_mask})
    return rows


@cache
def _quantiles(schedule: str, draws: str) -> torch.Tensor:
    noise = _objective(1, schedule, draws, "none").noise.model_copy(update={"draws": "stratified"})
    return exact.quantiles(noise, SCHEDULES[schedule][1])


def cells() -> list[tuple[str, int, str, str, str]]:
    """(trunk, block size, schedule, draws, weight) of the sampled table: in blocks of 8 every weight, on the fitted trunk under
    every schedule; in other blocks `effective` under uniform noise."""
    found: list[tuple[str, int, str, str, str]] = [("random", 8, "uniform", *pair) for pair in itertools.product(DRAWS, WEIGHTS)]
    for block_size in BLOCK_SIZES:
        whole = block_size == 8
        choices = itertools.product(SCHEDULES if whole else ("uniform",), DRAWS, WEIGHTS if whole else ("effective",))
        found += [("fitted", block_size, *choice) for choice in choices]
    return found


def sampled_rows(batches: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each of `cells`."""
    texts = sampled.Texts(ANSWER, seed)
    answers = [texts.one() for _ in range(SAMPLED_ANSWERS)]
    model, state = sampled.random_trunk(seed), "random"
    references: dict[int, sampled.Gradients] = {}
    for trunk, block_size, schedule, draws, weight in cells():
        if trunk != state:
            sampled.fit(model, texts, [_objective(size, "uniform", "stratified", "effective") for size in BLOCK_SIZES])
            state, references = trunk, {}
        if block_size not in references:
            steady = _objective(block_size, "uniform", "complementary", "effective")
            references[block_size] = sampled.sample_gradients(model, answers, steady, 0.0, seed + 1, REFERENCE * batches)
        objective, progress = _objective(block_size, schedule, draws, weight), SCHEDULES[schedule][1]
        drawn = sampled.sample_gradients(model, answers, objective, progress, seed, batches)
        row = {"model": trunk, "block_size": block_size, "schedule": schedule, "weight": weight, "draws": draws}
        yield row | _figures(drawn, references[block_size], block_size)


def _objective(block_size: int, schedule: str, draws: str, weight: str) -> BlockDiffusionObjective:
    """With the grid in the answer, so that every block is whole."""
    return BlockDiffusionObjective.model_validate(
        {
            "block_size": block_size,
            "grid": "response",
            "weight": weight,
            "noise": settings_of(schedule, draws),
            "complementary": draws == "complementary",
        }
    )


def _figures(drawn: sampled.Gradients, reference: sampled.Gradients, block_size: int) -> dict[str, float]:
    """As `exact.Exact`, with the standard error; the bound's gradient is the long-run mean of `effective` under uniform noise
    times (D + 1) / D, which is what that mean falls short of it by (test_equations.py)."""
    bound = reference.mean() * (block_size + 1) / block_size
    length = reference.signal() * ((block_size + 1) / block_size) ** 2
    along = float((drawn.mean() * bound).sum(1).mean())
    return {
        "noise_to_signal": drawn.noise_to_signal(),
        "standard_error": drawn.standard_error(),
        "scale": along / length,
        "cosine": along / (length * drawn.signal()) ** 0.5,
        "masked_share": drawn.masked / ANSWER,
        "tokens_per_forward": drawn.tokens,
    }


# --- as tables -------------------------------------------------------------------------------------------------------------

KEYS = ("model", "block_size", "schedule", "weight")
SHORT = {"synchronous": "sync", "independent": "async", "stratified": "strat", "complementary": "compl"}


def tables(report: dict[str, Any]) -> list[Table]:
    """What is printed, in order: the machine, the exact rows, the sampled ones; the ways to draw stand side by side."""
    machine, settings = report["machine"], report["settings"]
    words = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {machine['date']}",
        "software": f"torch {machine['torch']}, transformers {machine['transformers']}",
        "run": f"answers of {ANSWER} tokens, {settings['samples']} gradients for each sampled figure, seed {settings['seed']}",
        "sync ... compl": "trace of the covariance over squared norm of the mean; of the gradient, or of the loss if it says so",
        "scale, cosine": "mean gradient against the bound's: length along it, and angle; async, then complementary",
        "masked, empty": "share of the answer masked in a forward, share of blocks without a mask; async",
    }
    exact_headings = [*(f"loss {name}" for name in SHORT.values()), "scale", "cosine", "masked", "empty"]
    return [
        (["", ""], list(words.items())),
        (["exact", "D", "schedule", "weight", *SHORT.values(), *exact_headings], _lines(report["exact"], _exact_cells)),
        (
            ["sampled", "D", "schedule", "weight", *SHORT.values(), "scale", "cosine", "masked", "tokens"],
            _lines(report["sampled"], _sampled_cells),
        ),
    ]


def _lines(rows: list[dict[str, Any]], cells_of: Callable[[dict[str, dict[str, Any]]], list[str]]) -> list[tuple[str, ...]]:
    """One line for each combination of KEYS."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in KEYS), {})[row["draws"]] = row
    return [(*(str(key) for key in keys), *cells_of(group)) for keys, group in groups.items()]


def _exact_cells(group: dict[str, dict[str, Any]]) -> list[str]:
    alone = group["independent"]
    return [
        *(f"{group[draws]['noise_to_signal']:.3f}" for draws in SHORT),
        *(f"{group[draws]['loss_noise_to_signal']:.4f}" for draws in SHORT),
        *_against_bound(group),
        f"{alone['masked_share']:.2f}",
        f"{alone['blocks_without_mask']:.3f}",
    ]


def _sampled_cells(group: dict[str, dict[str, Any]]) -> list[str]:
    alone, two = group["independent"], group["complementary"]
    return [
        *(f"{group[draws]['noise_to_signal']:.2f} ± {group[draws]['standard_error']:.2f}" for draws in SHORT),
        *_against_bound(group),
        f"{alone['masked_share']:.2f} {two['masked_share']:.2f}",
        f"{alone['tokens_per_forward']:.0f} {two['tokens_per_forward']:.0f}",
    ]


def _against_bound(group: dict[str, dict[str, Any]]) -> list[str]:
    pair = (group["independent"], group["complementary"])
    return [" ".join(f"{row['scale']:.2f}" for row in pair), " ".join(f"{row['cosine']:.3f}" for row in pair)]
