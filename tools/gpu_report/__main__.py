"""Everything that waits for a GPU, in one run: `make gpu-report`, or `python -m tools.gpu_report`.

Parts are run in the order of worth, as long as the budget lasts; a later run goes on with what is not done or has failed. The
folder gets `report.json` and `report.md`, the tables for docs/. `--needs` says what is to be installed beforehand.
"""

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tools.gpu_report.needs import tell_needs
from tools.gpu_report.origin import Origin, find_origin
from tools.gpu_report.parts import PARTS, chosen
from tools.gpu_report.run import Launch, Outcome, Request, has_failed, launch, run_parts
from tools.gpu_report.signals import exit_on_signals
from tools.gpu_report.tables import machines_of, page

BUDGET = 480  # seconds
REPORT, PAGE = "report.json", "report.md"


def main(arguments: list[str] | None = None, run: Launch | None = None) -> int:
    """Runs the report. Returns 0, or 1 if a part failed, a test did, or two ways that must agree do not.

    Args:
        run: what starts a part's program; default: `launch`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder of the report; default: gpu-report")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="a part, or all that begin so; repeatable")
    parser.add_argument("--skip", action="append", default=[], metavar="PART", help="a part to leave out; repeatable")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"of this run; default: {BUDGET}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes on the CPU, to see that it runs")
    parser.add_argument("--list", action="store_true", help="list the parts and end")
    parser.add_argument("--needs", action="store_true", help="say what is not installed here and end")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{part.name:18} about {part.seconds:3} s  {part.about}" for part in PARTS))
        return 0
    if given.needs:
        return tell_needs()
    try:
        parts = chosen(given.only, given.skip)
    except ValueError as error:
        parser.error(str(error))
    if given.budget <= 0:
        parser.error(f"--budget {given.budget:g}: expected seconds above 0")
    accelerator = None if given.quick else _accelerator()
    if not given.quick and accelerator is None:
        parser.error("torch sees no CUDA device here: run it where there is one, or see that it runs with --quick")
    if given.quick and is_real(given.out / REPORT):
        parser.error(
            f"{given.out / REPORT} holds real figures, which those of --quick would replace: name another folder with --out"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m tools.gpu_report", *(sys.argv[1:] if arguments is None else arguments)])
    origin = find_origin(accelerator)
    request = Request(parts, given.budget, origin, given.quick, read_before(given.out / REPORT, given.quick))
    save = partial(write_report, given.out, command, given.quick, origin)
    say = partial(print, file=sys.stderr, flush=True)
    with exit_on_signals():
        outcomes = run_parts(request, say, save, run or partial(launch, on_cpu=given.quick))
    print(given.out / PAGE)
    return 1 if any(map(has_failed, outcomes)) else 0


def is_real(file: Path) -> bool:
    """Whether a report is there that was made without `--quick`; a torn one is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["quick"] is False
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_before(file: Path, quick: bool) -> list[Outcome]:
    """What an earlier run left in this folder; nothing where it left no whole report, or one of the other kind (`--quick`)."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        return [_outcome(one) for one in report["parts"]] if report["quick"] == quick else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _outcome(one: dict[str, Any]) -> Outcome:
    """From JSON; an old report has no origins."""
    origin = one.get("origin")
    return Outcome(**{**one, "origin": None if origin is None else Origin(**origin)})


def write_report(folder: Path, command: str, quick: bool, origin: Origin, outcomes: list[Outcome]) -> None:
    """Writes both files, each whole or not at all; the figures first, which a page that cannot be made must not take along."""
    report = {
        **asdict(origin),
        "command": command,
        "quick": quick,
        "machines": machines_of(outcomes),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    _write(folder / REPORT, json.dumps(report, indent=2) + "\n")
    _write(folder / PAGE, page(command, quick, origin, outcomes))


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f"{file.name}.partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def _accelerator() -> str | None:
    """The name of the GPU that parts run on, None where there is none. Asked in this process: torch is needed anyway, and nothing
    of ours is."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # noqa: PLC0415  (so that --needs and --list answer without it)

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    sys.exit(main())
