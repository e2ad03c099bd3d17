"""One cell of a table on disk, by its row: how any process gets at any image of a Parquet or Arrow file.

An Arrow file is mapped into memory, so a cell costs what it weighs. A Parquet file is read by row group: what stands before the
cell in its row group is decoded too. Files stay open, the most recent ones; none of their contents are kept.
"""

import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy
import pyarrow as pa
import pyarrow.parquet as pq

from diffvl.data.problems import UNREADABLE
from diffvl.errors import DataError, first_line

_MOST_OPEN = 32  # files
_AT_ONCE = 16  # rows decoded at a time
_LFS = b"version https://git-lfs"


Stamp = tuple[int, int]


def stamp_of(file: str) -> Stamp:
    """Tells whether a file is still the one that was opened: what is kept of a file is kept under its stamp. Raises OSError."""
    facts = os.stat(file)
    return facts.st_size, facts.st_mtime_ns


def open_parquet(file: str) -> tuple[pq.ParquetFile, numpy.ndarray]:
    """Opens a Parquet file; gives with it the row that each row group ends before.

    Raises:
        DataError: naming a file that is damaged or cut short. OSError: it is not there.
    """
    return _open_parquet(file, stamp_of(file))


@lru_cache(maxsize=_MOST_OPEN)
def _open_parquet(file: str, _: Stamp) -> tuple[pq.ParquetFile, numpy.ndarray]:
    try:
        opened = pq.ParquetFile(file, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, "Parquet", error) from error
    groups = (opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups))
    return opened, numpy.cumsum(numpy.fromiter(groups, dtype=numpy.int64, count=opened.num_row_groups))


def open_arrow(file: str) -> pa.Table:
    """Maps an Arrow file, a stream (as `datasets` writes it) or with an index. Raises as `open_parquet`."""
    return _open_arrow(file, stamp_of(file))


@lru_cache(maxsize=_MOST_OPEN)
def _open_arrow(file: str, _: Stamp) -> pa.Table:
    try:
        with open(file, "rb") as head:
            has_index = head.read(6) == b"ARROW1"
        mapped = pa.memory_map(file)
        return (pa.ipc.open_file(mapped) if has_index else pa.ipc.open_stream(mapped)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, "Arrow", error) from error


def damaged(file: str, kind: str, error: Exception) -> DataError:
    """Tells of a file that cannot be read as what its name says."""
    told = f"is no {kind} file, or a damaged one ({first_line(error)}); fetch it again"
    with suppress(OSError), open(file, "rb") as head:
        if head.read(len(_LFS)) == _LFS:
            told = "is a pointer to a file that Git LFS keeps: fetch the file itself (git lfs pull)"
    return DataError(f"{file}: {told}", "file cannot be read", ends=True)


def parquet_cell(file: str, row: int, column: str) -> Any:
    """Gives the value at a row (from 0) and column. Raises DataError for a file that is damaged, or has no such cell; OSError."""
    return _parquet_cell(file, stamp_of(file), row, column)


@lru_cache(maxsize=1)  # a record's images are asked for one after the other
def _parquet_cell(file: str, stamp: Stamp, row: int, column: str) -> Any:
    opened, ends = _open_parquet(file, stamp)
    group = int(numpy.searchsorted(ends, row, side="right"))
    if group == len(ends):
        raise DataError(
            f"{file} has {ends[-1] if group else 0} rows, none at {row + 1}: it was another one when the run began", UNREADABLE
        )
    inside = row - int(ends[group - 1] if group else 0)
    try:
        for batch in opened.iter_batches(_AT_ONCE, [group], [column], use_threads=False):
            if inside < len(batch):
                return batch.column(0)[inside].as_py()
            inside -= len(batch)
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, "Parquet", error) from error
    raise DataError(f"{file}: no column {column}, or fewer rows than it says: it was another one when the run began", UNREADABLE)


def arrow_cell(file: str, row: int, column: str) -> Any:
    """Gives the value at a row (from 0) and column. Raises as `parquet_cell`."""
    return _arrow_cell(file, stamp_of(file), row, column)


@lru_cache(maxsize=1)
def _arrow_cell(file: str, stamp: Stamp, row: int, column: str) -> Any:
    table = _open_arrow(file, stamp)
    if column not in table.column_names or row >= len(table):
        raise DataError(f"{file}: no column {column}, or no row {row + 1}: it was another one when the run began", UNREADABLE)
    return table.column(column)[row].as_py()
