"""LoRA beside the weights: the run's tensors with those that adapters were merged into as they were before, and the adapters.

A stage trains adapters on a frozen trunk, so what was there before lies in the directory that it started from, bit for bit.
"""

import shutil
from pathlib import Path

from safetensors import safe_open

from diffvl.errors import CheckpointError, UsageError
from diffvl.export import native
from diffvl.export.shards import write_tensors
from diffvl.export.source import Run
from diffvl.store import checkpoint
from diffvl.store.checkpoint import ADAPTER
from diffvl.store.files import Writing
from diffvl.store.tensorfiles import Header, read_headers, some

TENSORS = "adapter_model.safetensors"


def require_adapters(run: Run, layout: str) -> None:
    """Raises UsageError unless there are adapters that can be kept apart in this layout."""
    if run.is_lossless:
        raise UsageError("--keep-adapters has no effect: a lossless conversion's adapters are never merged; leave it out")
    if layout != "native":
        raise UsageError(f"--keep-adapters has no effect with --layout {layout}: its callers know no adapters; leave it out")
    if not (run.directory / ADAPTER / TENSORS).is_file():
        raise UsageError(
            f"--keep-adapters: {run.directory} has no {ADAPTER} folder: its stage trained without LoRA, sharded, or with an "
            "older diffvl. Leave it out: the weights hold whatever was learnt"
        )


def base_tensors(run: Run) -> dict[str, Header]:
    """Gives the run's tensors, those with adapters from the directory that its stage started from.

    Raises:
        CheckpointError: if that is gone, or not the one.
    """
    start = Path(run.state["parents"][0])
    try:
        checkpoint.require_diffvl(start)
        before = read_headers(start)
    except CheckpointError as error:
        raise CheckpointError(
            f"--keep-adapters: the weights from before the adapters lie in {start}, from which the stage started, and they "
            f"cannot be read ({error})"
        ) from error
    with safe_open(run.directory / ADAPTER / TENSORS, "pt") as opened:
        adapted = {f"{name.removeprefix('base_model.model.').partition('.lora_')[0]}.weight" for name in opened.keys()}  # noqa: SIM118
    odd = [
        name
        for name in sorted(adapted)
        if name not in run.headers or name not in before or before[name].shape != run.headers[name].shape
    ]
    if odd:
        raise CheckpointError(f"--keep-adapters: {start} has not the weights that the adapters stand on ({some(odd)})")
    return {name: before[name] if name in adapted else header for name, header in run.headers.items()}


def write(run: Run, directory: Path) -> None:
    """Writes the native layout with adapters apart, into an empty directory. Raises DiskError, CheckpointError."""
    write_tensors(base_tensors(run), directory)
    native.write_small_files(run, directory)
    with Writing(directory):
        shutil.copytree(run.directory / ADAPTER, directory / ADAPTER)
