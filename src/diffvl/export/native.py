"""The layout `native`: the directory as `convert` wrote it, for any family. Nothing is loaded; files are copied."""

import shutil
from pathlib import Path

from diffvl.export.shards import copy_tensors
from diffvl.export.source import Run
from diffvl.store.files import Writing

# What a run leaves beside its checkpoint, and a checkpoint does without.
OF_THE_RUN = ("metrics.jsonl", "samples.jsonl", "report.html", "left_out.jsonl")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write(run: Run, directory: Path) -> None:
    """Writes the whole layout into an empty directory. Raises DiskError."""
    copy_tensors(run.directory, run.headers, directory)
    with Writing(directory):
        for file in sorted(run.directory.iterdir()):
            weights = any(file.match(pattern) for pattern in WEIGHTS)
            if file.is_file() and not weights and file.name not in OF_THE_RUN and file.name != "README.md":
                shutil.copyfile(file, directory / file.name)
