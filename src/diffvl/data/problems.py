"""What is wrong with the records of a data file: one problem with its place, and all of a file in one go, counted by kind, the
first few of each kind told, the rest in a file; and whether a run may go on without those records (`data.on_error`).
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import config as datasets_config

from diffvl.config.recipe import Data
from diffvl.errors import DataError, first_few

IMAGE_MISSING = "image missing"
UNREADABLE = "image cannot be read"
TOO_LONG = "too long"  # kind of a record with more tokens than allowed, which `data.too_long: drop` forgives


@dataclass(frozen=True)
class Problem:
    """kind: a few words, the same for all records that it applies to ("image missing"), by which problems are counted.
    line: where the record begins in the file, from 1. number: which record of the file it is, from 1. id: the record's own.
    message: what is wrong, what was expected and what to do, without the place. ends: nothing after it could be read.
    within: the file that it stands in, where `path` is a data set of several."""

    kind: str
    path: Path
    line: int
    number: int
    id: str | None
    message: str
    ends: bool = False
    within: str | None = None

    def __str__(self) -> str:
        name = "" if self.id is None else f", id {self.id!r}"
        file = self.path if self.within is None else self.path / self.within
        return f"{told(file)}:{self.line}: {self.message} (record {self.number}{name})"

    def error(self) -> DataError:
        """Gives the problem as the error of a run that stops at it."""
        return DataError(str(self), kind=self.kind)


def told(path: Path) -> str:
    """Gives the path of a file as it was written: of a URL a path keeps one of its slashes only."""
    return re.sub(r"^([A-Za-z][\w+.-]+):/(?!/)", r"\1://", str(path))


def place_of(name: str, line: int, number: int) -> str:
    """Tells where a record stands in its file, in words. The line alone, unless others may stand in it too, as they do in a
    `.json` file without line ends."""
    return f"{name}:{line} (record {number})" if name.lower().endswith(".json") and number >= line else f"{name}:{line}"


_NUM_SHOWN = 5  # problems told where all are of one kind
_NUM_OF_KIND = 3  # problems told of each kind where there are several


def require_usable(problems: Sequence[Problem], path: Path, total: int, data: Data, advise: bool = True) -> None:
    """Raises DataError unless the records that are left may stand for the file: there are no problems, or `on_error` is `skip`
    and they are no more than `max_skipped` of all, and none hides what comes after it."""
    if not problems:
        return
    ending = [problem for problem in problems if problem.ends]
    if data.on_error == "stop" or ending:
        raise as_error(problems, path, "" if ending or not advise else advice_on(problems))
    if len(problems) == total:
        raise as_error(problems, path, "no record is left")
    if len(problems) > data.max_skipped * total:
        raise as_error(problems, path, over_budget(len(problems), total, data))


def is_forgiven(problem: Problem, data: Data) -> bool:
    """Tells whether a record may be left out without counting: `too_long: drop` asks for it."""
    return problem.kind == TOO_LONG and data.too_long == "drop"


def advice_on(problems: Sequence[Problem], in_training: bool = False) -> str:
    """Says what to do, other than to correct the records, where a run stops at these problems."""
    lines = []
    if any(problem.kind == TOO_LONG for problem in problems):
        found = " (data.check_lengths=true finds all of them before training)" if in_training else ""
        lines.append(f"raise data.max_length, or set data.too_long=drop to leave them out{found}")
    if any(problem.kind != TOO_LONG for problem in problems):
        lines.append("set data.on_error=skip to leave such records out, up to data.max_skipped of them")
    return "\n".join(lines)


def over_budget(count: int, total: int, data: Data) -> str:
    """Tells what to say where more records are wrong than may be skipped."""
    return (
        f"{count} of {total} records cannot be used ({count / total:.2%}), more than data.max_skipped={data.max_skipped:g} "
        "lets pass: correct them or raise it"
    )


def as_error(problems: Sequence[Problem], path: Path, advice: str = "") -> DataError:
    """Joins the problems of one file into one error; at least one."""
    if len(problems) == 1:
        return DataError(f"{problems[0]}; {advice}" if advice else str(problems[0]), kind=problems[0].kind)
    counts = kinds_of(problems)
    most = _NUM_SHOWN if len(counts) == 1 else _NUM_OF_KIND
    lines = [f"{path}: {len(problems)} problems"]
    for kind, count in counts.items():
        indent = "  "
        if len(counts) > 1:
            lines.append(f"  {kind}: {count}")
            indent = "    "
        of_kind = [problem for problem in problems if problem.kind == kind]
        lines += [f"{indent}{text}" for text in first_few([str(problem) for problem in of_kind], most)]
    if len(problems) > sum(min(count, most) for count in counts.values()):
        lines.append(f"all of them: {_write_list(problems, path)}")
    return DataError("\n".join([*lines, advice] if advice else lines))


def kinds_of(problems: Iterable[Problem]) -> dict[str, int]:
    """Counts how many there are of each kind, the most frequent first."""
    return dict(Counter(problem.kind for problem in problems).most_common())


def as_line(problem: Problem) -> dict[str, Any]:
    """Gives a problem as an object of a JSON-lines file."""
    return {
        "kind": problem.kind,
        "file": str(problem.path),
        **({} if problem.within is None else {"within": problem.within}),
        "line": problem.line,
        "record": problem.number,
        "id": problem.id,
        "message": problem.message,
    }


def from_line(line: dict[str, Any]) -> Problem:
    """Reads back what `as_line` has written."""
    place = (line["line"], line["record"], line["id"])
    return Problem(line["kind"], Path(line["file"]), *place, line["message"], within=line.get("within"))


def _write_list(problems: Sequence[Problem], path: Path) -> Path:
    """Writes all problems as JSON lines into the cache: a run that is refused leaves no directory of its own. The next list of
    the same file takes this one's place."""
    name = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    file = Path(datasets_config.HF_DATASETS_CACHE) / "diffvl-problems" / f"{path.stem}-{name}.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(as_line(problem)) + "\n" for problem in problems)
    except OSError as error:
        raise DataError(f"{path}: {len(problems)} problems; their list {file} cannot be written ({error})") from error
    return file
