"""Records -> rows of samples, built when they are asked for, in the loader's processes.

A record that cannot be used is met when its turn comes. Its place in the step then stays empty: the order of the records, and
with it every other sample's noise and step, is the same whatever is left out, on any number of processes and after a resume.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset

from diffvl.data.packing import RowAssignment, first_fit
from diffvl.data.problems import Problem
from diffvl.data.records import Record
from diffvl.data.samples import Sample, encode_record, sample_of
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.seeding import sample_generator


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
        offset: int = 0,
        names: tuple[str, ...] | None = None,
    ) -> None:
        """`indices` picks the records and orders them; `lengths` are their tokens, where these were measured; `rows` are of
        places in these two. `known` are the problems of records that are not among them. `offset` is added to a record's number
        to make its sample's index, where several sets are mixed. `names`: what the files are called below `path`, if there
        are several."""
        self.records, self.path, self.indices, self.processor = records, path, indices, processor
        self.max_length, self.lengths, self.rows, self.known, self.offset = max_length, lengths, rows, known, offset
        self.names = names

    def __len__(self) -> int:
        return len(self.indices) if self.rows is None else len(self.rows)

    @property
    def parts(self) -> "tuple[SampleDataset, ...]":
        """Gives the sets that this one is made of: itself. See `mixture`."""
        return (self,)

    @property
    def num_records(self) -> int:
        """Counts all records of the file, those that cannot be used among them."""
        return len(self.records)

    def order(self, seed: int) -> None:
        """Tells that each row is drawn once an epoch. See `mixture`."""

    def place_of(self, index: int) -> str:
        """Tells where a sample's record stands, by the sample's index."""
        return self.records[index - self.offset].source

    def record(self, place: int) -> Record:
        """Gives the place-th record, whatever rows there are."""
        return self.records[int(self.indices[place])]

    def part(self, places: numpy.ndarray) -> "SampleDataset":
        """Gives the records at these places."""
        lengths = None if self.lengths is None else self.lengths[places]
        return self._with(indices=self.indices[places], lengths=lengths, rows=None)

    def measured(self, good: numpy.ndarray, lengths: numpy.ndarray, known: Sequence[Problem]) -> "SampleDataset":
        """Gives the records that `good` marks, whose tokens were counted; `known` are the problems of all others."""
        return self._with(indices=self.indices[good], lengths=lengths, known=known)

    def packed(self, row_length: int, seed: int) -> "SampleDataset":
        """Puts the same records into rows of up to `row_length` tokens. Which records share a row depends on the seed alone, so
        a resumed run finds the same rows."""
        assert self.lengths is not None
        order = torch.randperm(len(self.indices), generator=sample_generator(seed, step=-1, sample=-1)).tolist()
        return self._with(rows=first_fit(self.lengths.tolist(), order, row_length))

    def _with(self, **changes: Any) -> "SampleDataset":
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def problems(self) -> list[Problem]:
        """Tells what is wrong with the text of these records: a pass over all of them."""
        found = []
        for index, record in ((int(index), self.records[int(index)]) for index in self.indices):
            try:
                encode_record(record, self.processor, self.max_length)
            except DataError as error:
                found.append(self.problem_of(record, index, error))
        return found

    def __getitem__(self, row: int) -> list[Sample | Problem]:
        return [self._sample(place) for place in ((row,) if self.rows is None else self.rows[row])]

    def _sample(self, place: int) -> Sample | Problem:
        index, record = int(self.indices[place]), self.record(place)
        try:
            return sample_of(record, self.offset + index, self.processor, self.max_length)
        except DataError as error:
            return self.problem_of(record, index, error)

    def problem_of(self, record: Record, index: int, error: DataError) -> Problem:
        """Tells what is wrong with a record; `index`: its number in the set, from 0."""
        file, _, place = record.source.rpartition(":")
        line = int(place.partition(" ")[0])  # after it may stand which record of the line it is
        message = str(error).removeprefix(f"{record.source}: ")
        name = None if record.id == record.source else record.id
        within = None if self.names is None else file
        return Problem(error.kind, self.path, line, index + 1, name, message, within=within)
