"""A finished stage as a page: `report.html` beside the run. It is one file: styles, curves (SVG) and images (data URIs) stand
inside it, no script runs and nothing is fetched.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from diffvl.data.images import open_image
from diffvl.data.references import shown
from diffvl.data.textscore import is_exact
from diffvl.data.videos import Video, open_video
from diffvl.errors import DataError
from diffvl.hub.clips_diffvl import Sampler
from diffvl.report.charts import draw_charts, escape
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
from diffvl.store.files import replace_text
from diffvl.terminal.bars import duration, number

IMAGE_SIDE = 224  # pixels
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


def _page(run: StageRun) -> str:
    """Writes the whole page; a section without content is left out."""
    settings = f"<details><summary>run.yaml</summary><pre>{escape(run.settings)}</pre></details>"
    sections = {
        "Curves": ("curves", draw_charts(run.measures)),
        "First, last and best": ("", [_table(("", "first", "last", "best"), summary_rows(run))]),
        "Samples": ("samples", [_card(sample) for sample in run.samples[:PAGE_SAMPLES]]),
        "Settings": ("", [settings] if run.settings else []),
        "Records left out": ("", [_table((), [(kind, f"{count:,}") for kind, count in run.left_out.items()])]),
        "Where it came from": ("", [_table((), [(key, _words(value)) for key, value in run.provenance.items()])]),
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
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title_of(run))}</title>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n'


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


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    lines = [f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row[1:])}</tr>" for row in rows]
    return f"<table>{top}{''.join(lines)}</table>"


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
    image = _image(sample["image"]) if sample.get("image") else _frame(sample["video"]) if sample.get("video") else ""
    return f"<article>{image}<h3>{escape(sample['question'])}</h3><dl>{''.join(lines)}</dl></article>"


def _image(name: str) -> str:
    """Inlines the image as the model saw it, at most `IMAGE_SIDE` pixels a side. The page says so where the file is gone or
    no image."""
    try:
        flat = open_image(name, "report")
    except DataError as error:
        return f"<p>image not shown ({error.kind}): {escape(shown(name))}</p>"
    return _inlined(flat, Path(shown(name)))


def _frame(video: str | list[str]) -> str:
    """Inlines the frame in the middle of a video."""
    middle = Sampler(lambda facts: [facts.total_num_frames // 2], 1.0, 1)
    clip_name: Video = video if isinstance(video, str) else tuple(video)
    name = Path(shown(video if isinstance(video, str) else video[0]))
    try:
        clip = open_video(clip_name, "report", middle)
    except DataError as error:
        return f"<p>video not shown ({error.kind}): {escape(str(name))}</p>"
    return _inlined(Image.fromarray(clip.frames[0].permute(1, 2, 0).numpy()), name)


def _inlined(flat: Image.Image, path: Path) -> str:
    flat.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    flat.save(buffer := io.BytesIO(), format="JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size, alt = f'width="{flat.width}" height="{flat.height}"', escape(path.name)
    return f'<img {size} alt="{alt}" src="data:image/jpeg;base64,{data}">'
