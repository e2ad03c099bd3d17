"""Measurements over the steps -> figures for a page, with a caption that says where the axis starts, what the lines are and what
was left out. Of one run, or of several on top of each other.
"""

import math
from collections.abc import Mapping, Sequence

from diffvl.report.chart import Chart, Line, axis_note, ticks_of_shares, ticks_up_to, ticks_with_zero
from diffvl.report.stage_run import SHARES, is_named, value_of, with_step
from diffvl.store.metrics import Measure, Points

DRAWN_POINTS = 800  # a curve with more is drawn as the lowest and highest point of each bucket, so that no spike is lost
_CHARTS = {  # title: what stands in the names of its curves
    "Loss": ("loss",),
    "Accuracy": SHARES,
    "Mask ratio": ("mask_ratio",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
_OF_SEVERAL = {  # title: whether it is of held-out samples, and what stands in the names of its curves
    "Training loss": (False, "loss"),
    "Held-out loss": (True, "loss"),
    "Held-out accuracy": (True, "accuracy"),
    "Held-out exact match": (True, "match"),
    "Held-out edit similarity": (True, "similarity"),
}
_SCALES = "Training loss carries the settings' weights, held-out loss need not: compare shapes, not heights."


def draw_charts(measures: dict[str, Measure]) -> list[str]:
    """Gives a figure of each chart of a run that has something to show; held-out curves come last, on top of the others."""
    ordered = sorted(measures.values(), key=lambda measure: measure.key.startswith("eval_"))
    groups = {title: [m for m in ordered if m.points and is_named(m.key, parts)] for title, parts in _CHARTS.items()}
    return [_chart(title, group) for title, group in groups.items() if group]


def _chart(title: str, measures: Sequence[Measure]) -> str:
    lines = [
        Line(hue % 4, style, label, points, list(map(with_step, points)))
        for hue, measure in enumerate(measures)
        for style, label, points in _lines(measure)
    ]
    notes = []
    if title == "Loss" and any(measure.key.startswith("eval_") for measure in measures):
        notes.append(_SCALES)
    for measure in measures:
        if len(measure.points) > DRAWN_POINTS:
            notes.append(f"{measure.key}: of {len(measure.points):,} points the lowest and highest of each stretch are drawn.")
    values = [value for measure in measures for _, value in measure.points]
    return over_steps(title, lines, values, title in ("Accuracy", "Mask ratio"), notes).figure()


def over_steps(title: str, lines: Sequence[Line], values: Sequence[float], shares: bool, notes: Sequence[str] = ()) -> Chart:
    """Makes a chart with optimiser steps below.

    Args:
        values: that the vertical axis must hold. shares: whether they are shares, of 1.
    """
    ticks_y = ticks_of_shares(values) if shares else ticks_with_zero(values)
    last = max(1, *(step for line in lines for step, _ in line.points))
    about = f"{title} over optimiser steps"
    return Chart(
        title, lines, ticks_y, ticks_up_to(last, whole=True), last, "optimiser step", about, [axis_note(ticks_y), *notes]
    )


def _lines(measure: Measure) -> list[tuple[str, str, Points]]:
    """Gives (style, legend, points) of the lines that one measure is drawn as."""
    if measure.key.startswith("eval_"):
        return [("dots", f"{measure.key} (held out)", measure.points)]
    thin = measure.points
    if len(thin) > DRAWN_POINTS:
        size = math.ceil(2 * len(thin) / DRAWN_POINTS)
        stretches = [thin[i : i + size] for i in range(0, len(thin), size)]
        thin = [point for part in stretches for point in sorted({min(part, key=value_of), max(part, key=value_of)})]
    if measure.window == 1 or measure.key.startswith("learning_rate"):
        return [("bold", measure.key, thin)]
    name = f"mean of the last {measure.window} logged points"
    return [("raw", f"{measure.key}, each logged point", thin), ("bold", name, smooth_line(measure))]


def smooth_line(measure: Measure) -> Points:
    """Gives the moving average with no more points than are drawn."""
    bold = measure.smoothed()
    return bold[:: -math.ceil(len(bold) / DRAWN_POINTS)][::-1]  # from the end, so that the last point stands


# --- of several runs -------------------------------------------------------------------------------------------------------


def draw_overlaid(runs: Mapping[str, Mapping[str, Measure]]) -> list[str]:
    """Gives figures in which each run has its own colour.

    Args:
        runs: name of a run -> its measures.
    """
    figures = []
    for title, (held_out, part) in _OF_SEVERAL.items():
        chosen = [
            (hue, name, measure)
            for hue, (name, measures) in enumerate(runs.items())
            for measure in measures.values()
            if measure.points and measure.key.startswith("eval_") == held_out and part in measure.key
        ]
        if chosen:
            figures.append(_overlaid(title, chosen, held_out))
    return figures


def _overlaid(title: str, chosen: Sequence[tuple[int, str, Measure]], held_out: bool) -> str:
    lines, notes = [], []
    for hue, name, measure in chosen:
        points = measure.points if held_out else smooth_line(measure)
        told = f"{name}: {measure.key}" + (
            f", mean of {measure.window} logged points" if measure.window > 1 and not held_out else ""
        )
        lines.append(Line(hue, "dots" if held_out else "bold", told, points, [f"{name}: {with_step(point)}" for point in points]))
    if len({measure.key for _, _, measure in chosen}) > 1 or not held_out:
        notes.append("Losses of different objectives are on different scales: compare shapes, not heights." * ("loss" in title))
        notes.append("A masked token is predicted from part of the answer, a next token from all before it." * held_out)
    values = [value for line in lines for _, value in line.points]
    return over_steps(title, lines, values, "loss" not in title, [note for note in notes if note]).figure()
