"""One process of a run on several, started by processes.py: START RECIPE DIRECTORY."""

import sys
from pathlib import Path

from rich.console import Console

from diffvl.config.resolve import read_yaml, resolve
from diffvl.train.stage import train


def main() -> None:
    start, recipe, directory = map(Path, sys.argv[1:])
    train(start, resolve(read_yaml(recipe), [], str(recipe)), "diffuse", directory, resume=False, console=Console(quiet=True))
