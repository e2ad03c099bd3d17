"""FSDP2 in one process: the same steps with a model in one piece and with one that torch's `fully_shard` holds, as the stage's
setting `sharding: full` does over several processes. Losses must agree; the difference in time and memory is what sharding
itself costs.
"""

import argparse
import gc
import json
import math
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from diffvl.bench.machine import describe_run, load_average, synchronize
from diffvl.bench.random_model import QUICK_SCALE, SCALES, build_model, resize
from diffvl.bench.training_forms import Shape, choose_attention, make_sample
from diffvl.config.recipe import Stage
from diffvl.config.resolve import parse
from diffvl.objective.losses import Draw, loss_of
from diffvl.train.sharding import shard

LAYERS = 8  # of the trunk on a GPU: in fp32 with AdamW's moments it fits 24 GB
STEPS, WARM_UP = 12, 4  # the first steps compile, and make the optimiser's state
SHAPE, QUICK_SHAPE = Shape(2048, 512), Shape(48, 24)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative, of each loss
STAGE = {
    "objective": {"kind": "block_diffusion", "block_size": 8},
    "trainable": {"trunk": 1e-4},
    "steps": STEPS,
    "sharding": "full",
}


def main(arguments: list[str] | None = None) -> None:
    """Runs both and prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_report.sharding", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    quick = parser.parse_args(arguments).quick
    device = torch.device("cpu" if quick else "cuda")
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "gloo" if quick else "nccl", init_method=(Path(folder) / "meet").as_uri(), rank=0, world_size=1
        )
        try:
            print(json.dumps(compared(device, quick)))
        finally:
            distributed.destroy_process_group()


def compared(device: torch.device, quick: bool) -> dict[str, Any]:
    """The steps in one piece and sharded: losses, seconds of a step, peak of memory.

    They agree only if every loss is finite; where one is not there is no largest difference (`max` passes over a nan).
    """
    load = load_average()
    stage = parse(Stage, STAGE, "tools.gpu_report.sharding")
    plain, sharded = (steps_of(device, quick, stage, in_parts) for in_parts in (False, True))
    dtype = "float32" if quick else "bfloat16"
    pairs = list(zip(plain["losses"], sharded["losses"], strict=True))
    finite = all(math.isfinite(loss) for pair in pairs for loss in pair)
    apart = max(abs(one - other) / abs(one) for one, other in pairs) if finite else None
    return {
        "machine": describe_run(device, getattr(torch, dtype), load),
        "processes": 1,
        "whole": plain,
        "sharded": sharded,
        "largest_difference": apart,
        "agrees": apart is not None and apart <= TOLERANCE[dtype],
        "tolerance": TOLERANCE[dtype],
    }


def steps_of(device: torch.device, quick: bool, stage: Stage, in_parts: bool) -> dict[str, Any]:
    """Trains a fresh model on one sample; weights and draws are the same each time."""
    scale = QUICK_SCALE if quick else SCALES[device.type]
    size = scale.trunk if quick else resize(scale.trunk, LAYERS, None)
    on_cuda = device.type == "cuda"
    gc.collect()  # what the model before this one left
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = build_model(size, device, torch.float32, seed=0)
    choose_attention(model, "ours")
    if in_parts:
        shard(model, stage, everything=True)
    sample = make_sample(QUICK_SHAPE if quick else SHAPE, stage.objective, size.vocabulary, device, 0)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.trainable["trunk"])
    losses, seconds = [], []
    for step in range(STEPS):
        synchronize(device)
        start = time.perf_counter()
        # As in training: a sharded weight must not be kept whole by autocast.
        cast = torch.autocast("cuda", torch.bfloat16, cache_enabled=not in_parts) if on_cuda else nullcontext()
        with cast:
            loss = loss_of(model, model.config, sample.batch, sample.objective, Draw(0, step, 0.0)).loss / sample.shape.answer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    return {
        "losses": losses,
        "step_seconds": statistics.median(seconds[WARM_UP:]),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
