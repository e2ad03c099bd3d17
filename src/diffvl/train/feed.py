"""Where the micro-batches of each step come from: rows that are addressed by number, in an order that follows from the step
(`order`), or streams, which have a position that is kept in every checkpoint.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from diffvl.config.recipe import Stage
from diffvl.data.loader import num_workers
from diffvl.data.mixture import Mixture
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.stream import POSITION, Batches, StreamDataset, StreamState
from diffvl.errors import CheckpointError
from diffvl.train.launch import gathered, local_processes
from diffvl.train.order import BatchesOfSteps, StepOrder

Collate = Callable[..., dict[str, Any]]


class NumberedFeed:
    """Rows that are addressed by number. Nothing is kept of it: a resume has nothing to skip."""

    def __init__(
        self, data: SampleDataset | Mixture, stage: Stage, seed: int, collate: Collate, processes: int, rank: int
    ) -> None:
        self.data, self.stage, self.collate = data, stage, collate
        self.order = StepOrder(len(data), stage.batch_size, stage.accumulation, seed, processes, rank, data.order(seed))

    @property
    def rows_per_step(self) -> int:
        return self.order.rows_per_step

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def epoch_after(self, step: int) -> float:
        return self.order.epoch_after(step) if step else 0

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Gives this process's micro-batches of the steps from `start` to `stop`."""
        return iter(
            DataLoader(
                self.data,
                batch_sampler=BatchesOfSteps(self.order, start, stop),  # type: ignore[arg-type]
                num_workers=num_workers(self.stage.data, len(self.data), local_processes()),
                collate_fn=self.collate,
                pin_memory=torch.cuda.is_available(),
            )
        )

    def state(self) -> dict[str, Any]:
        """Gives what a checkpoint keeps: nothing."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        """Takes up what a checkpoint has kept. Raises CheckpointError if that is of a stream."""
        if state:
            raise CheckpointError("the run began with data.streaming=true: set it again")


class StreamFeed:
    """Streams, one for each loader process."""

    def __init__(self, data: StreamDataset, stage: Stage, seed: int, collate: Collate, processes: int, rank: int) -> None:
        self.data, self.stage, self.collate, self.processes, self.rank = data.begun(seed), stage, collate, processes, rank
        self.workers = num_workers(stage.data, None, local_processes())
        self.states: dict[int, StreamState] = {}  # of this process's streams

    @property
    def rows_per_step(self) -> int:
        return self.stage.batch_size * self.stage.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        raise AssertionError("the recipe of a stream has steps")  # see `config.recipe.Stage`

    def epoch_after(self, step: int) -> float:
        """Tells how many times this process has been through all of its files."""
        epochs = [position.epoch for state in self.states.values() for position in state.positions]
        return float(min(epochs, default=0))

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Gives this process's micro-batches from the state on, in whatever steps; noting where each leaves its stream."""
        batches = Batches(
            self.data,
            self.stage.batch_size,
            self.collate,
            self.rank,
            self.processes,
            self.states,
            start * self.stage.accumulation,
        )
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,  # type: ignore[arg-type]  # of one batch, not of a list
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        for batch in loader:
            stream, state = batch.pop(POSITION)
            self.states[stream] = StreamState.from_json(state)
            yield batch

    def state(self) -> dict[str, Any]:
        """Gives where the streams of all processes stand, for JSON. All processes must call it."""
        own = {str(stream): state.to_json() for stream, state in self.states.items()}
        states = {stream: state for one in gathered([own]) for stream, state in one.items()}
        return {"processes": self.processes, "workers": max(self.workers, 1), "streams": states}

    def resume(self, state: dict[str, Any]) -> None:
        """Takes up where the streams of a checkpoint stood.

        Raises:
            CheckpointError: there are more or fewer of them now, so that they would read other records.
        """
        if not state:
            raise CheckpointError("the run began without data.streaming: remove it")
        began, now = (state["processes"], state["workers"]), (self.processes, max(self.workers, 1))
        if began != now:
            raise CheckpointError(
                f"the run began with {_told(*began)}, and goes on with {_told(*now)}: a stream's position is that of each loader "
                f"process. Resume with {began[0]} processes and data.workers={began[1]}"
            )
        self.states = {int(stream): StreamState.from_json(one) for stream, one in state["streams"].items()}


def _told(processes: int, workers: int) -> str:
    counts = [
        f"{count} {name}{'' if count == 1 else 'es'}" for count, name in ((processes, "process"), (workers, "loader process"))
    ]
    return " of ".join(counts)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def feed_of(
    data: SampleDataset | Mixture | StreamDataset, stage: Stage, seed: int, collate: Collate, processes: int, rank: int
) -> NumberedFeed | StreamFeed:
    """Gives what feeds a stage. Args as in `loop.Loop`; `processes` and `rank` of the run."""
    if isinstance(data, StreamDataset):
        return StreamFeed(data, stage, seed, collate, processes, rank)
    return NumberedFeed(data, stage, seed, collate, processes, rank)
