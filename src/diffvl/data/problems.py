"""What is wrong with one record of a data file, told with its place, so that all problems of a file can be told in one go."""

from dataclasses import dataclass
from pathlib import Path

from diffvl.errors import DataError


@dataclass(frozen=True)
class Problem:
    """kind: a few words, the same for all records that it applies to ("image missing"), by which problems are counted.
    line: where the record begins in the file, from 1. number: which record of the file it is, from 1. id: the record's own.
    message: what is wrong, what was expected and what to do, without the place. ends: nothing after it could be read."""

    kind: str
    path: Path
    line: int
    number: int
    id: str | None
    message: str
    ends: bool = False

    def __str__(self) -> str:
        name = "" if self.id is None else f", id {self.id!r}"
        return f"{self.path}:{self.line}: {self.message} (record {self.number}{name})"

    def error(self) -> DataError:
        """Gives the problem as the error of a run that stops at it."""
        return DataError(str(self), kind=self.kind)


def place_of(name: str, line: int, number: int) -> str:
    """Tells where a record stands in its file, in words. The line alone, unless others may stand in it too, as they do in a
    `.json` file without line ends."""
    return f"{name}:{line} (record {number})" if name.lower().endswith(".json") and number >= line else f"{name}:{line}"
