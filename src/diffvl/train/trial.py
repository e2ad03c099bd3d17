"""A few real steps of a stage that leave nothing behind: how long they take, and what memory they need.

Place in the flow: `diffvl convert --dry-run --measure`. The first step is not counted: it makes the optimiser's moments, and
kernels are compiled in it.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from diffvl.config.recipe import Stage, StageName
from diffvl.data.left_out import LEFT_OUT_FILE, LeftOut
from diffvl.data.loader import StageData
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store.metrics import METRICS_FILE
from diffvl.train.launch import make_accelerator
from diffvl.train.loop import Loop
from diffvl.train.progress import MetricsLog, TrainingProgress, Watchers
from diffvl.train.stage import collator, fit_to_stage, place, require_machine

WARM_UP, COUNTED = 1, 2  # steps


@dataclass(frozen=True)
class Trial:
    """seconds: of each counted step. steps: of the whole stage. peak: bytes on this process's GPU, None on a CPU."""

    seconds: tuple[float, ...]
    steps: int
    peak: int | None

    @property
    def whole(self) -> float:
        """Seconds that the whole stage takes at this speed, evaluations and checkpoints left out."""
        return sum(self.seconds) / len(self.seconds) * self.steps


def take_steps(
    model: DiffVLForConditionalGeneration,
    own_dtype: torch.dtype,
    name: StageName,
    stage: Stage,
    seed: int,
    data: StageData,
    processor: DiffVLProcessor,
    console: Console,
) -> Trial:
    """Takes the first steps of a stage. All processes call it; the model is spent.

    Args:
        model, own_dtype: as `stage.load_to_train` gives them. data: of the stage. processor: its own.
    Raises:
        DiffvlError: as training would.
    """
    sharded = require_machine(stage)
    if stage.data.row_length is not None:
        data = replace(data, train=data.train.packed(stage.data.row_length, seed))
    stage = fit_to_stage(model, stage, seed)
    place(model, stage, own_dtype, sharded)
    with tempfile.TemporaryDirectory() as folder, TrainingProgress(console, name) as bar:
        work = Path(folder)
        accelerator = make_accelerator(stage, [], work)
        left_out = LeftOut(work / LEFT_OUT_FILE, stage.data, data.parts(), writes=False)
        watchers = Watchers(bar, MetricsLog(work / METRICS_FILE, name), accelerator.is_main_process)
        loop = Loop(model, stage, seed, data, collator(model, processor), left_out, accelerator, watchers)
        steps = min(WARM_UP + COUNTED, loop.steps)
        left_out.begin(0)
        watchers.begin(0, steps)
        batches = loop.feed.batches(0, steps)
        seconds = []
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for step in range(steps):
            began = time.monotonic()
            loop.train_step([next(batches) for _ in range(stage.accumulation)])  # its norm is read, which waits for the device
            seconds.append(time.monotonic() - began)
            loop.step += 1
            watchers.step(step + 1)
        watchers.end(steps)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    whole = loop.steps
    accelerator.free_memory()
    return Trial(tuple(seconds[WARM_UP:] or seconds), whole, peak)
