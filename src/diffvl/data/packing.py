"""Which samples share a row, and the length of every sample that this needs.

Lengths are measured once, by several processes where that pays, and remembered by content; a check of all lengths uses them too.
Rows are filled first fit, by a tree over the room that is left in them. They are a function of the lengths and the order alone.
So packing has no state to lose: what a resumed run packs is what the interrupted one packed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, TypeVar

import numpy
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from diffvl.data.samples import encode_record
from diffvl.data.table import RecordTable, cache_error, cache_folder
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.machine import num_cores
from diffvl.store.files import replacing
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import track

REFUSED = -1  # stands for the length of a record that does not fit the chat template
_FORMAT = 1  # of the remembered lengths: raise it when encoding gives other tokens
_PAYS_FROM = 4000  # records from which several processes measure faster than one
_BAR_FROM = 2000  # records


def lengths_of(table: RecordTable, processor: DiffVLProcessor, console: Console) -> numpy.ndarray:
    """Measures the tokens, images included, of each of `table.usable`, int32; REFUSED where there are none."""
    file = cache_folder() / f"{_name(table, processor)}.npy"
    if file.exists():
        return numpy.load(file)
    bar_console = console if len(table.usable) >= _BAR_FROM else terminal.console(quiet=True)
    indices = table.usable
    measured = map_places(
        partial(_measure, table, indices, processor), len(indices), _PAYS_FROM, bar_console, f"measuring {table.path.name}"
    )
    lengths = numpy.fromiter(measured, dtype=numpy.int32, count=len(indices))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as beside, beside.open("wb") as opened:
            numpy.save(opened, lengths)
    except OSError as error:
        raise cache_error(table.path, error) from error
    return lengths


def _measure(table: RecordTable, indices: numpy.ndarray, processor: DiffVLProcessor, place: int) -> int:
    try:
        return len(encode_record(table[int(indices[place])], processor).ids)
    except DataError:
        return REFUSED


def _name(table: RecordTable, processor: DiffVLProcessor) -> str:
    """Names the file by all that the tokens of a record follow from."""
    tokenizer = processor.tokenizer
    facts = [_FORMAT, table.content, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    facts += [processor.image_tokens, processor.image_token, processor.stop_token, processor.system_turn]
    if processor.asks_sizes:
        facts += [processor.source or processor.tiling, processor.image_processor.to_json_string()]
    return f"lengths-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}"


T = TypeVar("T")

_MOST_PROCESSES = 16
_AT_ONCE = 64  # places of a task


class _Places(Dataset, Generic[T]):
    def __init__(self, work: Callable[[int], T], count: int) -> None:
        self.work, self.count = work, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> T:
        return self.work(place)


def map_places(work: Callable[[int], T], count: int, pays_from: int, console: Console, text: str) -> Iterator[T]:
    """Gives `work(place)` for every place below `count`, in order.

    Args:
        work: must return a user's mistake as a value: an error raised in another process would lose its form.
        pays_from: places from which several processes are started.
    """
    processes = min(num_cores(), _MOST_PROCESSES) if count >= pays_from else 0
    loader = DataLoader(
        _Places(work, count),
        batch_size=_AT_ONCE,
        num_workers=processes if processes > 1 else 0,
        collate_fn=list,
        generator=torch.Generator(),  # a loader draws a seed, which must not come out of the run's
    )
    yield from track(console, (result for results in loader for result in results), count, text)


class RowAssignment(Sequence[list[int]]):
    """Rows of places, in two flat arrays: ten million samples take 160 MB, not gigabytes of lists."""

    def __init__(self, order: Sequence[int], row_of: Sequence[int]) -> None:
        """row_of: the row of each sample of `order`, from 0 without gaps."""
        rows = numpy.asarray(row_of, dtype=numpy.int64)
        self._places = numpy.asarray(order, dtype=numpy.int64)[numpy.argsort(rows, kind="stable")]
        self._ends = numpy.cumsum(numpy.bincount(rows))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[int]:  # type: ignore[override]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = self._ends[row - 1] if row else 0
        return self._places[start : self._ends[row]].tolist()


def first_fit(lengths: Sequence[int], order: Sequence[int], row_length: int) -> RowAssignment:
    """Puts each sample, in this order, into the first row that still has room for it. Time grows as n log n.

    Args:
        lengths: tokens of the sample at each place, none above `row_length`. order: the places.
    """
    leaves = 1 << max(len(order) - 1, 0).bit_length()
    # room[1] is the root; the room of row r is leaf leaves + r; a node holds the most room below it.
    room = [row_length] * (2 * leaves)
    row_of = []
    for place in order:
        length = lengths[place]
        assert length <= row_length
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        row_of.append(node - leaves)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return RowAssignment(order, row_of)
