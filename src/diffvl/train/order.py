"""Which rows each micro-batch of each step has: a function of the seed and the step, so that a resume has nothing to skip.

An epoch is a permutation by (seed, epoch). Its last step is filled up from its beginning: every step has the same number of rows.
Of a mix with weights the rows are the draws that its shares give (`data.mixture`), one after the other.
A step's rows are dealt out to micro-steps and, inside these, to processes; so how a step is cut changes nothing in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from diffvl.data.mixture import MixOrder
from diffvl.seeding import sample_generator


@dataclass(frozen=True)
class StepOrder:
    """rows: of the data set. batch_size: rows of a micro-batch. accumulation: micro-batches of a step in one process."""

    rows: int
    batch_size: int
    accumulation: int
    seed: int
    processes: int = 1
    rank: int = 0
    mix: MixOrder | None = None

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.rows_per_step)

    def epoch_after(self, step: int) -> float:
        """Epochs done, in steps, once `step` steps are."""
        epoch, inside = divmod(step - 1, self.steps_per_epoch)
        return epoch + (inside + 1) / self.steps_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """This process's rows of a step (counted from 0), one list for each micro-step."""
        dealt = self._rows(step).view(self.accumulation, self.processes, self.batch_size)
        return dealt[:, self.rank].tolist()

    def _rows(self, step: int) -> torch.Tensor:
        if self.mix is not None:
            return self.mix.rows(step * self.rows_per_step, (step + 1) * self.rows_per_step)
        epoch, inside = divmod(step, self.steps_per_epoch)
        order = _permutation(self.rows, self.seed, epoch)
        return order[torch.arange(inside * self.rows_per_step, (inside + 1) * self.rows_per_step) % self.rows]


@dataclass(frozen=True)
class BatchesOfSteps:
    """The micro-batches of steps `start` to `stop`, as a DataLoader's `batch_sampler`."""

    order: StepOrder
    start: int
    stop: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield from self.order.micro_batches(step)


@lru_cache(maxsize=1)
def _permutation(rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(rows, generator=sample_generator(seed, epoch, sample=-1))
