"""Data files -> datasets of Samples (`sample_dataset`, several as a `mixture`, or a `stream`); and the held-out split.

Nothing here looks at all records unless something needs it: packing and `check_lengths` do.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

from diffvl.config.recipe import Data
from diffvl.data.images import open_image
from diffvl.data.mixture import Mixture, Shares, shares_of
from diffvl.data.packing import REFUSED, lengths_of, map_places
from diffvl.data.problems import Problem, is_forgiven, require_usable
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import PROBLEMS, is_filler
from diffvl.data.sources import Source, eval_settings, find_source, require_distinct, train_settings
from diffvl.data.stream import StreamDataset, StreamPart
from diffvl.data.table import RecordTable, RecordTables
from diffvl.data.videos import NO_VIDEOS, open_video
from diffvl.errors import ConfigError, DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.machine import num_cores
from diffvl.terminal import console as terminal

log = logging.getLogger(__name__)

_QUIET = terminal.console(quiet=True)
_WORKERS_FROM = 1000  # samples from which a run is long enough for loader processes
_MOST_WORKERS = 4
_IMAGES_PAY_FROM = 500  # records from which several processes look at images faster than one


@dataclass(frozen=True)
class StageData:
    train: SampleDataset | Mixture | StreamDataset
    held_out: SampleDataset | Mixture | None

    def parts(self) -> "list[SampleDataset | StreamPart]":
        """Gives every data set that is read, in order."""
        held_out = () if self.held_out is None else self.held_out.parts
        return [*self.train.parts, *held_out]


def load_data(
    data: Data,
    processor: DiffVLProcessor,
    longest: int | None,
    console: Console = _QUIET,
    tables: RecordTables | None = None,
) -> StageData:
    """Opens a stage's files; measures their records where packing or `check_lengths` ask for it. Of a stream nothing is opened.

    Args:
        longest: see `hub.layout_diffvl.longest_sample`. tables: those of the run's other stages, which may read the same files.
    Raises:
        DataError: naming the records that cannot be used, by the rule of `data.on_error`.
        ConfigError: if no file is given, or the held-out share leaves nothing to train on.
    """
    settings = train_settings(data)
    if longest is not None and data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length}, but a sample in whole blocks may have {longest} tokens in this trunk's "
            f"context: set it to {longest} or less"
        )
    weights = [one.weight for one in settings if one.weight is not None]
    shares = shares_of(weights) if weights else None
    tables = tables or RecordTables(console)
    held_out = None
    if (of_eval := eval_settings(data)) is not None:
        unpacked = data.model_copy(update={"row_length": None})
        held_out = open_samples(find_source(of_eval), unpacked, processor, console, tables)
    sources = [find_source(one, data.streaming) for one in settings]
    require_distinct(sources)
    if data.streaming:
        return StageData(StreamDataset(sources, shares, data, processor), held_out)
    parts, offset = [], 0
    for source in sources:
        parts.append(open_samples(source, data, processor, console, tables, offset))
        offset += parts[-1].num_records
    if not data.holdout:
        return StageData(_joined(parts, shares), held_out)
    train, held = _split(parts, data.holdout)
    return StageData(_joined(train, shares), _joined(held, None))


def _joined(parts: list[SampleDataset], shares: Shares | None) -> SampleDataset | Mixture:
    return parts[0] if len(parts) == 1 else Mixture(parts, shares)


def _split(parts: list[SampleDataset], holdout: int) -> tuple[list[SampleDataset], list[SampleDataset]]:
    """Sets every n-th record apart, so that a file sorted by kind gives a mixed held-out set.

    Raises:
        ConfigError: nothing is left of a source.
    """
    sizes = [len(part.indices) for part in parts]
    count = sum(sizes)
    stride = count / holdout
    held = numpy.unique([int(place * stride) for place in range(holdout)])
    train, held_out, start = [], [], 0
    for part, size in zip(parts, sizes, strict=True):
        own = held[(held >= start) & (held < start + size)] - start
        start += size
        if len(own) == size or holdout >= count:
            raise ConfigError(f"data.holdout is {holdout}, but {part.path} has {size} records: nothing is left to train on")
        train.append(part.part(numpy.setdiff1d(numpy.arange(size), own)))
        held_out += [part.part(own)] if len(own) else []
    return train, held_out


def open_samples(
    source: Source, data: Data, processor: DiffVLProcessor, console: Console, tables: RecordTables, offset: int = 0
) -> SampleDataset:
    """Opens one source's samples. Records that are longer than `max_length` or do not fit the chat template are never cut. With
    `check_lengths` they are told now, and nothing else is changed by it; packing leaves them out now; otherwise they are met when
    their turn comes."""
    path = source.path
    table = tables.open(source, data)
    _check_videos(table, path, data, processor)
    everything = SampleDataset(
        table, path, table.usable, processor, data.max_length, known=table.problems, offset=offset, names=source.names
    )
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
    return everything.measured(good, lengths[good], [*table.problems, *problems])


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


def num_workers(data: Data, samples: int | None, processes: int) -> int:
    """Chooses how many loader processes each of the training processes on this machine has; `samples`: None if nobody knows."""
    if data.workers is not None:
        return data.workers
    return 0 if samples is not None and samples < _WORKERS_FROM else max(1, min(_MOST_WORKERS, num_cores() // processes - 1))


# --- images ------------------------------------------------------------------------------------------------------------


def check_images(stage: StageData, data: Data, console: Console) -> None:
    """Decodes every image of a set of up to `check_images` records: a damaged one is then found before training, not at its
    step.

    Raises:
        DataError: with all problems, by the rule of `data.on_error`.
    """
    for samples in stage.parts():
        if not isinstance(samples, SampleDataset) or len(samples.indices) > data.check_images:
            continue
        count = len(samples.indices)
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
        return samples.problem_of(record, int(samples.indices[place]), error)
    return None


def batches_of(
    dataset: SampleDataset | Mixture,
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
