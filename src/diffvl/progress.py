"""What a run shows while it lasts, and the measurements it leaves behind: progress bar, plain lines, `metrics.jsonl`.

Everything here only watches: no callback touches the training state, so a run with them and one without are bit-identical.
A terminal gets one live bar; anything else (a file, a CI log) gets a plain line now and then, never control codes.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffvl.errors import CheckpointError
from diffvl.files import replace_text
from diffvl.terminal import say

METRICS_FILE = "metrics.jsonl"
PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal

# What the trainer adds to its logs about itself. Its speeds count from the last resume and would contradict `seconds`.
_SUMMARY_KEYS = {"total_flos", "train_loss", "train_tokens_per_second", "num_input_tokens_seen"}
_SUMMARY_ENDINGS = ("_runtime", "_samples_per_second", "_steps_per_second")
_PLACES = {"stage", "step", "seconds", "epoch"}  # keys of a line that say where it stands, not what was measured

T = TypeVar("T")
Points = list[tuple[int, float]]  # (optimiser step, value)


def quiet_libraries() -> None:
    """Turns off the progress bars and info messages of transformers and datasets; their warnings stay.

    Downloads from the hub fall silent too (transformers switches both), so a caller shows its own spinner around them.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_warning()
    # By environment, so that it holds whether datasets is imported before or after (importing it here would cost a second).
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.WARNING)


@contextmanager
def spinner_or_line(console: Console, text: str) -> Iterator[None]:
    """Shows `text` during a long step of unknown length: with a spinner on a terminal, as one plain line otherwise."""
    if not console.is_interactive:
        say(console, text)
        yield
        return
    turning = SpinnerColumn("line" if console.options.ascii_only else "dots")
    words = TextColumn("{task.description}", markup=False)
    with Progress(turning, words, TimeElapsedColumn(), console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def track(
    console: Console,
    iterable: Iterable[T],
    total: int | None,
    text: str,
    *,
    every: float = PLAIN_EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yields the items of `iterable` and shows how many are done; `total` None where the length is unknown.

    It may run inside a `TrainingProgress`: its bar then stands below the other one (rich 14.1 and later).
    """
    if console.is_interactive:
        name, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn(elapsed_when_finished=True)
        with Progress(name, BarColumn(), MofNCompleteColumn(), left, console=console) as progress:
            yield from progress.track(iterable, total=total, description=text)
        return
    of = "" if total is None else f"/{total}"
    began = said = clock()
    done = 0
    for done, item in enumerate(iterable, start=1):
        yield item
        if clock() - said >= every:
            said = clock()
            say(console, f"{text}: {done}{of}")
    say(console, f"{text}: {done}{of} done in {duration(clock() - began)}")


class TrainingProgress(TrainerCallback):
    """Step, loss, mask ratio, speed and time left of one stage, shown by the main process only.

    It is a context manager as well: a run that ends by an exception must give the terminal its cursor back, and the trainer
    need not call any callback then.

        with TrainingProgress(console, "diffuse") as progress:
            trainer.add_callback(progress)
            trainer.train()
    """

    def __init__(
        self, console: Console, stage: str, *, every: float = PLAIN_EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`every`: seconds between plain lines where `console` is no terminal."""
        self._console, self._stage, self._every, self._clock = console, stage, every, clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._logs: dict[str, Any] = {}
        self._first_step, self._began, self._said, self._said_step = 0, 0.0, 0.0, -1

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live display, leaving its last state on the screen. Calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._first_step = state.global_step
        self._began = self._said = self._clock()
        if not self._console.is_interactive:
            resumed = f", going on after step {state.global_step}" if state.global_step else ""
            say(self._console, f"{self._stage}: {state.max_steps} steps{resumed}")
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measures]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(self._stage, total=state.max_steps, completed=state.global_step, measures="")
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        evaluation = {key: value for key, value in logs.items() if key.startswith("eval_") and not _is_summary(key)}
        if evaluation:
            words = [f"{key.removeprefix('eval_').replace('_', ' ')} {number(value)}" for key, value in evaluation.items()]
            say(self._console, f"{self._stage}: held out, step {state.global_step}: " + ", ".join(words))
        self._logs.update(logs)
        self._show(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._show(state)
        if self._bar is None and self._clock() - self._said >= self._every:
            self._say_step(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._show(state)
        if self._bar is None:
            self._say_step(state)
        self.close()

    def _show(self, state: TrainerState) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, measures=" ".join(self._measures(state)))

    def _say_step(self, state: TrainerState) -> None:
        if self._said_step == state.global_step:
            return
        self._said, self._said_step = self._clock(), state.global_step
        say(self._console, f"{self._stage}: step {state.global_step}/{state.max_steps}  " + "  ".join(self._measures(state)))

    def _measures(self, state: TrainerState) -> list[str]:
        """The latest logged figures in words, and the time left (or, at the end, the time taken)."""
        names = {"loss": "loss {:.3f}", "mask_ratio": "mask {:.2f}", "tokens_per_second": "{:.0f} tok/s"}
        words = [form.format(self._logs[key]) for key, form in names.items() if isinstance(self._logs.get(key), (int, float))]
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        elapsed = self._clock() - self._began
        if left <= 0:
            words.append(f"took {duration(elapsed)}")
        elif done > 0:
            words.append(f"{duration(elapsed / done * left)} left")
        return words


class MetricsLog(TrainerCallback):
    """Appends every log of the trainer to a JSON-lines file, so that after any number of resumes each step stands there once."""

    def __init__(self, path: Path, stage: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._stage, self._clock = path, stage, clock
        self._began = clock()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drops the lines past the step that training goes on from: they belong to steps which are about to be run again."""
        if not state.is_world_process_zero:
            return
        kept = []
        if self._path.exists():
            # A run killed before its first checkpoint starts again from step 0, and evaluates there again.
            if state.global_step > 0:
                kept = [line for line in read_json_lines(self._path) if line.get("step", 0) <= state.global_step]
            write_beside(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        # `seconds` goes on from the last kept line: time spent on lost steps and between two runs is not counted.
        self._began = self._clock() - max((line.get("seconds", 0.0) for line in kept), default=0.0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        measured = {key: _finite(value) for key, value in logs.items() if not _is_summary(key)}
        if not measured.keys() - {"epoch"}:
            return
        line = {"stage": self._stage, "step": state.global_step, **measured, "seconds": round(self._clock() - self._began, 3)}
        with self._path.open("a", encoding="utf-8") as file:  # opened per line: what is logged survives a kill
            file.write(json.dumps(line, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Measure:
    """One key of `metrics.jsonl` over the steps; `lost` values were NaN or infinite and are not among the points."""

    key: str
    points: Points
    lost: int

    @property
    def window(self) -> int:
        """Logged points in the moving average: a twentieth of them, at most 100."""
        return min(max(len(self.points) // 20, 1), 100)

    def smoothed(self) -> Points:
        """The mean of the last `window` points, from the first step that has as many."""
        values, size = [value for _, value in self.points], self.window
        return [(self.points[end - 1][0], sum(values[end - size : end]) / size) for end in range(size, len(values) + 1)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file. A last line cut short by a killed process is left out; any other bad line is an error.

    Raises:
        CheckpointError: naming file and line.
    """
    objects = []
    lines = path.read_bytes().split(b"\n")
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if count == len(lines):
                break
            raise CheckpointError(f"{path}:{count}: not valid JSON ({error}); mend or remove this line") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}:{count}: expected a JSON object, not {type(value).__name__}; mend or remove it")
        objects.append(value)
    return objects


def measures_of(lines: list[dict[str, Any]]) -> dict[str, Measure]:
    """The lines of a `metrics.jsonl` as one curve a key. A step measured twice keeps its last value."""
    values: dict[str, dict[int, float | None]] = {}
    for line in lines:
        for key, value in line.items():
            if "step" in line and key not in _PLACES and (value is None or isinstance(value, (int, float))):
                values.setdefault(key, {})[line["step"]] = _finite(value)
    measures = {}
    for key, by_step in values.items():
        points = sorted((step, value) for step, value in by_step.items() if value is not None)
        measures[key] = Measure(key, points, lost=len(by_step) - len(points))
    return measures


def write_beside(path: Path, text: str) -> None:
    """Writes `text` to `path` by way of a file beside it, so that no reader and no kill ever meets half a file."""
    replace_text(path, text)


def _is_summary(key: str) -> bool:
    return key in _SUMMARY_KEYS or (key.startswith(("train_", "eval_")) and key.endswith(_SUMMARY_ENDINGS))


def _finite(value: Any) -> Any:
    """NaN and infinity have no JSON: they become null, which the report counts and names."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float, digits: int = 4) -> str:
    """So many significant digits; a whole number in full."""
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def duration(seconds: float) -> str:
    """h:mm:ss"""
    return str(timedelta(seconds=round(seconds)))
