"""What a run shows while it lasts, and the measurements it leaves behind: progress bar, plain lines, `metrics.jsonl`.

Everything here only watches: no callback touches the training state, so a run with them and one without are bit-identical.
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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from diffvl.store.files import replace_text
from diffvl.store.metrics import finite, read_json_lines
from diffvl.terminal.bars import PLAIN_EVERY, duration, number
from diffvl.terminal.console import say

# What the trainer adds to its logs about itself. Its speeds count from the last resume and would contradict `seconds`.
_SUMMARY_KEYS = {"total_flos", "train_loss", "train_tokens_per_second", "num_input_tokens_seen"}
_SUMMARY_ENDINGS = ("_runtime", "_samples_per_second", "_steps_per_second")


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
            replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
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
        measured = {key: finite(value) for key, value in logs.items() if not _is_summary(key)}
        if not measured.keys() - {"epoch"}:
            return
        line = {"stage": self._stage, "step": state.global_step, **measured, "seconds": round(self._clock() - self._began, 3)}
        with self._path.open("a", encoding="utf-8") as file:  # opened per line: what is logged survives a kill
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _is_summary(key: str) -> bool:
    return key in _SUMMARY_KEYS or (key.startswith(("train_", "eval_")) and key.endswith(_SUMMARY_ENDINGS))
