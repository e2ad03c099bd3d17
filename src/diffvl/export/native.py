"""The layout `native`: the directory as `convert` wrote it, for any family. Nothing is loaded; files are copied."""

import shutil
from pathlib import Path

from diffvl.export.shards import copy_tensors
from diffvl.export.source import Run
from diffvl.store.files import Writing

# What a run leaves beside its checkpoint, and a checkpoint does without; the card is written anew.
OF_THE_RUN = ("metrics.jsonl", "samples.jsonl", "report.html", "left_out.jsonl", "README.md")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write(run: Run, directory: Path) -> None:
    """Writes the whole layout into an empty directory. Raises DiskError."""
    copy_tensors(run.directory, run.headers, directory)
    write_small_files(run, directory)


def write_small_files(run: Run, directory: Path) -> None:
    """Copies whatever is not weights. Raises DiskError."""
    with Writing(directory):
        for file in sorted(run.directory.iterdir()):
            is_weights = any(file.match(pattern) for pattern in WEIGHTS)
            if file.is_file() and not is_weights and file.name not in OF_THE_RUN:
                shutil.copyfile(file, directory / file.name)
