"""The processes of a run: which one this is, its `Accelerator`, what one of them does before the others, and how all of them
stop together.

An error that one process raises alone leaves the others waiting in a collective for hours. So whatever can fail in one of them
runs under `agreed`, which raises it in all.
"""

import atexit
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, LoggerType, ProjectConfiguration, gather_object
from torch import distributed
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  (documented as public)

from diffvl.config.recipe import Stage
from diffvl.errors import ConfigError, DiffvlError, TrainingError, UsageError
from diffvl.machine import has_bf16

T = TypeVar("T")

# How long a process waits for another. NCCL's own 10 minutes are too short: the others wait while one reads the data, prepares a
# 7B model, answers the held-out questions or writes a checkpoint to a slow disk.
PATIENCE = timedelta(hours=12)


def process_state() -> PartialState:
    """This process among its launcher's; without a GPU accelerate must be told, or every process takes itself for the only one.

    Raises:
        UsageError: if one process has several GPUs, which transformers would drive by replicas that know nothing of our batches;
            or the launcher asks for an engine that is not used here.
    """
    _refuse_other_engines()
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
    its exit code is lost.

    A sharded model holds the group until the very end, and with it gloo's threads. One of them may still have to drop a tensor of
    the last collective, for which it needs the interpreter: a thread that asks for it while the interpreter ends aborts the
    process. So they get it once more (without it, 6 of 650 runs of two processes were aborted; with it,
    none).
    """

    def leave() -> None:
        PartialState().destroy_process_group()
        time.sleep(0.1)

    atexit.register(leave)


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
    if errors:
        error = own if own is not None and str(own) == str(errors[0]) else errors[0]
        error.told_elsewhere = not process_state().is_main_process
        raise error
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


# Words of an error that a collective raises where a process at its other end is gone, by what transports it.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ncclRemoteError")


@contextmanager
def with_the_others() -> Iterator[None]:
    """In the block, the end of another process of the run ends this one too, in one message.

    Raises:
        TrainingError: in the processes that are left.
    """
    try:
        yield
    except (distributed.DistError, RuntimeError) as error:
        lost = isinstance(error, distributed.DistError) or any(words in str(error) for words in _LOST)
        if not lost or process_state().num_processes == 1:
            raise
        told = TrainingError(
            "another process of this run has ended, so it cannot go on; that process, or the launcher, says why. What was "
            "finished and the last checkpoint are kept: type the same again, with --resume"
        )
        told.told_elsewhere = not _is_first_to_tell()
        raise told from error


def _is_first_to_tell() -> bool:
    """Tells whether no other process has told of a lost one yet, as far as the place where they met is still there."""
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection(place, timeout=5):
            pass
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        return store.add("diffvl: a process has ended", 1) == 1
    except (KeyError, OSError, RuntimeError):
        return True


PROJECT = "diffvl"
TENSORBOARD = "tensorboard"  # also the folder of trackers that write files
# Engines that accelerate's launcher may ask for, by the variables in which it says so.
OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP through accelerate",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def _refuse_other_engines() -> None:
    """Raises UsageError in every process if the launcher asks for an engine: its settings would have no effect."""
    for variable, told in OTHER_ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            error = UsageError(
                f"the launcher's configuration asks for {told}, which is not used here: a stage's setting `sharding` shards its "
                "model, by torch's own fully_shard. Launch with a file of recipes/accelerate/, or another one that says "
                "distributed_type: MULTI_GPU"
            )
            error.told_elsewhere = os.environ.get("RANK", "0") != "0"
            raise error


def is_to_shard(stage: Stage) -> bool:
    """`sharding` resolved: whether the stage's model is to lie in parts over the processes.

    Raises:
        ConfigError: if there is nothing to shard over, or no bf16 to gather in.
    """
    several = process_state().num_processes > 1
    if stage.sharding == "auto":
        packed = stage.lora is not None and stage.lora.bits is not None
        return several and torch.cuda.is_available() and not packed
    if stage.sharding == "none":
        return False
    if not several:
        raise ConfigError(
            f"sharding: {stage.sharding} has no effect in one process: start several with `accelerate launch -m diffvl.cli ...`, "
            "or leave it at auto"
        )
    if stage.sharding == "full_bf16" and precision(stage) != "bf16":
        raise ConfigError(
            "sharding: full_bf16 gathers weights in bf16, but trains in fp32: set precision: bf16, or sharding: full"
        )
    return True


def precision(stage: Stage) -> str:
    """`auto` resolved: bf16 where the machine computes it fast, fp32 elsewhere."""
    if stage.precision != "auto":
        return stage.precision
    return "bf16" if has_bf16() else "fp32"


def is_emulated(stage: Stage) -> bool:
    """Tells whether a stage asks for bf16 where the machine has no instructions for it."""
    return stage.precision == "bf16" and not has_bf16()


def make_accelerator(stage: Stage, trackers: Sequence[str] | None, work: Path) -> Accelerator:
    """The accelerator of one stage.

    Args:
        trackers: see `Recipe.trackers`. work: the stage's directory, for those that write files.
    Raises:
        ConfigError: a tracker is not installed.
    """
    # In a sharded model a weight that autocast keeps in bf16 would be whole in every process, to the end of the forward.
    autocast = AutocastKwargs(cache_enabled=not is_to_shard(stage))
    # A stage may have another precision than the one before it in this process; which processes there are stays the same.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if precision(stage) == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=[LoggerType(name) for name in require_trackers(trackers)] or None,
        project_config=ProjectConfiguration(project_dir=str(work), logging_dir=str(work / TENSORBOARD)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True), autocast],
    )
    accelerator.init_trackers(PROJECT)
    return accelerator


def require_trackers(named: Sequence[str] | None) -> Sequence[str]:
    """The trackers to use. Raises ConfigError if a named one is not installed."""
    installed = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    if named is None:
        return [TENSORBOARD] if TENSORBOARD in installed else []
    if absent := [name for name in named if name not in installed]:
        raise ConfigError(f"trackers: {', '.join(absent)} not installed here: pip install {' '.join(absent)}, or take it out")
    return named
