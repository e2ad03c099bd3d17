"""Sources that are read from front to back, for tars and remote data: endless rows of samples, with a position to go on from.

All loader processes of all training processes are streams, and each has its share of the files: in every epoch the list of files
is shuffled by the seed and dealt out. A stream collects a window of records, permutes it, packs it if rows are packed, and gives
it out row by row. Its position is where the window begins and how many of its rows are out. So a resume opens one file, reads one
window again, and goes on with the very next row; what it depends on is the number of streams, which must stay the same.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import IterableDataset, get_worker_info

from diffvl.config.recipe import Data
from diffvl.data.columns import ColumnNames
from diffvl.data.mixture import Shares
from diffvl.data.opening import is_remote, size_of
from diffvl.data.packing import first_fit
from diffvl.data.problems import Problem
from diffvl.data.reading import JSON, READERS
from diffvl.data.records import Record, RecordReader
from diffvl.data.rows import Part, Row
from diffvl.data.samples import Sample, encode_record, sample_of
from diffvl.data.sources import Source
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.seeding import sample_generator

log = logging.getLogger(__name__)

POSITION = "position"  # key of a batch: its stream, and where that stands after it
_PARTS_PER_STREAM = 8  # of a source's files: with fewer, streams would differ in how often they see what they have
_FILE_BITS, _ROW_BITS = 20, 36  # of a sample's index
# What stands in the place of a sample's index, so that no two draws of a run have one generator.
_FILES, _WINDOW = -1000, -2000


@dataclass(frozen=True)
class Position:
    """Where a stream of one source stands: rows of the window that begins at a row of the unit-th of its files in an epoch.
    unit, row: of the window's first record. given: rows of the window that are out."""

    epoch: int = 0
    unit: int = 0
    row: int = 0
    given: int = 0


@dataclass(frozen=True)
class StreamPart:
    """One source of a stream, as those see it who count what was left out."""

    source: Source
    known: tuple[Problem, ...] = ()
    num_records: None = None  # nobody knows

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def names(self) -> tuple[str, ...] | None:
        """Gives what its files are called below `path`."""
        return self.source.names

    def facts(self) -> list[str]:
        """Tells each file's name and size; of remote ones the name alone, since each would be asked for."""
        files = zip(self.source.names or (self.source.path.name,), self.source.files, strict=True)
        return [json.dumps([name, None if is_remote(file) else size_of(file)]) for name, file in files]

    @property
    def digests(self) -> numpy.ndarray:
        """Gives a digest of each file's name and size, uint64."""
        hashed = (hashlib.blake2b(fact.encode("utf-8", "surrogateescape"), digest_size=8).digest() for fact in self.facts())
        return numpy.array([int.from_bytes(digest, "little") or 1 for digest in hashed], dtype=numpy.uint64)


class StreamDataset(IterableDataset):
    """Endless batches; see `batches_of`. Nothing is opened before the first is asked for."""

    def __init__(self, sources: Sequence[Source], shares: Shares | None, data: Data, processor: DiffVLProcessor) -> None:
        assert len(sources) < 1 << (63 - _FILE_BITS - _ROW_BITS) and all(len(one.files) < 1 << _FILE_BITS for one in sources)
        self.parts = tuple(StreamPart(source) for source in sources)
        self.shares, self.data, self.processor = shares or Shares((1,)), data, processor
        self.row_length: int | None = None
        self.seed = 0

    def packed(self, row_length: int, seed: int) -> "StreamDataset":
        """Packs the records of a window into rows, each source by itself."""
        return self.begun(seed, row_length)

    def begun(self, seed: int, row_length: int | None = None) -> "StreamDataset":
        """Gives the same stream in the order of a seed."""
        other = StreamDataset([part.source for part in self.parts], self.shares, self.data, self.processor)
        other.seed, other.row_length = seed, row_length or self.row_length
        return other

    def place_of(self, index: int) -> str:
        """Tells where a sample's record stands, by the sample's index."""
        source, file = index >> (_FILE_BITS + _ROW_BITS), (index >> _ROW_BITS) & ((1 << _FILE_BITS) - 1)
        return f"{self.parts[source].source.name_of(file)}:{(index & ((1 << _ROW_BITS) - 1)) + 1}"

    def rows(self, stream: int, streams: int, state: "StreamState") -> Iterator[tuple[list[Sample | Problem], "StreamState"]]:
        """Gives a stream's rows without end, each with the state after it."""
        parts = [
            _SourceStream(number, part.source, self, stream, streams, state.positions[number])
            for number, part in enumerate(self.parts)
        ]
        readers = [part.rows() for part in parts]
        positions, draws = list(state.positions), state.draws
        while True:
            number, _ = self.shares.source_of(draws, self.seed, stream, streams)
            row, positions[number] = next(readers[number])
            draws += 1
            yield row, StreamState(draws, tuple(positions))

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a stream is read through `Batches`")


@dataclass(frozen=True)
class StreamState:
    """Where one stream stands. draws: rows that are out. positions: in each source."""

    draws: int
    positions: tuple[Position, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> "StreamState":
        return cls(state["draws"], tuple(Position(**position) for position in state["positions"]))


class Batches(IterableDataset):
    """The batches of one training process, for a `DataLoader` without a batch size of its own. Each has under `POSITION` its
    stream's number and state, as JSON.

    The loader asks its processes in turn, beginning with the first, so the streams are dealt out to them in such a way that the
    next batch comes from the stream whose turn it is.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        batch_size: int,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        rank: int,
        processes: int,
        states: dict[int, StreamState],
        turn: int,
    ) -> None:
        """
        Args:
            states: of streams that have begun, by their numbers. turn: batches that this process has had.
        """
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.rank, self.processes, self.states, self.turn = rank, processes, states, turn

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stream = self.rank * workers + (number + self.turn) % workers
        start = StreamState(0, (Position(),) * len(self.dataset.parts))
        rows = self.dataset.rows(stream, self.processes * workers, self.states.get(stream, start))
        while True:
            taken = [next(rows) for _ in range(self.batch_size)]
            yield {**self.collate([row for row, _ in taken]), POSITION: (stream, taken[-1][1].to_json())}


# --- one source in one stream --------------------------------------------------------------------------------------------


class _SourceStream:
    """The rows that one stream has of one source."""

    def __init__(
        self, number: int, source: Source, dataset: StreamDataset, stream: int, streams: int, position: Position
    ) -> None:
        self.number, self.source, self.dataset = number, source, dataset
        self.stream, self.streams, self.position = stream, streams, position
        self.columns = ColumnNames(source.settings.columns)
        self.reader = RecordReader(source.images(), dataset.data.unpaired_turns)
        # So many streams share a file, each taking some of its rows, that all of them have the same number of parts, or many.
        files = len(source.files)
        even, enough = streams // math.gcd(files, streams), math.ceil(_PARTS_PER_STREAM * streams / files)
        self.sharing = min(even, enough)

    def rows(self) -> Iterator[tuple[list[Sample | Problem], Position]]:
        """Gives the rows from the position on, each with the position after it."""
        given, looked = self.position.given, False
        for window, start in self._windows():
            if not looked:
                looked = True
                yield from self._first_look(start)
            rows = self._rows_of(window, start)
            for count in range(given + 1, len(rows) + 1):
                built = [item if isinstance(item, Problem) else self._sample(item) for item in rows[count - 1]]
                yield built, Position(start.epoch, start.unit, start.row, count)
            given = 0

    def _first_look(self, start: Position) -> Iterator[tuple[list[Sample | Problem], Position]]:
        """Tells after the first window which keys are not used; a column that no row of it has stops the run. (A table tells of
        its columns itself, a tar of each sample's.)"""
        if not self.stream:
            self.reader.tell_unused(self.source.path)
        if self.source.kind != JSON:
            return
        try:
            self.columns.require_seen(str(self.source.path))
        except DataError as error:
            yield [self._problem(0, 0, str(error).removeprefix(f"{self.source.path}: "))], start

    def _windows(self) -> Iterator[tuple[list["_Item"], Position]]:
        """Gives windows of records in the order of their files, each with its beginning; none reaches over an epoch's end."""
        epoch, unit, first = self.position.epoch, self.position.unit, self.position.row
        while True:
            window: list[_Item] = []
            start = Position(epoch, unit, first)
            found = unit > 0 or first > 0
            for unit, number, item in self._epoch(epoch, unit, first):  # noqa: B007, B020  # what is left of the epoch
                if not window:
                    start = Position(epoch, unit, number)
                window.append(item)
                found = True
                if len(window) == self.dataset.data.window:
                    yield window, start
                    window = []
            if window:
                yield window, start
            if not found:
                yield (
                    [
                        self._problem(
                            0, 0, f"fewer records than the {self.streams} loader processes that share them: set data.workers"
                        )
                    ],
                    start,
                )
            epoch, unit, first = epoch + 1, 0, 0

    def _epoch(self, epoch: int, unit: int, first: int) -> Iterator[tuple[int, int, "_Item"]]:
        """Gives what is left of an epoch: (unit, number of the row in its file, its record)."""
        for place, (file, share) in enumerate(self._units(epoch)[unit:], unit):
            start = first if place == unit else 0
            number = start
            try:
                for number, row in self._read(file, Part(start, share, self.sharing)):
                    yield place, number, self._item(row, file, number)
            except DataError as error:  # of the file as a whole
                message = str(error).removeprefix(f"{self.source.files[file]}: ")
                yield place, number, self._problem(file, number, message)

    def _units(self, epoch: int) -> list[tuple[int, int]]:
        """Gives this stream's (file, share of its rows) of an epoch."""
        order = _shuffled(len(self.source.files) * self.sharing, self.dataset.seed, epoch, self.number)
        return [divmod(int(unit), self.sharing) for unit in order[self.stream :: self.streams]]

    def _read(self, file: int, part: Part) -> Iterator[tuple[int, Row]]:
        read = READERS[self.source.kind]
        return read(self.source.files[file], self.source.name_of(file), self.columns, True, part)

    def _item(self, row: Row, file: int, number: int) -> "_Item":
        item = self.reader.record_or_problem(row, self.source.path, number + 1, self.source.within(file))
        if isinstance(item, Problem):
            return item
        index = ((self.number << _FILE_BITS | file) << _ROW_BITS) | number
        return _Numbered(item, index, file, number)

    def _problem(self, file: int, number: int, message: str) -> Problem:
        return Problem(
            "file cannot be read", self.source.path, number + 1, number + 1, None, message, True, self.source.within(file)
        )

    # --- window -> rows ----------------------------------------------------------------------------------------------------

    def _rows_of(self, window: list["_Item"], start: Position) -> list[list["_Item"]]:
        """Permutes a window and cuts it into rows: of one record each, or packed."""
        place = f"{self.number}/{start.epoch}/{start.unit}/{start.row}/{self.stream}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:6], "little")
        generator = sample_generator(self.dataset.seed, seed, _WINDOW)
        items = [window[index] for index in torch.randperm(len(window), generator=generator).tolist()]
        row_length = self.dataset.row_length
        return [[item] for item in items] if row_length is None else self._packed(items, row_length)

    def _packed(self, items: list["_Item"], row_length: int) -> list[list["_Item"]]:
        """Fills rows first fit. What cannot be used stands in the first row, where it is counted and takes no room."""
        odd: list[_Item] = []
        good: list[_Numbered] = []
        lengths: list[int] = []
        for item in items:
            if isinstance(item, Problem):
                odd.append(item)
                continue
            try:
                length = len(encode_record(item.record, self.dataset.processor, self.dataset.data.max_length).ids)
            except DataError as error:
                odd.append(self._problem_of(item, error))
                continue
            good.append(item)
            lengths.append(length)
        rows: list[list[_Item]] = []
        if good:
            assignment = first_fit(lengths, range(len(good)), row_length)
            rows = [[good[place] for place in assignment[row]] for row in range(len(assignment))]
        return [[*odd, *rows[0]], *rows[1:]] if rows else [odd]

    def _sample(self, item: "_Numbered") -> Sample | Problem:
        try:
            return sample_of(item.record, item.index, self.dataset.processor, self.dataset.data.max_length)
        except DataError as error:
            return self._problem_of(item, error)

    def _problem_of(self, item: "_Numbered", error: DataError) -> Problem:
        record = item.record
        line = int(record.source.rpartition(":")[2].partition(" ")[0])
        message = str(error).removeprefix(f"{record.source}: ")
        name = None if record.id == record.source else record.id
        within = self.source.within(item.file)
        return Problem(error.kind, self.source.path, line, item.number + 1, name, message, within=within)


@dataclass(frozen=True)
class _Numbered:
    """A record, its sample's index, and the file and row that it stands in."""

    record: Record
    index: int
    file: int
    number: int


_Item = _Numbered | Problem


@lru_cache(maxsize=8)
def _shuffled(units: int, seed: int, epoch: int, source: int) -> torch.Tensor:
    return torch.randperm(units, generator=sample_generator(seed, epoch, _FILES - source))
