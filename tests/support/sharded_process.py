"""One process of a training run that leaves behind what its first step computed, started by processes.py: START RECIPE DIRECTORY
SETTINGS (JSON).

DIRECTORY.grads holds every gradient of the first step, whole, as the optimiser would see it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import killed_process
import torch
from accelerate import Accelerator
from rich.console import Console
from torch.distributed.tensor import DTensor

from diffvl.cli import main as cli
from diffvl.config.resolve import read_yaml, resolve
from diffvl.hub import head_diffvl
from diffvl.train import loop
from diffvl.train.stage import train


def main() -> None:
    start, recipe, directory = map(Path, sys.argv[1:4])
    run(start, recipe, directory, **json.loads(sys.argv[4]))


def run(start: Path, recipe: Path, directory: Path, resume: bool = False, chunk: int | None = None) -> None:
    """chunk: values of a chunk's logits."""
    if chunk is not None:
        head_diffvl.CHUNK_LOGITS = chunk
    keep_gradients(directory.with_suffix(".grads"))
    train(start, resolve(read_yaml(recipe), [], str(recipe)), "diffuse", directory, resume, Console(quiet=True))


def keep_gradients(file: Path) -> None:
    made, clip = loop.Loop.__init__, Accelerator.clip_grad_norm_
    loops: list[Any] = []

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        loops.append(self)

    def keep_and_clip(self: Accelerator, *arguments: Any) -> Any:
        (own,) = loops
        if own.step == 0:
            gradients = {
                name.removeprefix("module."): whole(parameter.grad)
                for name, parameter in own.wrapped.named_parameters()
                if parameter.grad is not None
            }
            if self.is_main_process:
                torch.save(gradients, file)
        return clip(self, *arguments)

    loop.Loop.__init__ = make  # type: ignore[method-assign]
    Accelerator.clip_grad_norm_ = keep_and_clip  # type: ignore[method-assign]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def killed() -> None:
    """The command, of which one process ends at a moment of `killed_process`: MOMENT RANK WORDS ..."""
    moment, rank, *words = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        killed_process.MOMENTS[moment]()
    sys.argv = ["diffvl", *words]
    cli.main()
