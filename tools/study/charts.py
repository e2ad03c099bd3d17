"""The charts of the page: curves over steps, and every way to decode as a point."""

import statistics
from collections.abc import Callable

from diffvl.report.chart import Chart, Line, axis_note, ticks_of_shares, ticks_up_to, ticks_with_zero
from tools.study.results import Curve, Result, Sorted, exact, masked
from tools.study.variants import TWIN, VARIANTS


def charts(found: Sorted) -> dict[str, Chart]:
    """Draws what there is: name -> chart. Thin lines are seeds, bold ones their means."""
    made = {}
    if found:
        made["exact-match"] = _curves("Exact match on held-out questions", found, exact, shares=True)
    lossy = {key: runs for key, runs in found.items() if all(run.masked_loss for run in runs.values())}
    if lossy:
        made["masked-loss"] = _curves("Masked loss on held-out records", lossy, masked, shares=False)
    timed = {key: runs for key, runs in found.items() if any(run.speeds for run in runs.values())}
    if timed:
        made["speed"] = _trade(timed)
    return made


def _curves(title: str, found: Sorted, curve: Callable[[Result], Curve], shares: bool) -> Chart:
    lines = []
    for key, runs in found.items():
        hue, curves = list(VARIANTS).index(key), [curve(run) for run in runs.values()]
        lines += [Line(hue, "raw", "", one) for one in curves]
        steps = [step for step, _ in curves[0]]
        means = [
            (step, statistics.fmean(dict(one)[step] for one in curves))
            for step in steps
            if all(step in dict(one) for one in curves)
        ]
        lines.append(Line(hue, "bold", f"({key}) {VARIANTS[key].about}", means))
    values = [value for line in lines for _, value in line.points]
    ticks_y = ticks_of_shares(values) if shares else ticks_with_zero(values)
    last = max(1, *(step for line in lines for step, _ in line.points))
    about = f"{title} over optimiser steps"
    return Chart(title, lines, ticks_y, ticks_up_to(last, whole=True), last, "optimiser step", about, [axis_note(ticks_y)])


def _trade(found: Sorted) -> Chart:
    """Draws every way to decode as a point: the mean of its speed against the twin's, and of its exact match."""
    lines = []
    for key, runs in found.items():
        timed = [run for run in runs.values() if run.speeds]
        points = [
            (
                statistics.fmean(run.speeds[name] / run.speeds[TWIN] for run in timed),
                statistics.fmean(run.ways[name].match for run in timed),
            )
            for name in timed[0].ways
        ]
        lines.append(Line(list(VARIANTS).index(key), "points", f"({key}) {VARIANTS[key].about}", points, list(timed[0].ways)))
    ticks_y = ticks_of_shares([value for line in lines for _, value in line.points])
    last = max(value for line in lines for value, _ in line.points) * 1.05
    about = "exact match against tokens per second, as a multiple of the AR twin's"
    return Chart("", lines, ticks_y, ticks_up_to(last), last, "tokens per second / AR twin", about)
