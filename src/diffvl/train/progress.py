"""What a run shows while it lasts, and the measurements it leaves behind: progress bar, plain lines, `metrics.jsonl`.

Everything here only watches: nothing touches the training state, so a run that is watched and one that is not are bit-identical.
A terminal gets one live bar; anything else (a file, a CI log) gets a plain line now and then, never control codes.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
)
from rich.table import Column

from diffvl.store.files import replace_text
from diffvl.store.metrics import finite, read_json_lines
from diffvl.terminal.bars import PLAIN_EVERY, duration, number
from diffvl.terminal.console import say


class TrainingProgress:
    """Step, loss, mask ratio, speed and time left of one stage.

    It is a context manager: a run that ends by an exception must give the terminal its cursor back.
    """

    def __init__(
        self, console: Console, stage: str, *, every: float = PLAIN_EVERY, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`every`: seconds between plain lines where `console` is no terminal."""
        self._console, self._stage, self._every, self._clock = console, stage, every, clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._logs: dict[str, Any] = {}
        self._first_step = self._steps = 0
        self._began, self._said, self._said_step = 0.0, 0.0, -1

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live display, leaving its last state on the screen. Calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def begin(self, step: int, steps: int) -> None:
        """Training begins when `step` of `steps` are done."""
        self._first_step, self._steps = step, steps
        self._began = self._said = self._clock()
        if not self._console.is_interactive:
            resumed = f", going on after step {step}" if step else ""
            say(self._console, f"{self._stage}: {steps} steps{resumed}")
            return
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[measures]}", markup=False, table_column=Column(no_wrap=True)),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task(self._stage, total=steps, completed=step, measures="")
        self._bar.start()

    def log(self, step: int, line: dict[str, Any]) -> None:
        """What was measured up to a step; figures of held-out records are told at once."""
        evaluation = {key: value for key, value in line.items() if key.startswith("eval_")}
        if evaluation:
            words = [f"{key.removeprefix('eval_').replace('_', ' ')} {number(value)}" for key, value in evaluation.items()]
            say(self._console, f"{self._stage}: held out, step {step}: " + ", ".join(words))
        self._logs.update(line)
        self._show(step)

    def step(self, step: int) -> None:
        """A step is done."""
        self._show(step)
        if self._bar is None and self._clock() - self._said >= self._every:
            self._say_step(step)

    def end(self, step: int) -> None:
        """Training is over."""
        self._show(step)
        if self._bar is None:
            self._say_step(step)
        self.close()

    def _show(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, measures=" ".join(self._measures(step)))

    def _say_step(self, step: int) -> None:
        if self._said_step == step:
            return
        self._said, self._said_step = self._clock(), step
        say(self._console, f"{self._stage}: step {step}/{self._steps}  " + "  ".join(self._measures(step)))

    def _measures(self, step: int) -> list[str]:
        """The latest logged figures in words, and the time left (or, at the end, the time taken)."""
        names = {"loss": "loss {:.3f}", "mask_ratio": "mask {:.2f}", "tokens_per_second": "{:.0f} tok/s"}
        words = [form.format(self._logs[key]) for key, form in names.items() if isinstance(self._logs.get(key), (int, float))]
        done, left = step - self._first_step, self._steps - step
        elapsed = self._clock() - self._began
        if left <= 0:
            words.append(f"took {duration(elapsed)}")
        elif done > 0:
            words.append(f"{duration(elapsed / done * left)} left")
        return words


class MetricsLog:
    """Appends what was measured to `metrics.jsonl`, one line a log; after a resume without what was lost."""

    def __init__(self, path: Path, stage: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._stage, self._clock = path, stage, clock
        self._began = clock()

    def begin(self, step: int) -> None:
        """Keeps the lines up to the step that training goes on from: later ones belong to steps which are run again."""
        kept = []
        if self._path.exists():
            # A run killed before its first checkpoint starts again from step 0, and evaluates there again.
            if step > 0:
                kept = [line for line in read_json_lines(self._path) if line.get("step", 0) <= step]
            replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        # `seconds` goes on from the last kept line: time spent on lost steps and between two runs is not counted.
        self._began = self._clock() - max((line.get("seconds", 0.0) for line in kept), default=0.0)

    def log(self, step: int, line: dict[str, Any]) -> None:
        """Appends a line; values that are not finite are written as null."""
        measured = {key: finite(value) for key, value in line.items()}
        text = json.dumps(
            {"stage": self._stage, "step": step, **measured, "seconds": round(self._clock() - self._began, 3)}, allow_nan=False
        )
        with self._path.open("a", encoding="utf-8") as file:  # opened per line: what is logged survives a kill
            file.write(text + "\n")


class Watchers:
    """Who is told of a stage's steps: the bar and the file, in the main process; elsewhere nobody."""

    def __init__(self, progress: TrainingProgress, metrics: MetricsLog, is_main_process: bool) -> None:
        self._progress, self._metrics, self._tells = progress, metrics, is_main_process

    def begin(self, step: int, steps: int) -> None:
        if self._tells:
            self._metrics.begin(step)
            self._progress.begin(step, steps)

    def log(self, step: int, line: dict[str, Any]) -> None:
        if self._tells:
            self._metrics.log(step, line)
            self._progress.log(step, line)

    def step(self, step: int) -> None:
        if self._tells:
            self._progress.step(step)

    def end(self, step: int) -> None:
        if self._tells:
            self._progress.end(step)
