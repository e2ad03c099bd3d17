"""A finished stage as a page: `report.html` beside the run. It is one file: styles, curves (SVG) and images (data URIs) stand
inside it, no script runs and nothing is fetched.
"""

from pathlib import Path
from statistics import median
from typing import Any

from diffvl.data.textscore import is_exact
from diffvl.report.chart import escape
from diffvl.report.charts import draw_charts
from diffvl.report.document import document, table
from diffvl.report.stage_run import (
    REPORT_FILE,
    StageRun,
    answers_of,
    best_of,
    headlines,
    read_stage,
    score_of,
    summary_rows,
    title_of,
    warnings_of,
)
from diffvl.report.visuals import draw_visual
from diffvl.store.files import replace_text
from diffvl.terminal.bars import duration, number

PAGE_SAMPLES = 60


def write_report(directory: Path) -> Path:
    """Writes `report.html` into a stage directory and returns its path.

    Raises:
        CheckpointError: no measurements there, or a file that cannot be read as what it is.
    """
    path = directory / REPORT_FILE
    replace_text(path, _page(read_stage(directory)))
    return path


# --- the page ---------------------------------------------------------------------------------------------------------------


def _page(run: StageRun) -> str:
    """Writes the whole page; a section without content is left out."""
    settings = f"<details><summary>run.yaml</summary><pre>{escape(run.settings)}</pre></details>"
    sections = {
        "Curves": ("curves", draw_charts(run.measures)),
        "First, last and best": ("", [table(("", "first", "last", "best"), summary_rows(run))]),
        "Samples": ("samples", [_card(sample) for sample in run.samples[:PAGE_SAMPLES]]),
        "Settings": ("", [settings] if run.settings else []),
        "Records left out": ("", [table((), [(kind, f"{count:,}") for kind, count in run.left_out.items()])]),
        "Where it came from": ("", [table((), [(key, _words(value)) for key, value in run.provenance.items()])]),
    }
    limit = f"The first {PAGE_SAMPLES} of {len(run.samples):,}. " if len(run.samples) > PAGE_SAMPLES else ""
    notes = {
        "Samples": f"{limit}Right (✓): the truth word for word, white space apart. A handful of samples is no benchmark.",
        "Records left out": "Each is listed in left_out.jsonl beside this page, with its place and what is wrong with it.",
    }
    parts = [f"<h1>{escape(title_of(run))}</h1><p>{escape(str(run.directory.resolve()))}</p>"]
    parts += [f'<p class="wrong">{escape(warning)}</p>' for warning in warnings_of(run)]
    parts.append(f'<div class="tiles">{_tiles(run)}</div>')
    for heading, (style, blocks) in sections.items():
        if any(blocks):
            note = f"<p>{escape(notes[heading])}</p>" if heading in notes else ""
            parts.append(f'<h2>{heading}</h2>{note}<div class="{style}">{"".join(blocks)}</div>')
    return document(title_of(run), parts)


def _tiles(run: StageRun) -> str:
    """Gives the headline figures: (value, what it is)."""
    tiles: list[tuple[str, str]] = []
    for name, measure, points in headlines(run):
        if best_of(measure.key, points) is not None:
            ends = points if len(points) == 1 else [points[0], points[-1]]
            steps = " → ".join(f"{step:,}" for step, _ in ends)
            tiles.append((" → ".join(number(value) for _, value in ends), f"{name}, step {steps}"))
    if run.samples:
        tiles.append(score_of(run.samples))
    if run.seconds is not None:
        tiles.append((duration(run.seconds), "until the last log, h:mm:ss"))
    if "tokens_per_second" in run.measures and run.measures["tokens_per_second"].points:
        speed = median(value for _, value in run.measures["tokens_per_second"].points)
        tiles.append((f"{speed:,.0f}", "tokens per second (median)"))
    return "".join(f'<div class="tile"><b>{escape(value)}</b><p>{escape(name)}</p></div>' for value, name in tiles)


def _words(value: Any) -> str:
    """Gives a value of `diffvl.json` in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return ", ".join(_words(inner) for inner in value) if isinstance(value, list) else str(value)


def _card(sample: dict[str, Any]) -> str:
    """Shows one sample: image, question, truth and the answers, each marked right or wrong."""
    lines = [f"<dt>truth</dt><dd>{escape(sample['truth'])}</dd>"]
    for name, answer in answers_of(sample):
        style, mark = ("right", "✓") if is_exact(answer, sample["truth"]) else ("wrong", "✗")
        lines.append(f'<dt>{name}</dt><dd class="{style}" title="{style}">{mark} {escape(answer) or "<i>(empty)</i>"}</dd>')
    visual = draw_visual(sample.get("image"), sample.get("video"))
    return f"<article>{visual}<h3>{escape(sample['question'])}</h3><dl>{''.join(lines)}</dl></article>"
