"""What long work shows while it lasts: bars and spinners on a terminal, plain lines elsewhere; and figures in words."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diffvl.terminal.console import say

PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal

T = TypeVar("T")


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
    label = TextColumn("{task.description}", markup=False)
    with Progress(turning, label, TimeElapsedColumn(), console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def track(
    console: Console,
    iterable: Iterable[T],
    total: int | None,
    text: str | Callable[[], str],
    done: int = 0,
    *,
    every: float = PLAIN_EVERY,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Yields the items of `iterable` and shows how many are done; `total` None where the length is unknown. An estimated total
    gives way to the number of items that there were.

    It may run inside a `TrainingProgress`: its bar then stands below the other one (rich 14.1 and later).

    Args:
        text: what is being done; a function is asked again with every item.
        done: how many of `total` were done before; the items are the rest.
    """

    def told() -> str:
        return text if isinstance(text, str) else text()

    if console.is_interactive:
        name, left = TextColumn("{task.description}", markup=False), TimeRemainingColumn(elapsed_when_finished=True)
        with Progress(name, BarColumn(), MofNCompleteColumn(), left, console=console) as progress:
            task = progress.add_task(told(), total=total, completed=done)
            for count, item in enumerate(iterable, start=done + 1):
                yield item
                most = total if total is None else max(total, count)
                progress.update(task, completed=count, total=most, description=told())
            progress.update(task, total=progress.tasks[task].completed)
        return
    began = last_line = clock()
    count = done
    for count, item in enumerate(iterable, start=done + 1):
        yield item
        if clock() - last_line >= every:
            last_line = clock()
            out_of = "" if total is None else f"/{total}"
            left = "" if total is None or isinstance(text, str) else _left(last_line - began, count - done, total - count)
            say(console, f"{told()}: {count}{out_of}{left}")
    out_of = "" if total is None else f"/{count}"
    say(console, f"{told()}: {count}{out_of} done in {duration(clock() - began)}")


def _left(seconds: float, done: int, rest: int) -> str:
    """How long the rest will take, if it goes on as it went."""
    return f", {duration(seconds / done * max(rest, 0))} left"


def number(value: float, digits: int = 4) -> str:
    """Writes a figure with `digits` significant digits; a whole number in full."""
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def duration(seconds: float) -> str:
    """Writes seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
