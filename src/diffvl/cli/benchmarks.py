"""`diffvl evaluate --tasks`: flags -> one run of lmms-eval's benchmarks -> a table, or one JSON object.

As in `main.py`, torch, transformers and lmms-eval are imported inside commands only.
"""

import os
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from diffvl.cli.output import print_json, print_table
from diffvl.cli.settings import settings_of, typed
from diffvl.decode.flags import SETTINGS
from diffvl.errors import UsageError
from diffvl.store.evaluation import metric_name
from diffvl.terminal.console import console

Tasks = Annotated[str | None, typer.Option(help="Benchmarks of lmms-eval, with commas between them.", metavar="NAME,...")]
IncludePath = Annotated[Path | None, typer.Option(help="With --tasks: a folder with tasks of your own.", metavar="DIR")]
BatchSize = Annotated[int, typer.Option(min=1, help="With --tasks: questions that are answered together.", metavar="N")]
OF_TASKS = {"include_path": "--include-path", "batch_size": "--batch-size"}


def evaluate_tasks(context: typer.Context, directory: Path, as_json: bool) -> None:
    """Runs the benchmarks that the flags of `diffvl evaluate` name.

    Raises:
        UsageError: if the flags do not fit together, or lmms-eval is not installed.
    """
    flags = context.params
    if (flags["tasks"] is None) == (flags["data"] is None):
        given = "not both" if flags["tasks"] is not None else "one of them is needed"
        raise UsageError(f"give --data FILE with held-out records, or --tasks NAME,... of lmms-eval: {given}")
    names = [name.strip() for name in flags["tasks"].split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--tasks {flags['tasks']!r}: expected names with commas between them, each once")
    if find_spec("lmms_eval") is None:
        raise UsageError(
            "--tasks needs lmms-eval, which is not installed here: pip install 'diffvl[eval]', in an environment of its own "
            "(docs/benchmarks.md)"
        )
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # lmms-eval's own lines; what it does is shown by ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    # stdout is for the results: lmms-eval logs to what it finds there when it is imported, and many tasks print.
    with redirect_stdout(sys.stderr):
        from diffvl.evaluation.benchmarks import Benchmarks, run_benchmarks
        from diffvl.terminal.bars import quiet_libraries

        quiet_libraries()
        request = Benchmarks(names, _named(context), flags["batch_size"], flags["limit"], flags["include_path"])
        results = run_benchmarks(directory, request, console(stderr=True))
    if as_json:
        print_json({"results": results})
    else:
        print_table(["task", "metric", "value", "stderr", "n", "seconds"], [row for one in results for row in _rows(one)])


def exclude_tasks_flags(context: typer.Context) -> None:
    """Raises UsageError for a flag that only --tasks gives an effect."""
    given = typed(context)
    for name, flag in OF_TASKS.items():
        if name in given:
            raise UsageError(f"{flag} has no effect without --tasks")


def _named(context: typer.Context) -> dict[str, Any]:
    """The settings of decoding that were typed, by name: they hold against what a task asks for."""
    settings = settings_of(context)
    named = {name: getattr(settings, name) for name in typed(context) if name in SETTINGS}
    return named | ({"cache_implementation": "static"} if settings.is_static else {})


def _rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            result["task"],
            metric_name(one),
            f"{one['value']:.4f}",
            f"{one['stderr']:.4f}" if "stderr" in one else "-",
            str(result["n"]),
            f"{result['seconds']:.1f}",
        )
        for one in result["metrics"]
    ]
