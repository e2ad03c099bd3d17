"""The `Accelerator` of a stage: devices, precision, data parallelism and trackers."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, LoggerType, ProjectConfiguration

from diffvl.config.recipe import Stage
from diffvl.errors import ConfigError, UsageError
from diffvl.machine import has_bf16

PROJECT = "diffvl"
TENSORBOARD = "tensorboard"  # also the folder of trackers that write files
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # what accelerate's launcher says of a sharded run


def precision(stage: Stage) -> str:
    """`auto` resolved: bf16 where the machine computes it fast, fp32 elsewhere."""
    if stage.precision != "auto":
        return stage.precision
    return "bf16" if has_bf16() else "fp32"


def make_accelerator(stage: Stage, trackers: Sequence[str] | None, work: Path) -> Accelerator:
    """The accelerator of one stage.

    Args:
        trackers: see `Recipe.trackers`. work: the stage's directory, for those that write files.
    Raises:
        UsageError: on a sharded launch.
        ConfigError: a tracker is not installed.
    """
    if any(os.environ.get(name, "false").lower() in ("1", "true") for name in SHARDED):
        # Folding the mask row and merging adapters need whole parameters; sharded ones are not gathered yet.
        raise UsageError("sharded training (FSDP, DeepSpeed) is not supported yet: launch with plain data parallelism")
    # A stage may have another precision than the one before it in this process; which processes there are stays the same.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if precision(stage) == "bf16" else "no",
        cpu=not torch.cuda.is_available(),
        log_with=[LoggerType(name) for name in require_trackers(trackers)] or None,
        project_config=ProjectConfiguration(project_dir=str(work), logging_dir=str(work / TENSORBOARD)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
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
