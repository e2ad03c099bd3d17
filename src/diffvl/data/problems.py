"""What is wrong with one record of a data file, told with its place, so that all problems of a file can be told in one go."""

from dataclasses import dataclass
from pathlib import Path

from diffvl.errors import DataError

# The kind of a problem behind which nothing more of the file could be read: it is no record that can be left out.
ENDS_FILE = "file cannot be read on"


@dataclass(frozen=True)
class Problem:
    """kind: a few words, the same for all records that it applies to ("picture missing"), by which problems are counted.
    line: where the record begins in the file, from 1. number: which record of the file it is, from 1. id: the record's own.
    message: what is wrong, what was expected and what to do, without the place."""

    kind: str
    path: Path
    line: int
    number: int
    id: str | None
    message: str

    def __str__(self) -> str:
        name = f", id {self.id!r}" if self.id is not None and several_in_line(self.path.name, self.line, self.number) else ""
        return f"{place_of(str(self.path), self.line, self.number, name)}: {self.message}"

    def error(self) -> DataError:
        """The problem as the error of a run that stops at it."""
        return DataError(str(self), kind=self.kind)


def several_in_line(name: str, line: int, number: int) -> bool:
    """Whether a record's line may hold others too, as in a `.json` file without line ends: then the line names no record."""
    return name.lower().endswith(".json") and number >= line


def place_of(name: str, line: int, number: int, more: str = "") -> str:
    """Where a record stands in its file, in words."""
    return f"{name}:{line} (record {number}{more})" if several_in_line(name, line, number) else f"{name}:{line}"
