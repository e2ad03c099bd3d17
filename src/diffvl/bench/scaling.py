"""How the time of a step grows: with the clean length L at a fixed answer, and with the answer R at a fixed length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffvl.bench.timing import Timer, time_forms
from diffvl.bench.training_forms import Shape, make_sample
from diffvl.config.objectives import BlockDiffusionObjective

LENGTH_FORMS = ("ar_answer_logits", "ours")
ANSWER_FORMS = ("ours",)
LONG = 4096  # tokens; from here on, on a CPU, there is time for one round only


@dataclass(frozen=True)
class ScalingPlan:
    """lengths: L, each with `fixed_answer`. answers: R, each with `fixed_length`."""

    lengths: tuple[int, ...]
    fixed_answer: int
    answers: tuple[int, ...]
    fixed_length: int


FULL_PLAN = ScalingPlan((1024, 2048, 4096, 8192, 16384), 256, (128, 256, 512, 1024), 2048)
QUICK_PLAN = ScalingPlan((32, 64, 128), 16, (8, 16, 32), 64)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Fits the power p of the best seconds = c * size^p, by least squares on logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def straight_line(sizes: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Fits the best seconds = slope * size + intercept, and R^2, the part of the variance that it explains."""
    slope, intercept = (float(value) for value in np.polyfit(sizes, seconds, 1))
    residual = np.asarray(seconds) - (slope * np.asarray(sizes) + intercept)
    variance = float(np.var(seconds))
    return {
        "slope": slope,
        "intercept": intercept,
        "r_squared": 1.0 - float(np.mean(residual**2)) / variance if variance else 1.0,
    }


def measure_scaling(model: Any, objective: BlockDiffusionObjective, plan: ScalingPlan, timer: Timer) -> dict[str, Any]:
    """Measures the two fits with the points they come from.

    `length`: answer, lengths and, per form, exponent, seconds and peak_bytes. `answer`: length, answers and, per
    form, exponent, slope, intercept, r_squared, seconds and peak_bytes.
    """
    lengths, answers = list(plan.lengths), list(plan.answers)
    by_length = _points(model, objective, [Shape(length, plan.fixed_answer) for length in lengths], LENGTH_FORMS, timer)
    by_answer = _points(model, objective, [Shape(plan.fixed_length, answer) for answer in answers], ANSWER_FORMS, timer)
    return {
        "length": {
            "answer": plan.fixed_answer,
            "lengths": lengths,
            **{form: {"exponent": exponent(lengths, points["seconds"]), **points} for form, points in by_length.items()},
        },
        "answer": {
            "length": plan.fixed_length,
            "answers": answers,
            **{
                form: {"exponent": exponent(answers, points["seconds"]), **straight_line(answers, points["seconds"]), **points}
                for form, points in by_answer.items()
            },
        },
    }


def _points(
    model: Any, objective: BlockDiffusionObjective, shapes: Sequence[Shape], forms: Sequence[str], timer: Timer
) -> dict[str, dict[str, list[Any]]]:
    """Measures each form's median seconds and peak bytes at every shape."""
    points: dict[str, dict[str, list[Any]]] = {form: {"seconds": [], "peak_bytes": []} for form in forms}
    for shape in shapes:
        sample = make_sample(shape, objective, model.config.vocabulary_size, timer.device, timer.seed)
        is_slow = shape.length >= LONG and timer.device.type == "cpu"
        timings = time_forms(model, sample, forms, replace(timer, rounds=1) if is_slow else timer, f"scaling {shape.name}")
        for form, timing in timings.items():
            points[form]["seconds"].append(timing.median)
            points[form]["peak_bytes"].append(timing.peak_bytes)
    return points
