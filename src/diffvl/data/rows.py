"""One file of any kind -> its rows, each with its place: the interface that all readers have.

The place is what a message names after the file: the line in JSON, the row in Parquet and Arrow, the sample in a tar, from 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from diffvl.data.columns import ColumnNames


class Row(NamedTuple):
    """value: the object that a record is parsed from, in which images are names; or a DataError that says what is wrong with it.
    place: see above. source: file and place, as a record has it."""

    place: int
    source: str
    value: Any


@dataclass(frozen=True)
class Part:
    """Which rows of a file are read: those from number `start` on (from 0), of these every `step`-th, beginning with the
    `first`-th of the file."""

    start: int = 0
    first: int = 0
    step: int = 1

    def has(self, number: int) -> bool:
        return number >= self.start and number % self.step == self.first


class ReadRows(Protocol):
    """Reads one file's rows in order.

    Args:
        file: path or URL. name: what a record's source calls it. columns: which are read, and as what. held: whether images come
        with their bytes, for a stream; else they are references, and their bytes are not read. part: the rows to read.
    Raises:
        DataError: for a file that is not of its kind, or without the columns to read.
    """

    def __call__(self, file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]: ...
