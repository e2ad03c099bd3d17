"""Measurements over the steps -> figures for the page: SVG, a legend, and a caption that says where the axis starts, what the
lines are and what was left out.
"""

import html
import math

from diffvl.report.stage_run import SHARES, is_named, value_of, with_step
from diffvl.store.metrics import Measure, Points
from diffvl.terminal.bars import number
from diffvl.terminal.console import visible


def escape(text: str) -> str:
    """Escapes text for the page: what is no text there, as control characters are, is shown as on a terminal."""
    return html.escape(visible(text))


DRAWN_POINTS = 800  # a curve with more is drawn as the lowest and highest point of each bucket, so that no spike is lost
_CHARTS = {  # title: what stands in the names of its curves
    "Loss": ("loss",),
    "Accuracy": SHARES,
    "Mask ratio": ("mask_ratio",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 64, 606, 14, 258  # SVG units, 640 wide; the last four bound the plot


def draw_charts(measures: dict[str, Measure]) -> list[str]:
    """Gives a figure of each chart that has something to show; held-out curves come last, on top of the others."""
    ordered = sorted(measures.values(), key=lambda measure: measure.key.startswith("eval_"))
    groups = {title: [m for m in ordered if m.points and is_named(m.key, parts)] for title, parts in _CHARTS.items()}
    return [_chart(title, group) for title, group in groups.items() if group]


def _chart(title: str, measures: list[Measure]) -> str:
    """Draws one chart as a figure: SVG, legend, and a caption that says what a reader could mistake."""
    ticks_y = _vertical_ticks(title, [value for measure in measures for _, value in measure.points])
    low, high = ticks_y[0], ticks_y[-1]
    last_step = max(1, *(step for measure in measures for step, _ in measure.points))

    def place(step: float, value: float) -> tuple[float, float]:
        x, y = step / last_step, (value - low) / (high - low)
        return round(_LEFT + (_RIGHT - _LEFT) * x, 1), round(_BOTTOM - (_BOTTOM - _TOP) * y, 1)

    svg = [f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">optimiser step</text>']
    for tick in ticks_y:
        y = place(0, tick)[1]
        svg.append(f'<path class="grid" d="M{_LEFT} {y}H{_RIGHT}"/>')
        svg.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{number(tick, digits=10)}</text>')
    for tick in (tick for tick in _ticks(0, last_step) if tick <= last_step and float(tick).is_integer()):
        x = place(tick, low)[0]
        svg.append(f'<path class="grid" d="M{x} {_BOTTOM}v5"/>')
        svg.append(f'<text x="{x}" y="{_BOTTOM + 19}" text-anchor="middle">{number(tick)}</text>')
    notes, legend = [f"Vertical axis from {number(low)}{', not from 0' if low else ''}."], ""
    if title == "Loss" and any(measure.key.startswith("eval_") for measure in measures):
        notes.append("Training loss carries the settings' weights, held-out loss need not: compare shapes, not heights.")
    for hue, measure in enumerate(measures):
        for style, label, points in _lines(measure):
            swatch = f'<svg class="h{hue % 4}" viewBox="0 0 28 8"><polyline class="{style}" points="0,4 28,4"/></svg>'
            legend += f"<li>{swatch}{escape(label)}</li>"
            corners = " ".join("{},{}".format(*place(*point)) for point in points)
            dots = points if style == "dots" or len(points) == 1 else []
            svg.append(f'<g class="h{hue % 4}"><polyline class="{style}" points="{corners}"/>')
            for dot in dots:
                x, y = place(*dot)
                svg.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{with_step(dot)}</title></circle>')
            svg.append("</g>")
        if len(measure.points) > DRAWN_POINTS:
            notes.append(f"{measure.key}: of {len(measure.points):,} points the lowest and highest of each stretch are drawn.")
    body = f'<svg viewBox="0 0 640 {_HEIGHT}" role="img" aria-label="{title} over optimiser steps">{"".join(svg)}</svg>'
    caption = f'<figcaption><ul class="legend">{legend}</ul>{escape(" ".join(notes))}</figcaption>'
    return f"<figure><h3>{title}</h3>{body}{caption}</figure>"


def _vertical_ticks(title: str, values: list[float]) -> list[float]:
    """Gives ticks around the values, and 0 with them: only a nearly flat curve is drawn from near its own start (the caption says
    so)."""
    low, high = min(values), max(values)
    if title in ("Accuracy", "Mask ratio") and low >= 0 and high <= 1:
        return _ticks(0, 1)
    if 0 < 0.6 * high < low < high:
        return _ticks(low, high)
    return _ticks(min(low, 0), max(high, 0))


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
    bold = measure.smoothed()
    bold = bold[:: -math.ceil(len(bold) / DRAWN_POINTS)][::-1]  # from the end, so that the last point stands
    name = f"mean of the last {measure.window} logged points"
    return [("raw", f"{measure.key}, each logged point", thin), ("bold", name, bold)]


def _ticks(low: float, high: float) -> list[float]:
    """Chooses round numbers, four to eight of them, that enclose low and high."""
    if low == high:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
