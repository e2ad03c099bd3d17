"""DIR -> `Run`: what is exported, read and checked as far as that goes without weights.

Place in the flow: first. Invariant: what gets past here is a finished directory whose files are all there and hold what its
config.json says.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvl.config.recipe import PREPARED, Recipe
from diffvl.errors import CheckpointError, UsageError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store import checkpoint
from diffvl.store.files import PARTIAL
from diffvl.store.tensorfiles import Header, read_headers, some
from diffvl.terminal.console import shell_line

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # config.json's word -> safetensors'


@dataclass(frozen=True)
class Run:
    """A finished directory. weights: where its weights lie, which for gated adapters is their base. headers: its tensors by name.
    dtype: that of its weights, in config.json's words."""

    directory: Path
    weights: Path
    config: DiffVLConfig
    processor: DiffVLProcessor
    headers: dict[str, Header]
    dtype: str
    state: dict[str, Any]
    recipe: Recipe

    @property
    def is_lossless(self) -> bool:
        """Whether gated adapters stand on weights that never changed."""
        return self.config.gated_adapter is not None


def read_run(directory: Path) -> Run:
    """Reads a directory that `convert` finished.

    Raises:
        UsageError: if it is unfinished, or holds runs and is none itself.
        CheckpointError: if it is no run, a file is missing or damaged, or weights are of another type than config.json says.
    """
    _require_finished(directory)
    config, processor = checkpoint.load_description(directory)
    state, recipe = checkpoint.read_state(directory), checkpoint.recipe_of(directory)
    weights = checkpoint.weights_place(directory)
    headers = read_headers(weights)
    dtype = str(config.dtype).removeprefix("torch.")
    expected = DTYPES.get(dtype)
    if other := sorted(name for name, header in headers.items() if header.dtype != expected):
        found = headers[other[0]]
        raise CheckpointError(
            f"{found.file}: {some(other)}: stored as {found.dtype}, expected {expected} (config.json says dtype {dtype}). "
            "Set it right there, or make the checkpoint again"
        )
    return Run(directory, weights, config, processor, headers, dtype, state, recipe)


def _require_finished(directory: Path) -> None:
    """Raises UsageError for an unfinished run, and for the folder of a run, naming what to export instead."""
    work = directory if directory.name.endswith(PARTIAL) else checkpoint.partial(directory)
    if work.is_dir() and (work == directory or not directory.exists()):
        raise UsageError(
            f"{work} is unfinished: finish it by typing its `diffvl convert` again with --resume, and export the directory "
            "that then has its name"
        )
    if directory.is_dir() and not (directory / "config.json").exists():
        finished = list(directory.glob(f"*/{checkpoint.STATE_FILE}"))
        if finished:
            newest = max(finished, key=lambda file: (file.parent.name != PREPARED, file.stat().st_mtime)).parent
            raise UsageError(
                f"{directory} holds a run's directories and is none itself; name the one to export, as in "
                f"{shell_line('diffvl', 'export', newest)}"
            )
