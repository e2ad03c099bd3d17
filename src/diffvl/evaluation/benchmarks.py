"""`diffvl evaluate DIR --tasks ...`: benchmarks of lmms-eval on a checkpoint -> figures, which land beside it.

Tasks run one after the other, and what a finished one says is written at once: a run that is ended keeps it.
"""

import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]  (extra `eval`)
from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from rich.console import Console
from tenacity import RetryError  # pyright: ignore[reportMissingImports]  (comes with lmms-eval)

from diffvl.decode.answer import load_for_decoding
from diffvl.errors import DataError, UsageError, first_line
from diffvl.evaluation.benchmark_answers import TaskFigures
from diffvl.evaluation.lmms import DiffVLChat, DiffVLSimple
from diffvl.evaluation.task_settings import as_record
from diffvl.machine import describe, versions
from diffvl.store.evaluation import EVALUATION_FILE, Result, merge_results, read_results
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import say

GIVEN_CHOICES = {"loglikelihood", "multiple_choice"}  # kinds of tasks that lmms-eval runs through its simple interface only


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
        UsageError: for a task that is not there, or settings that do not fit, before any work.
        CheckpointError: if the directory is no checkpoint, or its `evaluation.json` is damaged.
        DataError: if a task's data cannot be loaded.
    """
    with spinner_or_line(console, "looking for the tasks"):
        manager = TaskManager("ERROR", None if request.include_path is None else str(request.include_path), model_name="diffvl")
    _require_known(request.tasks, manager, request.include_path)
    read_results(directory)  # a damaged file is told before hours of work
    decoder = load_for_decoding(directory)
    found: list[Result] = []
    for name in request.tasks:
        kind = DiffVLSimple if _kinds_of(name, manager) & GIVEN_CHOICES else DiffVLChat
        model = kind(decoder, request.batch_size, **request.settings)
        start = time.monotonic()
        try:
            results = simple_evaluate(
                model=model, tasks=[name], task_manager=manager, limit=request.limit, log_samples=False, verbosity="ERROR"
            )
        except (RetryError, DatasetsError, ConnectionError, FileNotFoundError) as error:
            cause = error.__cause__ if isinstance(error, RetryError) else error  # what it tried several times
            raise DataError(f"task {name}: lmms-eval could not load its data ({first_line(cause or error)})") from error
        except ModuleNotFoundError as error:
            raise UsageError(f"task {name} needs the package {error.name}, which is not installed here: install it") from error
        fresh = results_of(results, model.answering.figures, decoder.model.config, time.monotonic() - start)
        merge_results(directory, fresh)
        found += fresh
        say(console, f"wrote {name} to ", (str(directory / EVALUATION_FILE), "bold"))
    return found


def _require_known(tasks: Sequence[str], manager: Any, include_path: Path | None) -> None:
    """Raises UsageError for names that lmms-eval does not have."""
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path: {include_path} is no folder; expected one with YAML files of tasks")
    if absent := [name for name in tasks if name not in manager.all_tasks]:
        raise UsageError(
            f"--tasks: lmms-eval has no task {', '.join(absent)}; `python -m lmms_eval --tasks list` lists what it has, and "
            "--include-path names a folder with tasks of your own"
        )


def _kinds_of(name: str, manager: Any) -> set[str]:
    """The output types of a task, or of all tasks of a group or tag, as their files say it."""
    if not (manager._name_is_group(name) or manager._name_is_tag(name)):
        return {str(manager._get_config(name).get("output_type"))}
    listed = manager._get_tasklist(name)
    members = manager._get_config(name).get("task", []) if listed == -1 else listed
    found: set[str] = set()
    for member in [members] if isinstance(members, str) else members:
        found |= _kinds_of(member, manager) if isinstance(member, str) else {str(member.get("output_type"))}
    return found


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
