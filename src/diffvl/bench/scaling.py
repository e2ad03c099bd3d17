"""How the time of a step grows: with the clean length L at a fixed answer, and with the answer R at a fixed length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from diffvl.bench.forms import Shape, make_work
from diffvl.bench.measure import measure_forms
from diffvl.bench.memory import MemoryMeter
from diffvl.config.recipe import BlockDiffusionObjective

LENGTH_FORMS = ("ar_answer_logits", "ours")
ANSWER_FORMS = ("ours",)
LONG = 4096  # tokens; from here on, and on a CPU, one timed round must do


@dataclass(frozen=True)
class Plan:
    """lengths: L, each with `fixed_answer`. answers: R, each with `fixed_length`."""

    lengths: tuple[int, ...]
    fixed_answer: int
    answers: tuple[int, ...]
    fixed_length: int


FULL_PLAN = Plan((1024, 2048, 4096, 8192, 16384), 256, (128, 256, 512, 1024), 2048)
QUICK_PLAN = Plan((32, 64, 128), 16, (8, 16, 32), 64)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power p of the best seconds = c * size^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def straight_line(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """The best seconds = slope * size + intercept, and R^2, the part of the variance that it explains."""
    slope, intercept = (float(value) for value in np.polyfit(sizes, seconds, 1))
    residual = np.asarray(seconds) - (slope * np.asarray(sizes) + intercept)
    variance = float(np.var(seconds))
    return {
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1.0 - float(np.mean(residual**2)) / variance if variance else 1.0,
    }


def measure_scaling(
    model: Any, objective: BlockDiffusionObjective, plan: Plan, rounds: int, meter: MemoryMeter, seed: int, console: Console
) -> dict[str, Any]:
    """The two fits with the points they come from.

    `length`: answer, lengths and, per form, exponent, seconds and peak_bytes. `answer`: length, answers and, per
    form, exponent, slope, intercept, r_squared, seconds and peak_bytes.
    """

    def figures(shapes: Sequence[Shape], forms: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
        return _figures(model, objective, shapes, forms, rounds, meter, seed, console)

    by_length = figures([Shape(length, plan.fixed_answer) for length in plan.lengths], LENGTH_FORMS)
    by_answer = figures([Shape(plan.fixed_length, answer) for answer in plan.answers], ANSWER_FORMS)
    lengths, answers = list(plan.lengths), list(plan.answers)
    return {
        "length": {
            "answer": plan.fixed_answer,
            "lengths": lengths,
            **{form: {"exponent": exponent(lengths, seen["seconds"]), **seen} for form, seen in by_length.items()},
        },
        "answer": {
            "length": plan.fixed_length,
            "answers": answers,
            **{
                form: {"exponent": exponent(answers, seen["seconds"]), **straight_line(answers, seen["seconds"]), **seen}
                for form, seen in by_answer.items()
            },
        },
    }


def _figures(
    model: Any,
    objective: BlockDiffusionObjective,
    shapes: Sequence[Shape],
    forms: Sequence[str],
    rounds: int,
    meter: MemoryMeter,
    seed: int,
    console: Console,
) -> dict[str, dict[str, list[Any]]]:
    """Form -> its median seconds and its peak bytes at every shape."""
    found: dict[str, dict[str, list[Any]]] = {form: {"seconds": [], "peak_bytes": []} for form in forms}
    for shape in shapes:
        work = make_work(shape, objective, model.config.vocabulary_size, meter.device, seed)
        here = 1 if shape.length >= LONG and meter.device.type == "cpu" else rounds
        measured = measure_forms(model, work, forms, here, meter, seed, console, f"scaling {shape.name}")
        for form, seen in measured.items():
            found[form]["seconds"].append(seen.median)
            found[form]["peak_bytes"].append(seen.peak_bytes)
    return found
