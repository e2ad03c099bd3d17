"""A finished stage as a person reads it: `report.html` beside the run, and the same in short in the terminal.

Reads only what the trainer left in the stage's directory (`metrics.jsonl`, `samples.jsonl`, `run.yaml`, `diffvl.json`), so the
page can be made again at any time. The page is one file: styles, curves (SVG) and pictures (data URIs) stand inside it, no script
runs and nothing is fetched. Every chart says where its axis starts, what its lines are and what it left out.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffvl.config.resolve import read_yaml
from diffvl.data.images import open_picture
from diffvl.data.textscore import is_exact
from diffvl.errors import CheckpointError, DataError
from diffvl.store.files import replace_text
from diffvl.store.metrics import METRICS_FILE, Measure, Points, measures_of, read_json_lines
from diffvl.terminal.bars import duration, number
from diffvl.terminal.console import say, visible

REPORT_FILE = "report.html"
SAMPLES_FILE = "samples.jsonl"
PICTURE_SIDE = 224  # pixels
PAGE_SAMPLES = 60
TERMINAL_SAMPLES = 4
DRAWN_POINTS = 800  # a curve with more is drawn as the lowest and highest point of each bucket, so that no spike is lost

_value = itemgetter(1)
_SHARES = ("accuracy", "match", "similarity")  # figures between 0 and 1, the more the better
_CHARTS = {  # title: what stands in the names of its curves
    "Loss": ("loss",),
    "Accuracy": _SHARES,
    "Mask ratio": ("mask_ratio",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}


@dataclass(frozen=True)
class Run:
    """What one stage directory holds; an optional file that is missing is an empty value here."""

    directory: Path
    stage: str
    measures: dict[str, Measure]
    samples: list[dict[str, Any]]
    settings: str
    model: str
    provenance: dict[str, Any]
    seconds: float | None

    @property
    def left_out(self) -> dict[str, int]:  # by kind
        return self.provenance.get("left_out") or {}


def write_report(directory: Path) -> Path:
    """Writes `report.html` into a stage directory and returns its path.

    Raises:
        CheckpointError: no measurements there, or a file that cannot be read as what it is.
    """
    path = directory / REPORT_FILE
    replace_text(path, _page(_read_run(directory)))
    return path


def print_summary(directory: Path, console: Console) -> None:
    """The run in a few lines: loss and evaluation first, last and best, some answers, where the report is.

    Raises:
        CheckpointError: as `write_report`.
    """
    run = _read_run(directory)
    table = Table("", "first", "last", "best", title=Text(visible(_title(run))), title_justify="left")
    for row in _summary_rows(run):
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
    for warning in _warnings(run):
        say(console, (warning, "red"))
    for sample in run.samples[:TERMINAL_SAMPLES]:
        say(console, (f"\n{sample['question']}", "bold"), f"\n  truth   {sample['truth']}")
        for name, answer in _answers(sample):
            mark, style = ("right", "green") if is_exact(answer, sample["truth"]) else ("wrong", "red")
            say(console, f"  {name:<7} ", (answer or "(empty)", style), f"  [{mark}]")
    if run.samples:
        score, meaning = _score(run.samples)
        say(console, f"\n{meaning}: {score}")
    if (directory / REPORT_FILE).exists():
        say(console, f"report: {directory / REPORT_FILE}")


# --- reading -------------------------------------------------------------------------------------------------------------


def _read_run(directory: Path) -> Run:
    metrics = directory / METRICS_FILE
    if not metrics.is_file():
        raise CheckpointError(f"{metrics}: not found; expected the directory of a stage that has run, e.g. runs/MODEL/diffuse")
    lines = read_json_lines(metrics)
    if not lines:
        raise CheckpointError(f"{metrics}: holds no measurement; the stage stopped before its first log, run it again")
    samples = _read_samples(directory / SAMPLES_FILE)
    settings, provenance = directory / "run.yaml", directory / "diffvl.json"
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return Run(
        directory=directory,
        stage=", ".join(dict.fromkeys(str(line["stage"]) for line in lines if "stage" in line)) or directory.name,
        measures=measures_of(lines),
        samples=samples,
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        model=str(read_yaml(settings).get("model") or "") if settings.is_file() else "",
        provenance=_read_object(provenance) if provenance.is_file() else {},
        seconds=max(seconds) if seconds else None,
    )


def _read_samples(path: Path) -> list[dict[str, Any]]:
    samples = read_json_lines(path) if path.is_file() else []
    for count, sample in enumerate(samples, start=1):
        wrong = [key for key in ("question", "truth", "after") if not isinstance(sample.get(key), str)]
        if wrong:
            raise CheckpointError(f"{path}: sample {count}: {', '.join(wrong)} should be text; write the samples again")
    return samples


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); restore it from a copy or remove it") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, not {type(value).__name__}")
    return value


def _title(run: Run) -> str:
    return " · ".join(word for word in (run.model, run.stage) if word)


def _headlines(run: Run) -> list[tuple[str, Measure, Points]]:
    """(name, measure, its points) of the training loss, smoothed, and of every evaluation figure."""
    rows = [(key, m, m.points) for key, m in run.measures.items() if key.startswith("eval_") and m.points]
    loss = run.measures.get("loss")
    if loss and loss.points:
        name = "loss" if loss.window == 1 else f"loss, mean of {loss.window} logged points"
        rows.insert(0, (name, loss, loss.smoothed()))
    return rows


def _summary_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """(name, first, last, best) of every headline, each figure with its step."""
    rows = []
    for name, measure, points in _headlines(run):
        best = _best(measure.key, points)
        once = len(points) == 1
        rows.append((name, _at(points[0]), "–" if once else _at(points[-1]), "–" if once or best is None else _at(best)))
    return rows


def _named(key: str, words: Sequence[str]) -> bool:
    return any(word in key for word in words)


def _best(key: str, points: Points) -> tuple[int, float] | None:
    """The best of `points` where the key says which way is better."""
    if "loss" in key:
        return min(points, key=_value)
    return max(points, key=_value) if _named(key, _SHARES) else None


def _at(point: tuple[int, float]) -> str:
    return f"{number(point[1])} (step {point[0]})"


def _warnings(run: Run) -> list[str]:
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in run.left_out.items())
    return [f"records left out: {left_out} (listed in left_out.jsonl)"] * bool(left_out) + [
        f"{key}: NaN or infinite at {m.lost} of {m.lost + len(m.points)} logged steps, which are left out"
        for key, m in run.measures.items()
        if m.lost
    ]


def _answers(sample: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, sample[name].strip()) for name in ("before", "after") if sample.get(name) is not None]


def _score(samples: list[dict[str, Any]]) -> tuple[str, str]:
    """(how many of the samples are answered right, what that counts)."""
    answers = [dict(_answers(sample), truth=sample["truth"]) for sample in samples]
    names = [name for name in ("before", "after") if all(name in answer for answer in answers)]
    counts = [str(sum(is_exact(answer[name], answer["truth"]) for answer in answers)) for name in names]
    return f"{' → '.join(counts)} of {len(samples)}", f"samples answered right, {' → '.join(names)}"


# --- page ----------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --ink: #1c2128; --dim: #5c6570; --edge: #d8dce2;
  --right: #15803d; --wrong: #b42318; --hue0: #2563eb; --hue1: #c2570c; --hue2: #0f766e; --hue3: #7c3aed }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2127; --ink: #e6e9ed; --dim: #9aa4af; --edge: #363c45;
  --right: #5bd08a; --wrong: #ff8f85; --hue0: #7aa7ff; --hue1: #ffa25f; --hue2: #4fd1b8; --hue3: #c4a5ff } }
body { margin: auto; max-width: 1180px; padding: 24px; background: var(--back); color: var(--ink); font: 15px/1.5 sans-serif }
h1 { font-size: 1.5em; margin: 0 } h2 { font-size: 1.15em; margin: 2em 0 .6em } h3 { font-size: 1em; margin: 0 }
p, dl, dd, ul, figure { margin: 0; padding: 0 } p, dt, figcaption { color: var(--dim); font-size: .87em } p { margin-bottom: 8px }
.tiles, .curves, .samples { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)) }
.tiles { margin-top: 18px; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)) }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)) }
.tile, article, figure, pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px }
.tile b { font-size: 1.25em } svg { display: block; width: 100%; height: auto } text { fill: var(--dim); font-size: 12px }
.h0 { --hue: var(--hue0) } .h1 { --hue: var(--hue1) } .h2 { --hue: var(--hue2) } .h3 { --hue: var(--hue3) }
polyline { fill: none; stroke: var(--hue); stroke-width: 2.4; stroke-linejoin: round } .raw { stroke-width: 1; opacity: .45 }
.dots { stroke-width: 1.5; stroke-dasharray: 4 4 } circle { fill: var(--hue); stroke: var(--card) } .grid { stroke: var(--edge) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none }
.legend svg { display: inline; width: 28px; margin-right: 6px }
img { display: block; max-width: 100%; height: auto; margin: 0 auto 10px; border-radius: 4px } dt { margin-top: .4em }
dd, h3, pre { white-space: pre-wrap; overflow-wrap: anywhere } .right { color: var(--right) } .wrong { color: var(--wrong) }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 4px 20px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top }
"""


def escape(text: str) -> str:
    """Text for the page: what is no text there, as control characters are, is shown as on a terminal."""
    return html.escape(visible(text))


def _page(run: Run) -> str:
    """The whole page; a section without content is left out."""
    settings = f"<details><summary>run.yaml</summary><pre>{escape(run.settings)}</pre></details>"
    sections = {
        "Curves": ("curves", _charts(run.measures)),
        "First, last and best": ("", [_table(("", "first", "last", "best"), _summary_rows(run))]),
        "Samples": ("samples", [_card(sample) for sample in run.samples[:PAGE_SAMPLES]]),
        "Settings": ("", [settings] if run.settings else []),
        "Records left out": ("", [_table((), [(kind, f"{count:,}") for kind, count in run.left_out.items()])]),
        "Where it came from": ("", [_table((), [(key, _words(value)) for key, value in run.provenance.items()])]),
    }
    shown = f"The first {PAGE_SAMPLES} of {len(run.samples):,}. " if len(run.samples) > PAGE_SAMPLES else ""
    notes = {
        "Samples": f"{shown}Right (✓): the truth word for word, white space apart. A handful of samples is no benchmark.",
        "Records left out": "Each is listed in left_out.jsonl beside this page, with its place and what is wrong with it.",
    }
    parts = [f"<h1>{escape(_title(run))}</h1><p>{escape(str(run.directory.resolve()))}</p>"]
    parts += [f'<p class="wrong">{escape(warning)}</p>' for warning in _warnings(run)]
    parts.append(f'<div class="tiles">{_tiles(run)}</div>')
    for heading, (style, blocks) in sections.items():
        if any(blocks):
            note = f"<p>{escape(notes[heading])}</p>" if heading in notes else ""
            parts.append(f'<h2>{heading}</h2>{note}<div class="{style}">{"".join(blocks)}</div>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(_title(run))}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'


def _tiles(run: Run) -> str:
    """The headline figures: (value, what it is)."""
    tiles: list[tuple[str, str]] = []
    for name, measure, points in _headlines(run):
        if _best(measure.key, points) is not None:
            ends = points if len(points) == 1 else [points[0], points[-1]]
            steps = " → ".join(f"{step:,}" for step, _ in ends)
            tiles.append((" → ".join(number(value) for _, value in ends), f"{name}, step {steps}"))
    if run.samples:
        tiles.append(_score(run.samples))
    if run.seconds is not None:
        tiles.append((duration(run.seconds), "until the last log, h:mm:ss"))
    if "tokens_per_second" in run.measures and run.measures["tokens_per_second"].points:
        speed = median(value for _, value in run.measures["tokens_per_second"].points)
        tiles.append((f"{speed:,.0f}", "tokens per second (median)"))
    return "".join(f'<div class="tile"><b>{escape(value)}</b><p>{escape(name)}</p></div>' for value, name in tiles)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = [f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows]
    return f"<table>{top}{''.join(lines)}</table>"


def _words(value: Any) -> str:
    """A value of `diffvl.json` in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return ", ".join(_words(inner) for inner in value) if isinstance(value, list) else str(value)


def _card(sample: dict[str, Any]) -> str:
    """One sample: picture, question, truth and the answers, each marked right or wrong."""
    lines = [f"<dt>truth</dt><dd>{escape(sample['truth'])}</dd>"]
    for name, answer in _answers(sample):
        style, mark = ("right", "✓") if is_exact(answer, sample["truth"]) else ("wrong", "✗")
        lines.append(f'<dt>{name}</dt><dd class="{style}" title="{style}">{mark} {escape(answer) or "<i>(empty)</i>"}</dd>')
    picture = _picture(Path(sample["image"])) if sample.get("image") else ""
    return f"<article>{picture}<h3>{escape(sample['question'])}</h3><dl>{''.join(lines)}</dl></article>"


def _picture(path: Path) -> str:
    """The picture as the model saw it, inlined at most `PICTURE_SIDE` pixels a side. The page says so where the file is gone or
    no picture."""
    try:
        flat = open_picture(str(path), "report")
    except DataError as error:
        return f"<p>picture not shown ({error.kind}): {escape(str(path))}</p>"
    flat.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    flat.save(buffer := io.BytesIO(), format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img width="{flat.width}" height="{flat.height}" alt="{escape(path.name)}" src="data:image/jpeg;base64,{data}">'


# --- curves --------------------------------------------------------------------------------------------------------------

_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 300, 64, 606, 14, 258  # SVG units, 640 wide; the last four bound the plot


def _charts(measures: dict[str, Measure]) -> list[str]:
    """A figure of each chart that has something to show; held-out curves come last, on top of the others."""
    ordered = sorted(measures.values(), key=lambda measure: measure.key.startswith("eval_"))
    groups = {title: [m for m in ordered if m.points and _named(m.key, words)] for title, words in _CHARTS.items()}
    return [_chart(title, group) for title, group in groups.items() if group]


def _chart(title: str, measures: list[Measure]) -> str:
    """One chart as a figure: SVG, legend, and a caption that says what a reader could mistake."""
    values = [value for measure in measures for _, value in measure.points]
    low, high = min(values), max(values)
    if title in ("Accuracy", "Mask ratio") and low >= 0 and high <= 1:
        low, high = 0, 1
    elif not 0 < 0.6 * high < low < high:  # only a nearly flat curve is drawn from near its own start; the caption says so
        low, high = min(low, 0), max(high, 0)
    ticks_y = _ticks(low, high)
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
            svg += ['<circle cx="{}" cy="{}" r="4">'.format(*place(*dot)) + f"<title>{_at(dot)}</title></circle>" for dot in dots]
            svg.append("</g>")
        if len(measure.points) > DRAWN_POINTS:
            notes.append(f"{measure.key}: of {len(measure.points):,} points the lowest and highest of each stretch are drawn.")
    body = f'<svg viewBox="0 0 640 {_HEIGHT}" role="img" aria-label="{title} over optimiser steps">{"".join(svg)}</svg>'
    caption = f'<figcaption><ul class="legend">{legend}</ul>{escape(" ".join(notes))}</figcaption>'
    return f"<figure><h3>{title}</h3>{body}{caption}</figure>"


def _lines(measure: Measure) -> list[tuple[str, str, Points]]:
    """(style, legend, points) of the lines that one measure is drawn as."""
    if measure.key.startswith("eval_"):
        return [("dots", f"{measure.key} (held out)", measure.points)]
    thin = measure.points
    if len(thin) > DRAWN_POINTS:
        size = math.ceil(2 * len(thin) / DRAWN_POINTS)
        stretches = [thin[i : i + size] for i in range(0, len(thin), size)]
        thin = [point for part in stretches for point in sorted({min(part, key=_value), max(part, key=_value)})]
    if measure.window == 1 or measure.key.startswith("learning_rate"):
        return [("bold", measure.key, thin)]
    bold = measure.smoothed()
    bold = bold[:: -math.ceil(len(bold) / DRAWN_POINTS)][::-1]  # from the end, so that the last point stands
    name = f"mean of the last {measure.window} logged points"
    return [("raw", f"{measure.key}, each logged point", thin), ("bold", name, bold)]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, four to eight of them, that enclose low and high."""
    if low == high:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [round(i * step, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]
