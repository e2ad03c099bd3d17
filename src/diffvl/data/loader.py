"""Data files -> datasets of Samples, built when they are asked for, in the loader's processes; and the held-out split.

Nothing here looks at all records unless something needs it: packing and `check_lengths` do. So a record that is too long or wrong
is met when its turn comes. Its place in the step then stays empty: the order of the records, and with it every other sample's
noise and step, is the same whatever is left out, on any number of processes and after a resume.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from torch.utils.data import Dataset

from diffvl.config.recipe import Data
from diffvl.data.images import open_image
from diffvl.data.packing import REFUSED, RowAssignment, first_fit, lengths_of, map_places
from diffvl.data.problems import Problem, is_forgiven, require_usable
from diffvl.data.records import Record
from diffvl.data.samples import PROBLEMS, Sample, encode_record, is_filler, sample_of
from diffvl.data.table import RecordTable, RecordTables
from diffvl.data.videos import NO_VIDEOS, open_video
from diffvl.errors import ConfigError, DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.machine import num_cores
from diffvl.seeding import sample_generator
from diffvl.terminal import console as terminal

log = logging.getLogger(__name__)

_QUIET = terminal.console(quiet=True)
_WORKERS_FROM = 1000  # samples from which a run is long enough for loader processes
_MOST_WORKERS = 4
_IMAGES_PAY_FROM = 500  # records from which several processes look at images faster than one


class SampleDataset(Dataset):
    """Rows of samples of one file, built when they are asked for. A row is one record, or several that are packed.

    A record that cannot be used is returned as its Problem (see `collate`).
    """

    def __init__(
        self,
        records: Sequence[Record],
        path: Path,
        indices: numpy.ndarray,
        processor: DiffVLProcessor,
        max_length: int | None,
        lengths: numpy.ndarray | None = None,
        rows: RowAssignment | None = None,
        known: Sequence[Problem] = (),
    ) -> None:
        """`indices` picks the records and orders them; `lengths` are their tokens, where these were measured; `rows` are of
        places in these two. `known` are the problems of records that are not among them."""
        self.records, self.path, self.indices, self.processor = records, path, indices, processor
        self.max_length, self.lengths, self.rows, self.known = max_length, lengths, rows, known

    def __len__(self) -> int:
        return len(self.indices) if self.rows is None else len(self.rows)

    def record(self, place: int) -> Record:
        """Gives the place-th record, whatever rows there are."""
        return self.records[int(self.indices[place])]

    def part(self, places: numpy.ndarray) -> "SampleDataset":
        """Gives the records at these places."""
        lengths = None if self.lengths is None else self.lengths[places]
        return SampleDataset(
            self.records, self.path, self.indices[places], self.processor, self.max_length, lengths, known=self.known
        )

    def packed(self, row_length: int, seed: int) -> "SampleDataset":
        """Puts the same records into rows of up to `row_length` tokens. Which records share a row depends on the seed alone, so
        a resumed run finds the same rows."""
        assert self.lengths is not None
        order = torch.randperm(len(self.indices), generator=sample_generator(seed, step=-1, sample=-1)).tolist()
        rows = first_fit(self.lengths.tolist(), order, row_length)
        return SampleDataset(
            self.records, self.path, self.indices, self.processor, self.max_length, self.lengths, rows, self.known
        )

    def problems(self) -> list[Problem]:
        """Tells what is wrong with the text of these records: a pass over all of them."""
        found = []
        for index, record in ((int(index), self.records[int(index)]) for index in self.indices):
            try:
                encode_record(record, self.processor, self.max_length)
            except DataError as error:
                found.append(problem_of(record, index, self.path, error))
        return found

    def __getitem__(self, row: int) -> list[Sample | Problem]:
        return [self._sample(place) for place in ((row,) if self.rows is None else self.rows[row])]

    def _sample(self, place: int) -> Sample | Problem:
        index, record = int(self.indices[place]), self.record(place)
        try:
            return sample_of(record, index, self.processor, self.max_length)
        except DataError as error:
            return problem_of(record, index, self.path, error)


def problem_of(record: Record, index: int, path: Path, error: DataError) -> Problem:
    """Tells what is wrong with a record that its file gave."""
    line = int(record.source.rpartition(":")[2].partition(" ")[0])  # after it may stand which record of the line it is
    message = str(error).removeprefix(f"{record.source}: ")
    return Problem(error.kind, path, line, index + 1, None if record.id == record.source else record.id, message)


@dataclass(frozen=True)
class StageData:
    train: SampleDataset
    held_out: SampleDataset | None


def load_data(
    data: Data,
    processor: DiffVLProcessor,
    longest: int | None,
    console: Console = _QUIET,
    tables: RecordTables | None = None,
) -> StageData:
    """Opens a stage's files; measures their records where packing or `check_lengths` ask for it.

    Args:
        longest: see `hub.layout_diffvl.longest_sample`. tables: those of the run's other stages, which may read the same files.
    Raises:
        DataError: naming the records that cannot be used, by the rule of `data.on_error`.
        ConfigError: if no file is given, or the held-out share leaves nothing to train on.
    """
    if data.train is None:
        raise ConfigError("no training data: give --data FILE (LLaVA-format .json or .jsonl) or set data.train in the recipe")
    if longest is not None and data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length}, but a sample in whole blocks may have {longest} tokens in this trunk's "
            f"context: set it to {longest} or less"
        )
    tables = tables or RecordTables(console)
    train = open_samples(Path(data.train), data, processor, console, tables)
    if data.eval is not None:
        unpacked = data.model_copy(update={"row_length": None})
        return StageData(train, open_samples(Path(data.eval), unpacked, processor, console, tables))
    if not data.holdout:
        return StageData(train, None)
    count = len(train.indices)
    if data.holdout >= count:
        raise ConfigError(f"data.holdout is {data.holdout}, but {data.train} has {count} records: nothing is left to train on")
    # Every n-th record, so that a file sorted by kind gives a mixed held-out set.
    stride = count / data.holdout
    held = numpy.unique([int(place * stride) for place in range(data.holdout)])
    return StageData(train.part(numpy.setdiff1d(numpy.arange(count), held)), train.part(held))


def open_samples(path: Path, data: Data, processor: DiffVLProcessor, console: Console, tables: RecordTables) -> SampleDataset:
    """Opens one file's samples. Records that are longer than `max_length` or do not fit the chat template are never cut. With
    `check_lengths` they are told now, and nothing else is changed by it; packing leaves them out now; otherwise they are met when
    their turn comes."""
    table = tables.open(path, data)
    _check_videos(table, path, data, processor)
    everything = SampleDataset(table, path, table.usable, processor, data.max_length, known=table.problems)
    if not data.check_lengths and data.row_length is None:
        return everything
    lengths = lengths_of(table, processor, console)
    good = (lengths != REFUSED) & (lengths <= data.max_length)
    problems = everything.part(numpy.flatnonzero(~good)).problems()
    forgiven = [problem for problem in problems if is_forgiven(problem, data)]
    if not good.any() and len(forgiven) == len(problems):
        raise DataError(f"{path}: all {len(problems)} records are longer than {data.max_length} tokens; raise data.max_length")
    wrong = [problem for problem in problems if not is_forgiven(problem, data)]
    require_usable([*table.problems, *wrong], path, len(table), data)
    if forgiven:
        _tell_forgiven(path, len(forgiven), len(table), data.max_length)
    if data.row_length is None:
        return everything
    known = [*table.problems, *problems]
    return SampleDataset(table, path, table.usable[good], processor, data.max_length, lengths[good], known=known)


def _check_videos(table: RecordTable, path: Path, data: Data, processor: DiffVLProcessor) -> None:
    """Raises DataError at once if records show videos that the checkpoint does not take, and are not to be left out."""
    showing = table.with_videos
    if len(showing) and processor.sampler is None and data.on_error == "stop":
        first = table[int(showing[0])]
        raise DataError(
            f"{path}: {len(showing)} of {len(table)} records show a video, which this checkpoint does not take, the first "
            f"{first.source}: leave them out, or set data.on_error=skip and raise data.max_skipped",
            NO_VIDEOS,
        )


@cache
def _tell_forgiven(path: Path, long: int, records: int, limit: int) -> None:
    """Warns once a run, of which two stages may read one file."""
    log.warning("%s: %d of %d records are longer than %d tokens and left out", path, long, records, limit)


def num_workers(data: Data, samples: int, processes: int) -> int:
    """Chooses how many loader processes each of the training processes on this machine has."""
    if data.workers is not None:
        return data.workers
    return 0 if samples < _WORKERS_FROM else max(1, min(_MOST_WORKERS, num_cores() // processes - 1))


# --- images ------------------------------------------------------------------------------------------------------------


def check_images(stage: StageData, data: Data, console: Console) -> None:
    """Decodes every image of a set of up to `check_images` records: a damaged one is then found before training, not at its
    step.

    Raises:
        DataError: with all problems, by the rule of `data.on_error`.
    """
    for samples in (stage.train, stage.held_out):
        count = 0 if samples is None else len(samples.indices)
        if samples is None or count > data.check_images:
            continue
        looked = map_places(partial(_look, samples), count, _IMAGES_PAY_FROM, console, "checking images")
        problems = [problem for problem in looked if problem is not None]
        wrong = [problem for problem in samples.known if not is_forgiven(problem, data)]
        require_usable([*wrong, *problems] if problems else [], samples.path, len(samples.records), data)


def _look(samples: SampleDataset, place: int) -> Problem | None:
    record = samples.record(place)
    try:
        for path in record.images:
            open_image(path, record.source)
        for video in record.videos:
            open_video(video, record.source, samples.processor.sampler)
    except DataError as error:
        return problem_of(record, int(samples.indices[place]), samples.path, error)
    return None


def batches_of(
    dataset: SampleDataset,
    places: list[int],
    size: int,
    collator: Callable[[Sequence[Any]], dict[str, Any]],
    problems: list[Problem],
) -> Iterator[dict[str, Any]]:
    """Batches in the order of `places`. What is wrong with samples that cannot be built is added to `problems`; a batch of which
    nothing is left is left out."""
    for start in range(0, len(places), size):
        batch = collator([dataset[place] for place in places[start : start + size]])
        problems += batch.pop(PROBLEMS, ())
        if not is_filler(batch):
            yield batch
