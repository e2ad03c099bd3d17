"""Which records a run has left out, each once: counted, listed in a file of the run, and stopped at where there are too many.

The list is that of an uninterrupted run whatever happens: every line has its step, and a run that goes on from a checkpoint drops
the lines after it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffvl.config.recipe import Data
from diffvl.data.problems import Problem, advice_on, as_error, as_line, from_line, is_forgiven, kinds_of, over_budget
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.stream import StreamPart
from diffvl.errors import DataError
from diffvl.store.files import replace_text
from diffvl.store.metrics import read_json_lines

LEFT_OUT_FILE = "left_out.jsonl"
_HOPELESS = 1000  # records of which not one could be used: the others will be no better


class LeftOut:
    """The records that are left out of a run. All processes of a run hold the same; one of them writes."""

    def __init__(self, file: Path, data: Data, datasets: Iterable[SampleDataset | StreamPart], writes: bool) -> None:
        self._file, self._data, self._writes = file, data, writes
        self._datasets = list(datasets)
        self._sets = list(dict.fromkeys(map(_set_of, self._datasets)))
        self._found: dict[tuple[str, str | None, int], Problem] = {}
        self._wrong: Counter[int] = Counter()  # by set; those that are forgiven apart
        self._all: Counter[int] = Counter()
        self._used = False
        self._seen = 0  # records that the steps have met, by which a stream's are counted

    def __len__(self) -> int:
        return len(self._found)

    @property
    def seen(self) -> int:
        """Counts the records that the steps have met; a run that goes on is told it by its checkpoint."""
        return self._seen

    def begin(self, step: int, seen: int = 0) -> None:
        """Takes up the list at a step: what was known before training, and what the steps up to this one have left out."""
        self._seen = seen
        self._found, self._wrong, self._all, self._used = {}, Counter(), Counter(), step > 0
        found = [(0, problem) for samples in self._datasets for problem in samples.known]
        if step > 0 and self._file.exists():
            lines = [line for line in read_json_lines(self._file) if line["step"] <= step]
            # By the number of its file: the set may have been moved since.
            found += [(line["step"], replace(from_line(line), path=self._sets[line["set"]].path)) for line in lines]
        kept = []
        for met, problem in found:
            if _key(problem) not in self._found:
                self._count(problem)
                kept.append(self._line(problem, met))
        if self._writes and (kept or self._file.exists()):
            replace_text(self._file, "".join(kept))

    def count(self, met: int) -> None:
        """Counts records that a step has met, whether it could use them or not."""
        self._seen += met

    def add(self, problems: Sequence[Problem], used: int, step: int) -> None:
        """Takes note of the records that a step has met and could not use, and of the number that it could.

        Raises:
            DataError: where they are not to be left out (`on_error`, `too_long`), or are too many.
        """
        self._used = self._used or used > 0
        new = {_key(problem): problem for problem in problems if _key(problem) not in self._found}
        wrong = [problem for problem in new.values() if not is_forgiven(problem, self._data)]
        ending = [problem for problem in wrong if problem.ends]
        if ending:
            raise as_error(ending, ending[0].path)
        if wrong and self._data.on_error == "stop":
            raise as_error(wrong, wrong[0].path, advice_on(wrong, in_training=True))
        for problem in new.values():
            self._count(problem)
        if self._writes and new:
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(self._line(problem, step) for problem in new.values())
        for samples in self._datasets:
            self._require_budget(samples)

    def kinds(self) -> dict[str, int]:
        """Counts how many of each kind, the most frequent first."""
        return kinds_of(self._found.values())

    def _line(self, problem: Problem, step: int) -> str:
        return json.dumps({"step": step, "set": self._number_of(problem), **as_line(problem)}) + "\n"

    def _count(self, problem: Problem) -> None:
        self._found[_key(problem)] = problem
        number = self._number_of(problem)
        self._all[number] += 1
        self._wrong[number] += not is_forgiven(problem, self._data)

    def _number_of(self, problem: Problem) -> int:
        """Gives the number of the set that a problem is in: of two splits of a folder, the one that has its file."""
        return next(number for number, one in enumerate(self._sets) if one.holds(problem))

    def _require_budget(self, samples: SampleDataset | StreamPart) -> None:
        number, path, total = self._sets.index(_set_of(samples)), samples.path, samples.num_records
        if total is None:  # of a stream: what was met of it so far, and a beginning in which one wrong record is no share
            total = max(self._seen, _HOPELESS)
        if self._wrong[number] > self._data.max_skipped * total:
            wrong = [problem for problem in self._problems_in(number) if not is_forgiven(problem, self._data)]
            raise as_error(wrong, path, over_budget(len(wrong), total, self._data))
        if not self._used and self._all[number] >= min(total, _HOPELESS):
            told = "all" if self._all[number] == total else f"the first {self._all[number]}"
            kinds = ", ".join(f"{count} {kind}" for kind, count in kinds_of(self._problems_in(number)).items())
            raise DataError(f"{path}: {told} records cannot be used ({kinds}); the first is {self._problems_in(number)[0]}")

    def _problems_in(self, number: int) -> list[Problem]:
        return [problem for problem in self._found.values() if self._number_of(problem) == number]


@dataclass(frozen=True)
class _Set:
    """The files whose records are counted together. files: as problems name them below `path`, None for a single file."""

    path: Path
    files: frozenset[str] | None

    def holds(self, problem: Problem) -> bool:
        return problem.path == self.path and (self.files is None or problem.within in self.files)


def _set_of(samples: SampleDataset | StreamPart) -> _Set:
    return _Set(samples.path, None if samples.names is None else frozenset(samples.names))


def _key(problem: Problem) -> tuple[str, str | None, int]:
    return str(problem.path), problem.within, problem.number
