"""The layout `native`: the directory as `convert` wrote it, for any family. Nothing is loaded; files are copied. Of a lossless
conversion the base's weights come into the same directory as the adapters, as they are."""

import shutil
from pathlib import Path

from diffvl.export.files import write_json
from diffvl.export.shards import copy_tensors
from diffvl.export.source import Run
from diffvl.hub.adapter_diffvl import FOLDER, HERE
from diffvl.store.files import Writing, read_json

# What a run leaves beside its checkpoint, and a checkpoint does without; the card is written anew.
OF_THE_RUN = ("metrics.jsonl", "samples.jsonl", "report.html", "left_out.jsonl", "README.md")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def write(run: Run, directory: Path) -> None:
    """Writes the whole layout into an empty directory. Raises DiskError."""
    copy_tensors(run.weights, run.headers, directory)
    write_small_files(run, directory)
    if run.is_lossless:
        with Writing(directory):
            shutil.copytree(run.directory / FOLDER, directory / FOLDER)
        settings = read_json(directory / "config.json")
        whole = {**settings["gated_adapter"], "base": HERE, "revision": None}
        write_json(directory / "config.json", {**settings, "gated_adapter": whole})


def write_small_files(run: Run, directory: Path) -> None:
    """Copies whatever is not weights. Raises DiskError."""
    with Writing(directory):
        for file in sorted(run.directory.iterdir()):
            is_weights = any(file.match(pattern) for pattern in WEIGHTS)
            if file.is_file() and not is_weights and file.name not in OF_THE_RUN:
                shutil.copyfile(file, directory / file.name)
