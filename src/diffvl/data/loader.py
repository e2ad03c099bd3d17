"""Data files -> datasets of Samples: reading, the length check, and the held-out split."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from torch.utils.data import Dataset

from diffvl.config import Data
from diffvl.data.chat import Sample, encode_record, sample_of
from diffvl.data.collate import raise_bad_record
from diffvl.data.images import open_picture
from diffvl.data.packer import Rows, first_fit
from diffvl.data.records import Record
from diffvl.data.table import open_records, record_at
from diffvl.errors import ConfigError, DataError, DiffvlError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.noise import sample_generator
from diffvl.progress import track

log = logging.getLogger(__name__)
SHOWN_PROBLEMS = 5


class SampleDataset(Dataset):
    """Rows of samples of one file, built when they are asked for. A row is one record, or several that are packed.

    A record that cannot be built is returned as its error (see `collate.raise_bad_record`).
    """

    def __init__(
        self,
        records: datasets.Dataset,
        indices: list[int],
        lengths: list[int],
        processor: DiffVLProcessor,
        rows: Rows | None = None,
    ) -> None:
        """`indices` picks the records and orders them; `lengths` are their tokens; `rows` are of places in these two."""
        self.records, self.indices, self.lengths, self.processor = records, indices, lengths, processor
        self.rows = rows

    def __len__(self) -> int:
        return len(self.indices) if self.rows is None else len(self.rows)

    def record(self, place: int) -> Record:
        """The place-th record, whatever rows there are."""
        return record_at(self.records, self.indices[place])

    def part(self, places: list[int]) -> "SampleDataset":
        """The records at these places."""
        chosen = [self.indices[place] for place in places], [self.lengths[place] for place in places]
        return SampleDataset(self.records, *chosen, self.processor)

    def packed(self, row_length: int, seed: int) -> "SampleDataset":
        """The same records in rows of up to so many tokens. Which records share a row depends on the seed alone, so a resumed
        run finds the same rows."""
        order = torch.randperm(len(self.indices), generator=sample_generator(seed, step=-1, sample=-1)).tolist()
        rows = first_fit(self.lengths, order, row_length)
        return SampleDataset(self.records, self.indices, self.lengths, self.processor, rows)

    def __getitem__(self, row: int) -> list[Sample | DiffvlError]:
        return [self._sample(place) for place in ((row,) if self.rows is None else self.rows[row])]

    def _sample(self, place: int) -> Sample | DiffvlError:
        try:
            return sample_of(self.record(place), self.indices[place], self.processor)
        except DiffvlError as error:
            return error


@dataclass(frozen=True)
class StageData:
    train: SampleDataset
    held_out: SampleDataset | None


def longest_sample(context: int | None, block_size: int, grid: str) -> int | None:
    """Tokens that a sample may have, so that the last block of its last answer still ends inside the trunk's context of so
    many positions; None where there is no limit. Next-token models have blocks of 1."""
    if context is None:
        return None
    return context // block_size * block_size if grid == "absolute" else context - block_size + 1


def load_data(data: Data, processor: DiffVLProcessor, longest: int | None) -> StageData:
    """Opens a stage's files and checks every record's length before any work is done.

    Args:
        longest: see `longest_sample`.
    Raises:
        DataError: naming records that are too long (unless `too_long: drop`) or wrong.
        ConfigError: if no file is given, or the held-out share leaves nothing to train on.
    """
    if data.train is None:
        raise ConfigError("no training data: give --data FILE (LLaVA-format .json or .jsonl) or set data.train in the recipe")
    if longest is not None and data.max_length > longest:
        raise ConfigError(
            f"data.max_length is {data.max_length}, but a sample in whole blocks may have {longest} tokens in this trunk's "
            f"context: set it to {longest} or less"
        )
    train = open_samples(Path(data.train), data, processor)
    if data.eval is not None:
        return StageData(train, open_samples(Path(data.eval), data, processor))
    if not data.holdout:
        return StageData(train, None)
    if data.holdout >= len(train):
        raise ConfigError(
            f"data.holdout is {data.holdout}, but {data.train} has {len(train)} records: nothing is left to train on"
        )
    # Every n-th record, so that a file sorted by kind gives a mixed held-out set.
    stride = len(train) / data.holdout
    held = {int(place * stride) for place in range(data.holdout)}
    kept = [place for place in range(len(train.indices)) if place not in held]
    return StageData(train.part(kept), train.part(sorted(held)))


SHORTEN = "raise data.max_length, or set data.too_long=drop to leave them out"


def open_samples(path: Path, data: Data, processor: DiffVLProcessor, advice: str = SHORTEN) -> SampleDataset:
    """One file's samples; records longer than `max_length` are an error (that ends with the advice) or left out, never cut."""
    records = open_records(path, unpaired_turns=data.unpaired_turns)
    lengths = _lengths(records, processor)
    long = [index for index, length in enumerate(lengths) if length > data.max_length]
    if long and data.too_long == "error":
        shown = "\n".join(f"  {record_at(records, index).source}: {lengths[index]} tokens" for index in long[:SHOWN_PROBLEMS])
        more = f"\n  and {len(long) - SHOWN_PROBLEMS} more" if len(long) > SHOWN_PROBLEMS else ""
        raise DataError(
            f"{path}: {len(long)} of {len(records)} records are longer than {data.max_length} tokens "
            f"(pictures included):\n{shown}{more}\n{advice}"
        )
    if long:
        _tell_left_out(path, len(long), len(records), data.max_length)
    kept = [index for index, length in enumerate(lengths) if length <= data.max_length]
    if not kept:
        raise DataError(f"{path}: all {len(records)} records are longer than {data.max_length} tokens; {advice}")
    return SampleDataset(records, kept, [lengths[index] for index in kept], processor)


@cache
def _tell_left_out(path: Path, long: int, records: int, limit: int) -> None:
    """Once a run: a stage opens its files several times."""
    log.warning("%s: left out %d of %d records longer than %d tokens", path, long, records, limit)


def check_pictures(data: StageData, most: int, console: Console) -> None:
    """Decodes every picture of a set of up to `most` records: a damaged one is then found before training, not at its step.

    Raises:
        DataError: with the first problems and the number of the others.
    """
    for samples in (data.train, data.held_out):
        if samples is None or len(samples.indices) > most:
            continue
        problems = []
        count = len(samples.indices)
        for place in track(console, range(count), count, "checking pictures"):
            record = samples.record(place)
            for path in record.images:
                try:
                    open_picture(path, record.source)
                except DataError as error:
                    problems.append(str(error))
        if len(problems) > SHOWN_PROBLEMS:
            problems[SHOWN_PROBLEMS:] = [f"and {len(problems) - SHOWN_PROBLEMS} more"]
        if problems:
            raise DataError("\n".join(problems))


def _lengths(records: datasets.Dataset, processor: DiffVLProcessor) -> list[int]:
    """Tokens of every record, remembered on disk by the data, the tokenizer and the picture's length."""
    tokenizer = processor.tokenizer
    facts = (records._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, processor.image_tokens)
    fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]

    def measure(_: dict[str, object], index: int) -> dict[str, int]:
        return {"tokens": len(encode_record(record_at(records, index), processor).ids)}

    measured = records.map(measure, with_indices=True, new_fingerprint=fingerprint, desc="measuring records")
    return list(measured["tokens"])


def batches_of(
    dataset: SampleDataset, places: list[int], size: int, collator: Callable[[Sequence[Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Batches in the order of `places`."""
    for start in range(0, len(places), size):
        batch = collator([dataset[place] for place in places[start : start + size]])
        raise_bad_record(batch)
        yield batch
