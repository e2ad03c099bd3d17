"""Lines and points -> one chart: an SVG with its legend and what a reader must know, as a figure of a page or as a file.

Nothing here knows what is drawn. Colours are classes (`h0`, `h1`, ...), which `report.document` and `Chart.file` give a meaning.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffvl.terminal.bars import number
from diffvl.terminal.console import visible

Point = tuple[float, float]

MARKED = ("dots", "points", "raw marked")
HUES = ("#2563eb", "#c2570c", "#0f766e", "#7c3aed", "#be185d", "#4d7c0f", "#0369a1", "#374151")  # on a light page
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 64, 606, 14, 258  # SVG units, 640 wide; the last four bound the plot
_LEGEND_LINE = 20  # SVG units of a line of the legend, in a file
_FILE_STYLE = """
svg { background: #fff; font: 12px sans-serif } text { fill: #5c6570 } .grid { stroke: #d8dce2; fill: none }
polyline { fill: none; stroke: var(--hue); stroke-width: 2.4; stroke-linejoin: round } .raw { stroke-width: 1; opacity: .45 }
.dots { stroke-width: 1.5; stroke-dasharray: 4 4 } .points { stroke: none } circle { fill: var(--hue); stroke: #fff }
"""


def escape(text: str) -> str:
    """Escapes text for the page: what is no text there, as control characters are, is shown as on a terminal."""
    return html.escape(visible(text))


@dataclass(frozen=True)
class Line:
    """What is drawn in one colour.

    style: `bold`, `raw` (thin), `raw marked` and `dots` (dashed), which mark each point, or `points` (marks alone).
    titles: of the marks, what a reader sees who points at one.
    """

    hue: int
    style: str
    label: str
    points: Sequence[Point]
    titles: Sequence[str] = ()

    @property
    def is_marked(self) -> bool:
        return self.style in MARKED or len(self.points) == 1


@dataclass(frozen=True)
class Chart:
    """One chart. ticks_y, ticks_x: the marks of the axes; the first and the last of ticks_y bound the plot, and x goes from 0 to
    `last_x`. x_title: what stands below the axis. about: what is drawn, for who cannot see it. notes: of the caption."""

    title: str
    lines: Sequence[Line]
    ticks_y: Sequence[float]
    ticks_x: Sequence[float]
    last_x: float
    x_title: str
    about: str
    notes: Sequence[str] = field(default=())

    def figure(self) -> str:
        """Draws it for a page."""
        body = f'<svg viewBox="0 0 640 {_HEIGHT}" role="img" aria-label="{escape(self.about)}">{self._drawing()}</svg>'
        legend = "".join(f"<li>{_swatch(line)}{escape(line.label)}</li>" for line in self.lines if line.label)
        caption = f'<figcaption><ul class="legend">{legend}</ul>{escape(" ".join(self.notes))}</figcaption>'
        return f"<figure><h3>{escape(self.title)}</h3>{body}{caption}</figure>"

    def file(self) -> str:
        """Draws it as a file of its own, with the legend below it."""
        named = [line for line in self.lines if line.label]
        height = _HEIGHT + _LEGEND_LINE * len(named) + 8
        hues = " ".join(f".h{number} {{ --hue: {hue} }}" for number, hue in enumerate(HUES))
        legend = "".join(_legend_line(line, _HEIGHT + _LEGEND_LINE * (place + 0.5)) for place, line in enumerate(named))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}" role="img" '
            f'aria-label="{escape(self.about)}">\n<style>{_FILE_STYLE}{hues}</style>\n{self._drawing()}\n{legend}\n</svg>\n'
        )

    def _drawing(self) -> str:
        """Gives what stands inside the SVG: axes, then lines in their order."""
        low, high = self.ticks_y[0], self.ticks_y[-1]

        def place(x: float, y: float) -> Point:
            across, up = x / self.last_x, (y - low) / (high - low)
            return round(_LEFT + (_RIGHT - _LEFT) * across, 1), round(_BOTTOM - (_BOTTOM - _TOP) * up, 1)

        title = escape(self.x_title)
        svg = [f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">{title}</text>']
        for tick in self.ticks_y:
            y = place(0, tick)[1]
            svg.append(f'<path class="grid" d="M{_LEFT} {y}H{_RIGHT}"/>')
            svg.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{number(tick, digits=10)}</text>')
        for tick in self.ticks_x:
            x = place(tick, low)[0]
            svg.append(f'<path class="grid" d="M{x} {_BOTTOM}v5"/>')
            svg.append(f'<text x="{x}" y="{_BOTTOM + 19}" text-anchor="middle">{number(tick)}</text>')
        for line in self.lines:
            corners = " ".join("{},{}".format(*place(*point)) for point in line.points)
            svg.append(f'<g class="{_hue(line)}"><polyline class="{line.style}" points="{corners}"/>')
            for point, told in zip(line.points if line.is_marked else (), line.titles, strict=False):
                x, y = place(*point)
                svg.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{escape(told)}</title></circle>')
            svg.append("</g>")
        return "".join(svg)


def _hue(line: Line) -> str:
    return f"h{line.hue % len(HUES)}"


def _swatch(line: Line) -> str:
    """Shows in a page's legend what a line looks like."""
    mark = '<circle cx="14" cy="4" r="4"/>' if line.style in MARKED[1:] else ""
    return f'<svg class="{_hue(line)}" viewBox="0 0 28 8"><polyline class="{line.style}" points="0,4 28,4"/>{mark}</svg>'


def _legend_line(line: Line, y: float) -> str:
    mark = f'<circle cx="{_LEFT + 14}" cy="{y}" r="4"/>' if line.style in MARKED else ""
    drawn = f'<polyline class="{line.style}" points="{_LEFT},{y} {_LEFT + 28},{y}"/>{mark}'
    return f'<g class="{_hue(line)}">{drawn}</g><text x="{_LEFT + 38}" y="{y + 4}">{escape(line.label)}</text>'


# --- axes ------------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float) -> list[float]:
    """Chooses round numbers, four to eight of them, that enclose low and high."""
    if low == high:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def ticks_with_zero(values: Sequence[float]) -> list[float]:
    """Chooses ticks around the values, and 0 with them: only nearly flat ones are drawn from near their own start, and
    `axis_note` says so."""
    low, high = min(values), max(values)
    if 0 < 0.6 * high < low < high:
        return ticks(low, high)
    return ticks(min(low, 0), max(high, 0))


def ticks_of_shares(values: Sequence[float]) -> list[float]:
    """Chooses ticks from 0 to 1, where the values are shares."""
    return ticks(0, 1) if min(values) >= 0 and max(values) <= 1 else ticks_with_zero(values)


def ticks_up_to(last: float, whole: bool = False) -> list[float]:
    """Chooses ticks from 0 that lie in the plot. whole: no fractions."""
    return [tick for tick in ticks(0, last) if tick <= last and (not whole or float(tick).is_integer())]


def axis_note(ticks_y: Sequence[float]) -> str:
    """Says where the vertical axis starts."""
    return f"Vertical axis from {number(ticks_y[0])}{', not from 0' if ticks_y[0] else ''}."
