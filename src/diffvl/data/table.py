"""Data file -> a memory-mapped table of its records, which every process opens and none holds in memory.

The table lies in the cache folder of `datasets` and is built once for each content of the data file: a file that was touched, or
copied over itself, is not read again. An entry is a record, or what is wrong with it, so the number of an entry is the number of
the record in its file, whatever is left out.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy
import pyarrow as pa
from rich.console import Console

from diffvl.config.recipe import Data
from diffvl.data.cachefolder import cache_error, cache_folder
from diffvl.data.cells import open_arrow, open_parquet
from diffvl.data.image_folder import ExistingImages
from diffvl.data.problems import Problem, require_usable
from diffvl.data.reading import ARROW, JSON, TAR
from diffvl.data.records import Record, Turn
from diffvl.data.references import portable
from diffvl.data.source_records import parse_source, source_at
from diffvl.data.sources import Source
from diffvl.errors import DataError
from diffvl.store.files import replacing
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import track

_BATCH_ENTRIES = 4096  # records per Arrow batch
_BAR_FROM = 5000  # records; fewer are read before a bar could be seen
_CHUNK = 1 << 20  # bytes
_QUIET = terminal.console(quiet=True)

_FORMAT = 6  # of the Arrow cache: raise it when what is read out of a file changes
_SCHEMA = pa.schema(
    [
        ("record", pa.string()),  # JSON of the fields of Record but for images and videos; null for a problem
        ("images", pa.list_(pa.string())),
        ("videos", pa.list_(pa.list_(pa.string()))),  # each a list of frames, or a file or folder after an empty text
        ("problem", pa.string()),  # JSON of the fields of Problem but for path and number; null for a record
        ("digest", pa.uint64()),  # of what training sees of the record; 0 for a problem
    ]
)


class RecordTable(Sequence[Record]):
    """All records of a data file, read as they are asked for. `usable` are the entries that hold one.

    usable: numbers of entries, rising, int64. digests [entries], uint64: equal where training would see the same (images by
    their names below the image folder); 0 at problems. path: the data file, bytes_digest: of its bytes.
    """

    def __init__(self, file: Path, path: Path, bytes_digest: str) -> None:
        self.path, self._file, self.bytes_digest = path, file, bytes_digest
        self._table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        self.usable: numpy.ndarray = numpy.flatnonzero(self._table.column("record").is_valid().to_numpy())

    def __reduce__(self) -> tuple[Any, ...]:  # a process that is not forked opens the file anew
        return RecordTable, (self._file, self.path, self.bytes_digest)

    def __len__(self) -> int:
        """Counts the entries: records and problems."""
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        text = self._table.column("record")[index].as_py()
        assert text is not None, f"entry {index} holds a problem"
        fields = json.loads(text)
        turns = tuple(Turn(**turn) for turn in fields.pop("turns"))
        images, videos = (self._table.column(name)[index].as_py() for name in ("images", "videos"))
        shown = tuple(video[1] if not video[0] else tuple(video) for video in videos)
        return Record(**fields, turns=turns, images=tuple(images), videos=shown)

    @property
    def digests(self) -> numpy.ndarray:
        """Gives the digests, read anew: they are compared once, and would stay in every process."""
        return self._table.column("digest").to_numpy()

    @cached_property
    def problems(self) -> list[Problem]:
        bad = numpy.flatnonzero(self._table.column("problem").is_valid().to_numpy())
        texts = self._table.column("problem").take(pa.array(bad)).to_pylist()
        return [
            Problem(path=self.path, number=int(index) + 1, **json.loads(text)) for index, text in zip(bad, texts, strict=True)
        ]

    @cached_property
    def content(self) -> str:
        """A digest of all that training sees of the records, in their order."""
        return hashlib.blake2b(self.digests.tobytes(), digest_size=16).hexdigest()

    @cached_property
    def with_videos(self) -> numpy.ndarray:
        """Numbers of the entries that show a video."""
        chunks = self._table.column("videos").chunks
        lengths = [chunk.value_lengths().fill_null(0).to_numpy() for chunk in chunks]
        return numpy.flatnonzero(numpy.concatenate(lengths)) if lengths else numpy.zeros(0, dtype=numpy.int64)

    def images_exist(self) -> bool:
        """Tells whether all images and videos are still there."""
        files = ExistingImages()
        images, videos = (self._table.column(name).chunks for name in ("images", "videos"))
        return all(image in files for chunk in images for image in chunk.flatten().to_pylist()) and all(
            path in files or not path or os.path.isdir(path) for chunk in videos for path in chunk.flatten().flatten().to_pylist()
        )


def open_records(
    path: Path | Source, data: Data | None = None, console: Console = _QUIET, look: bool = True, advise: bool = True
) -> RecordTable:
    """Opens a source's records as a memory-mapped table.

    Args:
        path: a source, or one by its path alone.
        data: how it is read, and whether records may be left out; default: a file with its images and without problems.
        look: whether to look again for the images of a file that was read before. One process of a run does.
        advise: whether the error names the settings that would let the run go on.
    Raises:
        DataError: with the problems of the source, by the rule of `on_error`; nothing is left in the cache then.
    """
    data = data or Data()
    source = path if isinstance(path, Source) else source_at(path, data)
    content = _content_of(source)
    table = _cache_path(source, content, data)
    opened = RecordTable(table, source.path, content.digest) if table.exists() else None
    # What was missing may be there now, and what was there may be missing.
    if opened is None or (look and (len(opened.usable) < len(opened) or not opened.images_exist())):
        _build_table(source, table, data, console, content.records)
        opened = RecordTable(table, source.path, content.digest)
    try:
        require_usable(opened.problems, source.path, len(opened), data, advise)
    except DataError:
        table.unlink(missing_ok=True)
        raise
    return opened


class RecordTables:
    """The tables of a run: a source is opened once, however many stages read it."""

    def __init__(self, console: Console = _QUIET, look: bool = True) -> None:
        """`look`: see `open_records`."""
        self._console, self._look = console, look
        self._opened: dict[tuple[Any, ...], RecordTable] = {}

    def open(self, source: Source, data: Data) -> RecordTable:
        """Opens the source's records. Raises DataError as `open_records`."""
        key = (source.files, source.settings.model_dump_json(), data.unpaired_turns)
        if key in self._opened:
            require_usable(self._opened[key].problems, source.path, len(self._opened[key]), data)
        else:
            self._opened[key] = open_records(source, data, self._console, self._look)
        return self._opened[key]


# --- the source's content --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """digest: of the bytes, of large tables of what they say of themselves. stamp: what the table is known by beside it.
    records: as many as can be told without parsing, in JSON by the keys that each has once; None where nothing tells."""

    digest: str
    records: int | None
    stamp: tuple[int, ...] = ()


def _content_of(source: Source) -> _Content:
    read = _content_of_json if source.kind == JSON else partial(_content_of_table, source.kind)
    try:
        parts = [read(file) for file in source.files]
    except OSError as error:
        raise DataError(f"{error.filename or source.path}: cannot be read ({error.strerror})") from error
    if len(parts) == 1:
        return parts[0]
    joined = hashlib.blake2b("".join(part.digest for part in parts).encode(), digest_size=16).hexdigest()
    counts = [part.records for part in parts if part.records is not None]
    records = sum(counts) if len(counts) == len(parts) else None
    return _Content(joined, records, tuple(number for part in parts for number in part.stamp))


def _content_of_json(file: str) -> _Content:
    hashed, records = hashlib.blake2b(digest_size=16), 0
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            hashed.update(chunk)
            records += chunk.count(b'"conversations"') + chunk.count(b'"messages"')
    return _Content(hashed.hexdigest(), records)


_TAIL = 1 << 16  # bytes at the end of a table, where its columns are described


def _content_of_table(kind: str, file: str) -> _Content:
    """Knows a table by its size, the time of its last change and its end: its bytes may be a hundred gigabytes of images."""
    facts = os.stat(file)
    with open(file, "rb") as opened:
        opened.seek(max(0, facts.st_size - _TAIL))
        hashed = hashlib.blake2b(opened.read() + str(facts.st_size).encode(), digest_size=16)
    return _Content(hashed.hexdigest(), _records_in(kind, file), (facts.st_mtime_ns,))


def _records_in(kind: str, file: str) -> int | None:
    if kind == TAR:
        return None
    return len(open_arrow(file)) if kind == ARROW else open_parquet(file)[0].metadata.num_rows


def content_digest(source: Source) -> str:
    """Computes a digest of a source's content. Raises DataError if it cannot be read."""
    return _content_of(source).digest


def _cache_path(source: Source, content: _Content, data: Data) -> Path:
    """Names the table by all that its entries follow from. The files' own paths count too: messages and references name them."""
    files = [os.path.abspath(file) for file in source.files]
    settings = source.settings
    facts = [_FORMAT, content.digest, content.stamp, files, source.names, source.images().folder, settings.columns]
    facts.append(data.unpaired_turns)
    name = hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / f"{name}.arrow"


# --- building the table ----------------------------------------------------------------------------------------------------


def _build_table(source: Source, table: Path, data: Data, console: Console, expected: int | None) -> None:
    """Writes the whole table or none."""
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with replacing(table, shared=True) as beside:
            shows = expected is None or expected >= _BAR_FROM
            _write_table(source, beside, data, console if shows else _QUIET, expected)
    except OSError as error:  # of the cache only: reading the data file tells its own as DataError
        raise cache_error(source.path, error) from error


def _write_table(source: Source, table: Path, data: Data, console: Console, expected: int | None) -> None:
    images_below = (source.images().folder or "") + os.sep
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:

        def write() -> None:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
            for column in columns:
                column.clear()

        for item in track(console, parse_source(source, data.unpaired_turns), expected, f"reading {source.path.name}"):
            entry = _problem_entry(item) if isinstance(item, Problem) else _record_entry(item, images_below)
            for column, value in zip(columns, entry, strict=True):
                column.append(value)
            if len(columns[0]) == _BATCH_ENTRIES:
                write()
        write()


def _record_entry(record: Record, images_below: str) -> tuple[str, tuple[str, ...], list[list[str]], None, int]:
    """Turns a record into JSON field by field, so that a field more in Record or Turn is kept without a word here."""
    fields = {**vars(record), "turns": [vars(turn) for turn in record.turns]}
    images, videos = fields.pop("images"), [["", one] if isinstance(one, str) else [*one] for one in fields.pop("videos")]
    text = json.dumps(fields, ensure_ascii=False)
    # Name and place of a record are not seen by training, and a set may be moved.
    seen = {key: value for key, value in fields.items() if key not in ("id", "source")}
    named = [portable(image, images_below) for image in images]
    named += [portable(path, images_below) for video in videos for path in video]
    facts = json.dumps([seen, named], ensure_ascii=False).encode("utf-8", "surrogateescape")
    return text, images, videos, None, int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") or 1


def _problem_entry(problem: Problem) -> tuple[None, None, None, str, int]:
    fields = {key: value for key, value in vars(problem).items() if key not in ("path", "number")}
    return None, None, None, json.dumps(fields), 0
