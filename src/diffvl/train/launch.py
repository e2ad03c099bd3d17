"""The processes of a run: which one this is, what one of them does before the others, and how all of them stop together.

An error that one process raises alone leaves the others waiting in a collective for hours. So whatever can fail in one of them
runs under `agreed`, which raises it in all.
"""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from diffvl.errors import DiffvlError, UsageError

T = TypeVar("T")

# How long a process waits for another. NCCL's own 10 minutes are too short: the others wait while one reads the data, prepares a
# 7B model, answers the held-out questions or writes a checkpoint to a slow disk.
PATIENCE = timedelta(hours=12)


def process_state() -> PartialState:
    """This process among its launcher's; without a GPU accelerate must be told, or every process takes itself for the only one.

    Raises:
        UsageError: if one process has several GPUs, which transformers would drive by replicas that know nothing of our batches.
    """
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes > 1:
        _leave_in_order()
    if state.num_processes == 1 and torch.cuda.device_count() > 1:
        raise UsageError(
            f"{torch.cuda.device_count()} GPUs, one process: start with `accelerate launch -m diffvl.cli ...`, one for each GPU, "
            "or choose one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    return state


@cache
def _leave_in_order() -> None:
    """Ends the process group before the interpreter ends: a process whose peer is gone first may be aborted on its way out, and
    its exit code is lost."""
    atexit.register(lambda: PartialState().destroy_process_group())


def local_processes() -> int:
    """Processes of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", process_state().num_processes))


def gathered(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes. All must call it."""
    return gather_object(list(items))


def agreed(work: Callable[[], T]) -> T:
    """What `work` gives. All processes must call it; an error of one is raised in all of them."""
    own: DiffvlError | None = None
    result: T
    try:
        result = work()
    except DiffvlError as error:
        own = error
    errors = gathered([] if own is None else [own])
    if own is not None:
        raise own
    if errors:
        raise errors[0]
    return result  # type: ignore[possibly-undefined]


def main_first(work: Callable[[], T]) -> T:
    """`work` in the main process, then in one process of every other machine, then in all the others: what the first leaves on
    disk, the others find there. All must call it; an error of one is raised in all."""
    state = process_state()
    turn = 0 if state.is_main_process else 1 if state.is_local_main_process else 2
    results: list[T] = []
    for now in range(3 if state.num_processes > 1 else 1):
        agreed(lambda mine=now == turn: results.append(work()) if mine else None)
    return results[0]


def main_only(work: Callable[[], object]) -> None:
    """`work` in the main process, which the others wait for; its error is raised in all."""
    agreed(lambda: work() if process_state().is_main_process else None)
