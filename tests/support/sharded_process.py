"""Processes of runs on several, as processes.py starts them: one that leaves behind what its first step computed (`main`), one
that is killed (`killed`), and one that writes a model in parts and the same model whole (`gather`)."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed_process
import torch
from accelerate import Accelerator
from rich.console import Console
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffvl.cli import main as cli
from diffvl.config.resolve import read_yaml, resolve
from diffvl.hub import head_diffvl
from diffvl.store import tensorwriter
from diffvl.store.checkpoint import write_checkpoint
from diffvl.train import gathering, loop, sharding
from diffvl.train import stage as training
from diffvl.train.launch import process_state


def main() -> None:
    """START RECIPE DIRECTORY SETTINGS (JSON). DIRECTORY.grads has every gradient of the first step, whole, as the optimiser sees
    it; DIRECTORY.RANK.json tells how often the head ran in that step, and the sizes of gradients after its first backward."""
    start, recipe, directory = map(Path, sys.argv[1:4])
    settings = json.loads(sys.argv[4])
    if settings.get("chunk"):
        head_diffvl.CHUNK_LOGITS = settings["chunk"]
    if settings.get("tied_unit"):
        sharding.units = with_tied_unit(sharding.units)
    watch_first_step(directory)
    resume = settings.get("resume", False)
    training.train(start, resolve(read_yaml(recipe), [], str(recipe)), "diffuse", directory, resume, Console(quiet=True))


def watch_first_step(directory: Path) -> None:
    made, clip, backward, predict = loop.Loop.__init__, Accelerator.clip_grad_norm_, Accelerator.backward, head_diffvl._returning
    loops: list[Any] = []
    facts: dict[str, Any] = {"heads": 0}

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        loops.append(self)

    def count_heads(*arguments: Any) -> Any:
        facts["heads"] += 1
        return predict(*arguments)

    def look_after_backward(self: Accelerator, *arguments: Any) -> None:
        backward(self, *arguments)
        if "held" not in facts:
            trained = [parameter for parameter in loops[0].wrapped.parameters() if parameter.requires_grad]
            facts["held"] = sum(local(parameter.grad).numel() for parameter in trained if parameter.grad is not None)
            facts["whole"] = sum(parameter.numel() for parameter in trained)

    def keep_and_clip(self: Accelerator, *arguments: Any) -> Any:
        (own,) = loops
        if own.step == 0:
            named = own.wrapped.named_parameters()
            gradients = {name.removeprefix("module."): whole(value.grad) for name, value in named if value.grad is not None}
            if self.is_main_process:
                torch.save(gradients, directory.with_suffix(".grads"))
            directory.with_suffix(f".{self.process_index}.json").write_text(json.dumps(facts))
        return clip(self, *arguments)

    loop.Loop.__init__ = make  # type: ignore[method-assign]
    Accelerator.clip_grad_norm_ = keep_and_clip  # type: ignore[method-assign]
    Accelerator.backward = look_after_backward  # type: ignore[method-assign]
    head_diffvl._returning = count_heads


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def with_tied_unit(units: Callable[..., Any]) -> Callable[..., Any]:
    """What accelerate makes of a tied model: embedding and head together are a unit."""

    def sharded_too(model: Any) -> Any:
        fully_shard([model.get_input_embeddings(), model.get_output_embeddings()])
        return units(model)

    return sharded_too


# --- the command -----------------------------------------------------------------------------------------------------------


def killed() -> None:
    """MOMENT RANK WORDS ...: the command, of which one process ends at a moment of `killed_process`."""
    moment, rank, *words = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        killed_process.MOMENTS[moment]()
    sys.argv = ["diffvl", *words]
    cli.main()


# --- the end ---------------------------------------------------------------------------------------------------------------


def gather() -> None:
    """RECIPE DIRECTORY START ...: for each start, in its folder of DIRECTORY, `whole` is what an unsharded run would write of
    weights that have moved, and `parts` what a sharded one does, in files of 100 kB."""
    recipe, directory, *starts = map(Path, sys.argv[1:])
    stage = resolve(read_yaml(recipe), [], str(recipe)).stages["diffuse"]
    gathering.TensorWriter = lambda folder: tensorwriter.TensorWriter(folder, 100_000)  # type: ignore[assignment,misc]
    main_process = process_state().is_main_process
    for start in starts:
        _, processor = training.checkpoint.load_description(start)
        for kind in ("whole", "parts"):
            work = directory / start.name / kind
            work.mkdir(parents=True, exist_ok=True)
            model, dtype = training.load_to_train(start, stage, seed=0, sharded=kind == "parts")
            training.fit_to_stage(model, stage, seed=0)
            move(model)
            if kind == "parts":
                sharding.shard(model, stage, everything=not training.keeps_dtype(stage, dtype))
                gathering.write_gathered(model, stage, dtype, work)
            else:
                training.upcast(model)
                training.unfit(model, stage, dtype)
            if main_process:
                write_checkpoint(model, processor, work, kind == "whole")


@torch.no_grad()
def move(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.1)
