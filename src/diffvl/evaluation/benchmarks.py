"""`diffvl evaluate DIR --tasks ...`: benchmarks of lmms-eval on a checkpoint -> figures, which land beside it.

Tasks run one after the other, and what a finished one says is written at once: a run that is ended keeps it. Whoever imports this
or runs tasks and wants stdout for itself sends it elsewhere before: lmms-eval logs there, and many tasks print.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lmms_eval.__main__ import parse_eval_args  # pyright: ignore[reportMissingImports]  (extra `eval`)
from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from rich.console import Console
from tenacity import RetryError  # pyright: ignore[reportMissingImports]  (comes with lmms-eval)

from diffvl.decode.answer import load_for_decoding
from diffvl.errors import DataError, DiffvlError, ScoringError, first_line
from diffvl.evaluation.benchmark_answers import TaskFigures
from diffvl.evaluation.likelihood import is_exact
from diffvl.evaluation.lmms import DiffVLChat, DiffVLSimple
from diffvl.evaluation.task_kinds import (
    GIVEN_CHOICES,
    Kinds,
    kinds_of,
    needs_package,
    refuse_unanswerable,
    require_known,
)
from diffvl.evaluation.task_settings import as_record
from diffvl.machine import describe, versions
from diffvl.store.checkpoint import load_description
from diffvl.store.evaluation import EVALUATION_FILE, Result, merge_results, read_results
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import OutputError, say

TASKS_FILES = "benchmarks"  # folder beside the checkpoint for files that tasks write of themselves: answers to submit, say


@dataclass(frozen=True)
class Benchmarks:
    """What the command line asks for.

    tasks: names of tasks, groups or tags of lmms-eval. settings: how to decode, by name; they hold against what a task asks for.
    limit: documents of each task, None for all. include_path: a folder with tasks of one's own.
    """

    tasks: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    limit: int | None = None
    include_path: Path | None = None


def run_benchmarks(directory: Path, request: Benchmarks, console: Console) -> list[Result]:
    """Runs the tasks and writes their results into `evaluation.json` of the checkpoint.

    Raises:
        UsageError: for a task that is not there or cannot be answered, or settings that do not fit, before any work.
        CheckpointError: if the directory is no checkpoint, or its `evaluation.json` is damaged.
        DataError: if a task's data cannot be loaded.
        ScoringError: if a task's answers cannot be scored.
    """
    with spinner_or_line(console, "looking for the tasks"):
        manager = TaskManager("ERROR", None if request.include_path is None else str(request.include_path), model_name="diffvl")
    require_known(request.tasks, manager, request.include_path)
    kinds = {name: kinds_of(name, manager) for name in request.tasks}
    _require_answerable(directory, kinds, request)
    read_results(directory)  # a damaged file is told before hours of work
    decoder = load_for_decoding(directory)
    found: list[Result] = []
    for name in request.tasks:
        interface = DiffVLSimple if GIVEN_CHOICES & set(kinds[name].values()) else DiffVLChat
        model = interface(decoder, request.batch_size, **request.settings)
        start = time.monotonic()
        results = _evaluated(name, model, manager, directory, request)
        fresh = results_of(results, model.answering.figures, decoder.model.config, time.monotonic() - start)
        merge_results(directory, fresh)
        found += fresh
        say(console, f"wrote {name} to ", (str(directory / EVALUATION_FILE), "bold"))
    return found


def _require_answerable(directory: Path, kinds: Mapping[str, Kinds], request: Benchmarks) -> None:
    """Raises UsageError as `refuse_unanswerable`; the checkpoint's weights are not needed to tell."""
    exact = True
    if any(GIVEN_CHOICES & set(found.values()) for found in kinds.values()):
        exact = is_exact(load_description(directory)[0], request.settings.get("mode"))
    refuse_unanswerable(kinds, exact)


def _evaluated(name: str, model: DiffVLChat, manager: Any, directory: Path, request: Benchmarks) -> Any:
    """lmms-eval's results of a task. Raises UsageError, DataError, ScoringError."""
    try:
        return simple_evaluate(
            model=model,
            tasks=[name],
            task_manager=manager,
            limit=request.limit,
            log_samples=False,
            verbosity="ERROR",
            cli_args=arguments_of(name, directory, request),
        )
    except (DiffvlError, OutputError):
        raise
    except Exception as error:  # scoring is the task's own code, which may raise anything
        if (told := _told(name, error, model)) is None:
            raise
        raise told from error


def arguments_of(name: str, directory: Path, request: Benchmarks) -> argparse.Namespace:
    """What lmms-eval's own command line would hand over: some tasks read it while scoring, and by its default texts between
    `<think>` and `</think>` are left out of what is scored.

    `model_args` has the last folder of the checkpoint's path alone: tasks write these words into their files.
    """
    given = sys.argv
    sys.argv = ["lmms_eval"]  # its parser reads nothing else, and we want the defaults
    try:
        _, arguments = parse_eval_args()
    finally:
        sys.argv = given
    arguments.model, arguments.model_args, arguments.tasks = "diffvl", f"pretrained={directory.resolve().name}", name
    arguments.batch_size, arguments.limit = request.batch_size, request.limit
    arguments.output_path = str(directory / TASKS_FILES)  # without, tasks write into the current folder
    arguments.process_with_media = True  # documents are scored with their images, as without these arguments
    return arguments


def _told(name: str, error: Exception, model: DiffVLChat) -> DiffvlError | None:
    """The message for what failed in lmms-eval; None for a fault that is none of a task's data or scores."""
    tried = isinstance(error, RetryError)
    cause = error.__cause__ if tried and error.__cause__ is not None else error  # what it tried several times
    if isinstance(cause, ModuleNotFoundError):
        return needs_package(name, cause)
    words = f"{type(cause).__name__}: {first_line(cause)}"
    if model.is_answered:
        return ScoringError(f"task {name}: all of it was answered, but the answers could not be scored ({words})")
    if isinstance(cause, DatasetsError | ConnectionError | FileNotFoundError) or (tried and isinstance(cause, OSError)):
        return DataError(f"task {name}: lmms-eval could not load its data ({first_line(cause)})")
    return DataError(f"task {name}: lmms-eval could not set it up ({words})") if tried else None


def results_of(results: Any, figures: Mapping[str, TaskFigures], config: Any, seconds: float) -> list[Result]:
    """lmms-eval's results -> one result for each task and group: its metrics, how they came about, and what that took.

    Args:
        figures: of each task. seconds: of everything, for a group.
    """
    common = {
        "date": datetime.date.today().isoformat(),
        "machine": describe(),
        "versions": {**versions(), "lmms_eval": version("lmms_eval")},
    }
    decoded = next(iter(figures.values()), None)
    found = []
    for task, values in results["results"].items():
        own = figures.get(task)
        how = own or decoded
        found.append(
            {
                "task": task,
                "metrics": metrics_of(values),
                "n": sum(results["n-samples"][leaf]["effective"] for leaf in _leaves(task, results)),
                "task_version": results["versions"].get(task),
                "n_shot": results["n-shot"].get(task),
                "decoding": {} if how is None else as_record(how.how.settings.for_checkpoint(config)),
                "not_used": [] if how is None else list(how.how.unused),
                "seconds": round(seconds if own is None else own.seconds, 3),
                **({} if own is None else {"answers": own.answers, "tokens": own.tokens, "forwards": own.forwards}),
                **common,
            }
        )
    return found


def _leaves(name: str, results: Any) -> set[str]:
    """A task, or all tasks of a group and of its groups. Documents are counted for tasks alone, and answers are others: each
    given choice is one, and each repeat."""
    if name in results["n-samples"]:
        return {name}
    return {leaf for member in results["group_subtasks"].get(name, ()) for leaf in _leaves(member, results)}


def metrics_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The metrics of a task: lmms-eval names them "metric,filter", and their standard errors "metric_stderr,filter"."""
    metrics = []
    for key, value in values.items():
        name, comma, chosen = key.partition(",")
        if not comma or "_stderr" in name or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{chosen}")
        metrics.append({"metric": name, "filter": chosen, "value": value})
        if isinstance(error, int | float):
            metrics[-1]["stderr"] = error
    return metrics
