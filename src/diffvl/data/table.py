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
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy
import pyarrow as pa
from datasets import config as datasets_config
from rich.console import Console

from diffvl.config.recipe import Data
from diffvl.data.images import ExistingFiles
from diffvl.data.jsonfile import check_path
from diffvl.data.problems import Problem, require_usable
from diffvl.data.records import Record, Turn, parse_file
from diffvl.errors import DataError
from diffvl.store.files import replacing
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import track

_BATCH_ENTRIES = 1024  # records per Arrow batch
_BAR_FROM = 5000  # records; fewer are read before a bar could be seen
_CHUNK = 1 << 20  # bytes
_QUIET = terminal.console(quiet=True)

_READING = ("image_folder", "unpaired_turns")  # settings of `Data` by which a file is parsed: arguments of parse_file
_FORMAT = 5  # of the Arrow cache: raise it when what is read out of a file changes
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
        self.digests: numpy.ndarray = self._table.column("digest").to_numpy()
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
        files = ExistingFiles()
        images, videos = (self._table.column(name).chunks for name in ("images", "videos"))
        return all(image in files for chunk in images for image in chunk.flatten().to_pylist()) and all(
            path in files or not path or os.path.isdir(path) for chunk in videos for path in chunk.flatten().flatten().to_pylist()
        )


def open_records(
    path: Path, data: Data | None = None, console: Console = _QUIET, look: bool = True, advise: bool = True
) -> RecordTable:
    """Opens the file's records as a memory-mapped table.

    Args:
        data: its `image_folder`, `on_error` and `max_skipped` count; default: a file with its images and without problems.
        look: whether to look again for the images of a file that was read before. One process of a run does.
        advise: whether the error names the settings that would let the run go on.
    Raises:
        DataError: with the problems of the file, by the rule of `on_error`; nothing is left in the cache then.
    """
    data = data or Data()
    check_path(path)
    content = _content_of(path)
    reading = {name: getattr(data, name) for name in _READING}
    table = _cache_path(path, content, reading)
    opened = RecordTable(table, path, content.digest) if table.exists() else None
    # What was missing may be there now, and what was there may be missing.
    if opened is None or (look and (len(opened.usable) < len(opened) or not opened.images_exist())):
        _build_table(path, table, reading, console, content.records)
        opened = RecordTable(table, path, content.digest)
    try:
        require_usable(opened.problems, path, len(opened), data, advise)
    except DataError:
        table.unlink(missing_ok=True)
        raise
    return opened


class RecordTables:
    """The tables of a run: a data file is opened once, however many stages read it."""

    def __init__(self, console: Console = _QUIET, look: bool = True) -> None:
        """`look`: see `open_records`."""
        self._console, self._look = console, look
        self._opened: dict[tuple[str, ...], RecordTable] = {}

    def open(self, path: Path, data: Data) -> RecordTable:
        """Opens the file's records. Raises DataError as `open_records`."""
        key = (str(path), *(str(getattr(data, name)) for name in _READING))
        if key in self._opened:
            require_usable(self._opened[key].problems, path, len(self._opened[key]), data)
        else:
            self._opened[key] = open_records(path, data, self._console, self._look)
        return self._opened[key]


# --- the file's content ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """digest: of the bytes. records: as many as can be told without parsing, by the keys that each has once."""

    digest: str
    records: int


def _content_of(path: Path) -> _Content:
    hashed, records = hashlib.blake2b(digest_size=16), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
                records += chunk.count(b'"conversations"') + chunk.count(b'"messages"')
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return _Content(hashed.hexdigest(), records)


def content_digest(path: Path) -> str:
    """Computes a digest of a file's bytes. Raises DataError if it cannot be read."""
    return _content_of(path).digest


def _cache_path(path: Path, content: _Content, reading: dict[str, Any]) -> Path:
    """Names the table by all that its entries follow from. The file's own path counts too: messages name it."""
    facts = [_FORMAT, content.digest, os.path.abspath(path), _images_below(path, reading), reading]
    name = hashlib.sha256(json.dumps(facts, default=str).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / f"{name}.arrow"


def _images_below(path: Path, reading: dict[str, Any]) -> str:
    """Gives the folder at which relative paths of images start."""
    return os.path.abspath(reading["image_folder"] or path.parent)


def cache_folder() -> Path:
    """Tells where tables and measured lengths lie."""
    return Path(datasets_config.HF_DATASETS_CACHE) / "diffvl"


def cache_error(path: Path, error: OSError) -> DataError:
    """Tells what to say where nothing can be written into the cache folder."""
    advice = "set HF_DATASETS_CACHE to a folder that can be written"
    return DataError(f"{path}: its record cache {cache_folder()} cannot be written ({error}); {advice}")


# --- building the table ----------------------------------------------------------------------------------------------------


def _build_table(path: Path, table: Path, reading: dict[str, Any], console: Console, expected: int) -> None:
    """Writes the whole table or none."""
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with replacing(table, shared=True) as beside:
            _write_table(path, beside, reading, console if expected >= _BAR_FROM else _QUIET, expected)
    except OSError as error:  # of the cache only: reading the data file tells its own as DataError
        raise cache_error(path, error) from error


def _write_table(path: Path, table: Path, reading: dict[str, Any], console: Console, expected: int) -> None:
    images_below = _images_below(path, reading) + os.sep
    columns: tuple[list[Any], ...] = ([], [], [], [], [])
    with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:

        def write() -> None:
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA))
            for column in columns:
                column.clear()

        for item in track(console, parse_file(path, **reading), expected, f"reading {path.name}"):
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
    named = [image.removeprefix(images_below) for image in images]
    named += [path.removeprefix(images_below) for video in videos for path in video]
    facts = json.dumps([seen, named], ensure_ascii=False).encode("utf-8", "surrogateescape")
    return text, images, videos, None, int.from_bytes(hashlib.blake2b(facts, digest_size=8).digest(), "little") or 1


def _problem_entry(problem: Problem) -> tuple[None, None, None, str, int]:
    fields = {key: value for key, value in vars(problem).items() if key not in ("path", "number")}
    return None, None, None, json.dumps(fields), 0
