"""One process of a run on several, started by training_runs.py: START RECIPE DIRECTORY."""

import sys
from pathlib import Path

import torch
from rich.console import Console

from diffvl.config.resolve import read_yaml, resolve
from diffvl.train.stage import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    start, recipe, directory = map(Path, sys.argv[1:])
    train(start, resolve(read_yaml(recipe), [], str(recipe)), "diffuse", directory, resume=False, console=Console(quiet=True))
