"""A stage's directory -> what is told of it: measurements, samples, settings and provenance, the figures worth a headline; and
the few lines of it on the terminal.

Only what training left there is read (`metrics.jsonl`, `samples.jsonl`, `run.yaml`, `diffvl.json`), so that page and summary can
be made again at any time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffvl.config.resolve import read_yaml
from diffvl.data.textscore import is_exact
from diffvl.errors import CheckpointError
from diffvl.store.files import read_json
from diffvl.store.metrics import METRICS_FILE, Measure, Points, measures_of, read_json_lines
from diffvl.terminal.bars import number
from diffvl.terminal.console import say, visible

REPORT_FILE = "report.html"
SAMPLES_FILE = "samples.jsonl"
SHARES = ("accuracy", "match", "similarity")  # figures between 0 and 1, the more the better

value_of = itemgetter(1)  # of a point


@dataclass(frozen=True)
class StageRun:
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


def read_stage(directory: Path) -> StageRun:
    """Reads a stage directory.

    Raises:
        CheckpointError: no measurements there, or a file that cannot be read as what it is.
    """
    metrics = directory / METRICS_FILE
    if not metrics.is_file():
        raise CheckpointError(f"{metrics}: not found; expected the directory of a stage that has run, e.g. runs/MODEL/diffuse")
    lines = read_json_lines(metrics)
    if not lines:
        raise CheckpointError(f"{metrics}: holds no measurement; the stage stopped before its first log, run it again")
    samples = _read_samples(directory / SAMPLES_FILE)
    settings, provenance = directory / "run.yaml", directory / "diffvl.json"
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    return StageRun(
        directory=directory,
        stage=", ".join(dict.fromkeys(str(line["stage"]) for line in lines if "stage" in line)) or directory.name,
        measures=measures_of(lines),
        samples=samples,
        settings=settings.read_text(encoding="utf-8") if settings.is_file() else "",
        model=str(read_yaml(settings).get("model") or "") if settings.is_file() else "",
        provenance=read_json(provenance) if provenance.is_file() else {},
        seconds=max(seconds) if seconds else None,
    )


def _read_samples(path: Path) -> list[dict[str, Any]]:
    samples = read_json_lines(path) if path.is_file() else []
    for count, sample in enumerate(samples, start=1):
        wrong = [key for key in ("question", "truth", "after") if not isinstance(sample.get(key), str)]
        if wrong:
            raise CheckpointError(f"{path}: sample {count}: {', '.join(wrong)} should be text; write the samples again")
    return samples


def title_of(run: StageRun) -> str:
    """Names model and stage."""
    return " · ".join(word for word in (run.model, run.stage) if word)


def headlines(run: StageRun) -> list[tuple[str, Measure, Points]]:
    """Gives (name, measure, its points) of the training loss, smoothed, and of every evaluation figure."""
    rows = [(key, m, m.points) for key, m in run.measures.items() if key.startswith("eval_") and m.points]
    loss = run.measures.get("loss")
    if loss and loss.points:
        name = "loss" if loss.window == 1 else f"loss, mean of {loss.window} logged points"
        rows.insert(0, (name, loss, loss.smoothed()))
    return rows


def summary_rows(run: StageRun) -> list[tuple[str, str, str, str]]:
    """Gives (name, first, last, best) of every headline, each figure with its step."""
    rows = []
    for name, measure, points in headlines(run):
        best = best_of(measure.key, points)
        once = len(points) == 1
        last = "–" if once else with_step(points[-1])
        rows.append((name, with_step(points[0]), last, "–" if once or best is None else with_step(best)))
    return rows


def is_named(key: str, parts: Sequence[str]) -> bool:
    """Tells whether one of the parts stands in the key of a measure."""
    return any(part in key for part in parts)


def best_of(key: str, points: Points) -> tuple[int, float] | None:
    """Gives the best of `points` where the key says which way is better."""
    if "loss" in key:
        return min(points, key=value_of)
    return max(points, key=value_of) if is_named(key, SHARES) else None


def with_step(point: tuple[int, float]) -> str:
    """Writes a figure with its step."""
    return f"{number(point[1])} (step {point[0]})"


def warnings_of(run: StageRun) -> list[str]:
    """Lists what a reader must know before the figures."""
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in run.left_out.items())
    return [f"records left out: {left_out} (listed in left_out.jsonl)"] * bool(left_out) + [
        f"{key}: NaN or infinite at {m.lost} of {m.lost + len(m.points)} logged steps, which are left out"
        for key, m in run.measures.items()
        if m.lost
    ]


def answers_of(sample: dict[str, Any]) -> list[tuple[str, str]]:
    """Gives (when, answer) of a sample, before and after training."""
    return [(name, sample[name].strip()) for name in ("before", "after") if sample.get(name) is not None]


def score_of(samples: list[dict[str, Any]]) -> tuple[str, str]:
    """Counts the samples that are answered right: (how many, what that counts)."""
    answers = [dict(answers_of(sample), truth=sample["truth"]) for sample in samples]
    names = [name for name in ("before", "after") if all(name in answer for answer in answers)]
    counts = [str(sum(is_exact(answer[name], answer["truth"]) for answer in answers)) for name in names]
    return f"{' → '.join(counts)} of {len(samples)}", f"samples answered right, {' → '.join(names)}"


TERMINAL_SAMPLES = 4


def print_summary(directory: Path, console: Console) -> None:
    """Prints the run in a few lines: loss and evaluation first, last and best, some answers, where the report is.

    Raises:
        CheckpointError: as `write_report`.
    """
    run = read_stage(directory)
    table = Table("", "first", "last", "best", title=Text(visible(title_of(run))), title_justify="left")
    for row in summary_rows(run):
        table.add_row(*(Text(visible(cell)) for cell in row))
    console.print(table)
    for warning in warnings_of(run):
        say(console, (warning, "red"))
    for sample in run.samples[:TERMINAL_SAMPLES]:
        say(console, (f"\n{sample['question']}", "bold"), f"\n  truth   {sample['truth']}")
        for name, answer in answers_of(sample):
            mark, style = ("right", "green") if is_exact(answer, sample["truth"]) else ("wrong", "red")
            say(console, f"  {name:<7} ", (answer or "(empty)", style), f"  [{mark}]")
    if run.samples:
        score, meaning = score_of(run.samples)
        say(console, f"\n{meaning}: {score}")
    if (directory / REPORT_FILE).exists():
        say(console, f"report: {directory / REPORT_FILE}")
