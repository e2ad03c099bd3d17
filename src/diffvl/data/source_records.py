"""Source -> its records, in order, or in their places what is wrong with them."""

from collections.abc import Iterator
from pathlib import Path

from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data.columns import ColumnNames
from diffvl.data.problems import Problem, told
from diffvl.data.reading import READERS
from diffvl.data.records import Record, RecordReader, Unpaired, parse_rows
from diffvl.data.rows import Part, Row
from diffvl.data.sources import Source, find_source


def parse_source(source: Source, unpaired_turns: Unpaired = "error") -> Iterator[Record | Problem]:
    """Reads every record of a source, or in its place what is wrong with it. At the end it logs which keys were not used.

    Raises:
        DataError: for files that are not of their kind, or without the columns to read; for a source without records.
    """
    reader = RecordReader(source.images(), unpaired_turns)
    columns = ColumnNames(source.settings.columns)
    read = READERS[source.kind]

    def rows() -> Iterator[tuple[Row, str | None]]:
        for number, file in enumerate(source.files):
            within = source.within(number)
            yield from ((row, within) for _, row in read(file, source.name_of(number), columns, False, Part()))

    yield from parse_rows(rows(), source.path, reader)
    columns.require_seen(str(source.path))


def iterate_source(source: Source, unpaired_turns: Unpaired = "error") -> Iterator[Record]:
    """Reads a source's records in order, read as they are asked for. Raises DataError at the first problem."""
    for item in parse_source(source, unpaired_turns):
        if isinstance(item, Problem):
            raise item.error()
        yield item


def source_at(path: Path, data: Data) -> Source:
    """Finds the set that a command names by its path alone. Raises DataError as `find_source`."""
    return find_source(
        DataSource(path=told(path), image_folder=data.image_folder, columns=data.columns, split=data.split, subset=data.subset)
    )
