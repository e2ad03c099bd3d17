"""Runs the parts of a report: within a budget, each once, and what is done is kept.

Invariant: every part is saved as soon as it has ended, with all that an earlier run found of the others. A part that was done
with the same command on the same accelerator, and in which nothing failed, is not done again; one that would not fit into what is
left of the budget is not begun; one that is begun is ended at the budget's end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from tools.gpu_report.origin import Origin
from tools.gpu_report.parts import ROOT, Part

LONGER = 2  # a part may take this many times its estimate before it is ended
LAST_LINES = 8  # of what a failed part said

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a program ended: its code, None where it was stopped for its time; what it printed and said."""

    code: int | None
    out: str
    said: str


Launch = Callable[[list[str], float], Ended]


@dataclass(frozen=True)
class Outcome:
    """What became of a part. state: done, skipped, stopped (out of time) or failed. seconds: that it took, None where it was not
    begun. why: for all but done. figures: what it printed. words: its command. origin: None where it was not begun, or an old
    report does not say."""

    name: str
    state: str
    words: list[str]
    seconds: float | None = None
    why: str | None = None
    figures: dict[str, Any] | None = None
    origin: Origin | None = None


def has_failed(outcome: Outcome) -> bool:
    """Whether a part, one of its tests or the comparison that it makes has failed."""
    figures = outcome.figures or {}
    return outcome.state == "failed" or bool(figures.get("failed")) or not figures.get("agrees", True)


Save = Callable[[list[Outcome]], None]


@dataclass(frozen=True)
class Request:
    """parts: in order. budget: seconds of this run. origin: of what it finds. before: what an earlier run found."""

    parts: Sequence[Part]
    budget: float
    origin: Origin
    quick: bool = False
    before: Sequence[Outcome] = ()


def launch(words: list[str], limit: float, on_cpu: bool = False) -> Ended:
    """Runs `python WORDS` from the repository's root; one that does not end in `limit` seconds is ended, with its children.

    Args:
        on_cpu: True hides the GPUs that are there.
    """
    folders = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # what a part said is told, whatever it wrote
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), **({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})},
        start_new_session=True,
    )
    try:
        out, said = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        _kill(process)
        out, said = process.communicate()
        return Ended(None, out, said)
    except BaseException:  # Ctrl-C or a signal: nothing is left running on the GPU
        _kill(process)
        process.wait()
        raise
    return Ended(process.returncode, out, said)


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a program and its children; that they have just ended by themselves is no mistake."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_parts(
    request: Request, say: Say, save: Save, launch: Launch = launch, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    """Runs what is to be done and gives what became of each part, those of an earlier run that were not asked for at the end.

    Of a part that is skipped it gives what an earlier run found, if one began it.

    Args:
        say: gets a line about each part. save: gets all that is known, after each part.
    """
    begun = clock()
    earlier = {one.name: one for one in request.before}
    names = [part.name for part in request.parts]
    others = [one for one in request.before if one.name not in names]
    outcomes: list[Outcome] = []
    for count, part in enumerate(request.parts, start=1):
        words, before = part.words(request.quick), earlier.get(part.name)
        again = "" if before is None else _cause(before, words, request.origin)
        if before is not None and again is None:
            say(f"{part.name}: done before{_other_code(before, request.origin)}")
            outcome = before
        else:
            if again:
                say(f"{part.name}: {again}")
            outcome = _run(part, words, request, request.budget - (clock() - begun), say, launch, clock)
            if outcome.state == "skipped" and before is not None and before.seconds is not None:
                say(f"{part.name}: what an earlier run found stays: {before.state}")
                outcome = before  # leaving a part out neither mends a failure nor undoes a figure
        outcomes.append(outcome)
        ahead = [earlier[name] for name in names[count:] if name in earlier]  # a run that ends before them must not lose them
        save([*outcomes, *ahead, *others])
    return [*outcomes, *others]


def _cause(before: Outcome, words: list[str], here: Origin) -> str | None:
    """Why a part is to be run again, "" where there is nothing to say of it; None where what an earlier run found stands.

    One in which something failed is run again: the cause may be mended, which its command does not show. One of another commit is
    not: most commits do not touch what is measured, and after each the whole budget would go into what is there.
    """
    if before.state != "done":
        return ""
    if before.words != words:
        return "done before with another command: again"
    if has_failed(before):
        return "something in it failed before: again"
    if before.origin is None:
        return "done before, it is not known on what accelerator: again"
    if before.origin.accelerator != here.accelerator:
        return f"done before on {before.origin.device}, this is {here.device}: again"
    if before.origin.version != here.version:
        return f"done before with diffvl {before.origin.version}, this is {here.version}: again"
    return None


def _other_code(before: Outcome, here: Origin) -> str:
    """Tells of figures that another commit made, or may have; "" where this one did."""
    if before.origin is None or before.origin.is_same_code(here):
        return ""
    return f" on {before.origin.date} with diffvl {before.origin.code}, this is {here.code}: kept; another --out measures it anew"


def _run(
    part: Part, words: list[str], request: Request, left: float, say: Say, launch: Launch, clock: Callable[[], float]
) -> Outcome:
    quick, why = request.quick, part.missing(request.quick)
    if why is None and not quick and part.seconds > left:
        why = f"would not fit: about {part.seconds} s, of the budget {max(left, 0):.0f} s are left"
    if why is None and left <= 0:
        why = "the budget is used up"
    if why is not None:
        say(f"{part.name}: skipped: {why}")
        return Outcome(part.name, "skipped", words, why=why)
    say(f"{part.name}: {part.about} ...")
    start = clock()
    ended = launch(words, left if quick else min(left, LONGER * part.seconds))
    outcome = replace(_judged(part, words, ended, round(clock() - start, 1)), origin=request.origin)
    say(f"{part.name}: {outcome.state} in {outcome.seconds:.0f} s" + (f": {outcome.why}" if outcome.why else ""))
    return outcome


def _judged(part: Part, words: list[str], ended: Ended, seconds: float) -> Outcome:
    said = "\n".join(ended.said.strip().splitlines()[-LAST_LINES:])
    if ended.code is None:
        return Outcome(part.name, "stopped", words, seconds, "ran out of time" + (f"\n{said}" if said else ""))
    if ended.code == 0:
        try:
            figures = json.loads(ended.out.strip().splitlines()[-1])
        except (ValueError, IndexError):
            figures = None
        if isinstance(figures, dict):
            return Outcome(part.name, "done", words, seconds, figures=figures)
        said = f"its last line is no JSON object: {ended.out[-200:]!r}"
    return Outcome(part.name, "failed", words, seconds, said or f"exit code {ended.code}")
