"""A pass over the records of a file: by several processes where it is long enough to pay, with a bar and the time left."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset

from diffvl.machine import num_cores
from diffvl.terminal.bars import track

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
