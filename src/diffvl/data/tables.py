"""Parquet and Arrow files -> rows. The text of a row is read; of its images only whether they are there, unless a stream asks for
their bytes: a set of a hundred gigabytes is opened by reading its text.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffvl.data.cells import damaged, open_arrow, open_parquet
from diffvl.data.columns import ColumnNames
from diffvl.data.inline import Steps, with_names
from diffvl.data.opening import is_remote, open_binary
from diffvl.data.references import Held, Kind, Reference, bytes_of, refer
from diffvl.data.rows import Part, Row
from diffvl.errors import DataError

_ROWS_OF_TEXT = 1024  # read at a time
_ROWS_OF_IMAGES = 16
_IMAGES = ("image", "images")


def parquet_rows(file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]:
    """Reads a Parquet file; see `ReadRows`. Row groups that hold nothing to read are not decoded."""
    try:
        with _opened(file, held) as opened:
            columns.require_all(opened.schema_arrow.names, file)
            wanted, images = _chosen(opened.schema_arrow, columns, file)
            reader = _Cells(file, name, "parquet", columns, images, held)
            for batch, start in _batches(opened, _leaves(opened, wanted, images, held), images, held, part.start):
                yield from reader.rows(batch, start, part)
    except (pa.ArrowException, OSError) as error:
        raise damaged(file, "Parquet", error) from error


_BUFFER = 1 << 20  # bytes


@contextmanager
def _opened(file: str, held: bool) -> Iterator[pq.ParquetFile]:
    """Opens a file; what is read from front to back is read page by page, not a row group at a time."""
    if not held and not is_remote(file):
        yield open_parquet(file)[0]
        return
    with open_binary(file) as raw:
        yield pq.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False)


def _batches(
    opened: pq.ParquetFile, leaves: list[str], images: list[str], held: bool, start: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Gives batches of rows, each with the number of its first; row groups that end before `start` are not decoded."""
    # Bytes without a path beside them are read to know which are there.
    heavy = bool(images) and (held or any(leaf in images or leaf.endswith((".element", ".item")) for leaf in leaves))
    size, first = _ROWS_OF_IMAGES if heavy else _ROWS_OF_TEXT, 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        inside = first
        if first + count > start:
            for batch in opened.iter_batches(size, [group], leaves, use_threads=False):
                yield batch, inside
                inside += len(batch)
        first += count


def arrow_rows(file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]:
    """Reads an Arrow file of this machine; see `ReadRows`."""
    if is_remote(file):
        raise DataError(f"{file}: an Arrow file is read from a disk of this machine only: fetch it", "kind of file", ends=True)
    table = open_arrow(file)
    columns.require_all(table.column_names, file)
    wanted, images = _chosen(table.schema, columns, file)
    reader = _Cells(file, name, "arrow", columns, images, held)
    size = _ROWS_OF_IMAGES if held and images else _ROWS_OF_TEXT
    for start in range(part.start // size * size, len(table), size):
        for batch in table.slice(start, size).select(wanted).to_batches():
            yield from reader.rows(batch, start, part)
            start += len(batch)  # noqa: PLW2901  # a slice may lie in several batches


# --- which columns -----------------------------------------------------------------------------------------------------------


def _chosen(schema: pa.Schema, columns: ColumnNames, file: str) -> tuple[list[str], list[str]]:
    """Gives the columns to read, and those of them that hold images.

    Raises:
        DataError: a column of bytes would be left out without a word.
    """
    pictures = [field.name for field in schema if _holds_bytes(field.type)]
    if columns.columns is not None:
        wanted = [name for name in schema.names if name in columns.columns.values()]
        return wanted, [name for name in pictures if name in wanted]
    others = [name for name in pictures if name not in _IMAGES]
    if others:
        raise DataError(
            f"{file}: column `{others[0]}` holds bytes, and images are looked for in `image` or `images`. Name the columns that "
            "are read, the others are left alone: data.columns={conversations: COLUMN, image: COLUMN}",
            "image under another key",
            ends=True,
        )
    return list(schema.names), pictures


def _holds_bytes(kind: pa.DataType) -> bool:
    """Tells whether a column holds bytes: alone, as `datasets` writes them ({bytes, path}), or in lists."""
    if _is_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _leaves(opened: pq.ParquetFile, wanted: list[str], images: list[str], held: bool) -> list[str]:
    """Gives what is read of the columns: of {bytes, path} the path alone, which tells whether there is an image."""
    leaves = []
    for place in range(len(opened.schema)):
        path = opened.schema.column(place).path
        top, _, inner = path.partition(".")
        last = inner.rpartition(".")[2]
        has_path = any(
            opened.schema.column(other).path == f"{path.rpartition('.')[0]}.path" for other in range(len(opened.schema))
        )
        if top in wanted and (held or top not in images or last != "bytes" or not has_path):
            leaves.append(path)
    return leaves


# --- cells -> rows -----------------------------------------------------------------------------------------------------------


class _Cells:
    """Turns batches of one file into rows."""

    def __init__(self, file: str, name: str, kind: Kind, columns: ColumnNames, images: list[str], held: bool) -> None:
        self.file, self.name, self.columns, self.images, self.held = file, name, columns, images, held
        self.kind: Kind = kind
        self._named = {key: column for key, column in (columns.columns or {}).items() if key != column}

    def rows(self, batch: pa.RecordBatch, start: int, part: Part) -> Iterator[tuple[int, Row]]:
        """`start`: number of the batch's first row in the file."""
        if start + len(batch) <= part.start:
            return
        texts = {name: batch.column(name).to_pylist() for name in batch.schema.names if self.held or name not in self.images}
        pictures = {name: batch.column(name) for name in self.images} if not self.held else {}
        for inside in range(len(batch)):
            number = start + inside
            if not part.has(number):
                continue
            row = {name: values[inside] for name, values in texts.items()}
            row |= {name: self._references(column[inside], (name,), number) for name, column in pictures.items()}
            yield number, self._row(row, number)

    def _row(self, row: dict[str, Any], number: int) -> Row:
        place = number + 1
        try:
            record = self.columns.record(row)
            value: Any = with_names(record, self._named, self._naming(number))
        except DataError as error:
            value = error
        return Row(place, f"{self.name}:{place}", value)

    def _naming(self, number: int) -> Callable[[Any, Steps], str]:
        def name(image: Any, steps: Steps) -> str:
            reference = refer(self.kind, self.file, number, *steps)
            return Held(reference, bytes_of(image)) if self.held else reference

        return name

    def _references(self, cell: pa.Scalar, steps: Steps, number: int) -> Reference | list[Any] | None:
        """Names the images of a cell, of which only that they are there was read."""
        if not cell.is_valid:
            return None
        if _is_list(cell.type):
            values: Any = cell.values  # type: ignore[attr-defined]
            return [self._references(values[place], (*steps, place), number) for place in range(len(values))]
        if isinstance(cell, pa.StructScalar) and "bytes" in cell and not cell["bytes"].is_valid and not cell["path"].is_valid:
            return None
        return refer(self.kind, self.file, number, *steps)
