"""The proof of an export: a clean process loads what was written, and must find what the model in memory gives.

Place in the flow: around the writing. `reference` runs the model in memory before anything is written, `prove` starts the
clean process afterwards. Both run `visitor.visit`: fixed chats, with and without an image; a prefill, a denoising step that
stores nothing, one that stores, the block after it; and an answer. Invariant: inputs and answers are equal, logits within a
tolerance; else nothing gets its name.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from diffvl.errors import ProofError, first_line
from diffvl.export import visitor
from diffvl.export.source import Run
from diffvl.store import checkpoint

TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # std of the logits
HALF_TOLERANCE = 2e-2  # of 16-bit dtypes
TEXT = "Describe everything that can be seen here, from left to right and from top to bottom: shapes, colours, texts."
PICTURE = (88, 56)  # pixels, wider than high: tiles are cut and unpadded
KEPT_OUT = ("PYTHON", "HF_", "TRANSFORMERS_", "DIFFVL_")  # beginnings of variables that could change what is loaded


@dataclass(frozen=True)
class Reference:
    """What the model in memory gives. text_only: whether a language model is compared; chats: what it was asked."""

    found: dict[str, torch.Tensor]
    chats: list[dict[str, Any]]
    folder: Path
    text_only: bool
    tolerance: float


def reference(run: Run, folder: Path, text_only: bool) -> Reference:
    """Runs the model in memory on the fixed chats.

    Args:
        folder: for the picture, and for what the clean process leaves; removed by the caller.
    Raises:
        CheckpointError: if the weights do not fit the configuration.
    """
    chats: list[dict[str, Any]] = [{"text": TEXT, "image": None}]
    if not text_only:
        picture = folder / "picture.png"
        wide, high = PICTURE
        Image.radial_gradient("L").convert("RGB").crop((0, 0, wide, high)).save(picture)
        chats.append({"text": f"\n{TEXT}", "image": str(picture)})
    model: Any = checkpoint.load_model(run.directory).eval()
    found = visitor.visit(model, visitor.encode_chats(run.processor), chats)
    del model
    gc.collect()
    return Reference(found, chats, folder, text_only, TOLERANCE.get(run.dtype, HALF_TOLERANCE))


def prove(directory: Path, expected: Reference, adapter: Path | None = None) -> dict[str, float]:
    """Loads what was written in a clean process and compares.

    Args:
        adapter: of the directory, to be merged by the clean process.
    Returns:
        the largest difference of each kind of logits, in std of the logits.
    Raises:
        ProofError: if it cannot be loaded there, or differs.
    """
    found = _visited(directory, expected, adapter)
    _require_same_inputs(directory, expected.found, found)
    figures: dict[str, float] = {}
    for name, logits in expected.found.items():
        number, _, kind = name.partition(".")
        if kind == "answer" or kind.startswith("inputs."):
            continue
        difference = float((found[name] - logits).abs().max() / logits.std())
        with_image = expected.chats[int(number)]["image"] is not None
        figures[f"{kind}, with an image" if with_image else kind] = difference
        if not difference <= expected.tolerance:
            raise ProofError(
                f"{directory.name}: {kind} logits{' with an image' if with_image else ''} differ from the model's in memory by "
                f"{difference:.2g} std, more than {expected.tolerance:g}; nothing was kept"
            )
    for name, tokens in expected.found.items():
        if name.endswith(".answer") and not torch.equal(tokens, found[name]):
            raise ProofError(
                f"{directory.name}: the answer differs from the model's in memory: {found[name].tolist()}, expected "
                f"{tokens.tolist()}; nothing was kept"
            )
    return figures


def _visited(directory: Path, expected: Reference, adapter: Path | None) -> dict[str, torch.Tensor]:
    """Runs the visitor. Nothing of this process's environment tells it where Python looks for modules."""
    with tempfile.TemporaryDirectory(dir=expected.folder) as scratch:
        out, asked = Path(scratch) / "found.safetensors", Path(scratch) / "request.json"
        request = {
            "directory": str(directory.absolute()),
            "adapter": None if adapter is None else str(adapter.absolute()),
            "chats": expected.chats,
            "text_only": expected.text_only,
            "threads": torch.get_num_threads(),
            "out": str(out),
        }
        asked.write_text(json.dumps(request), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_OUT)}
        environment |= {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, "-I", str(Path(visitor.__file__).absolute()), str(asked)]
        done = subprocess.run(words, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
            raise ProofError(
                f"{directory.name}: a clean process cannot use what was written ({first_line(RuntimeError(lines[-1]))}); nothing "
                "was kept"
            )
        return load_file(out)


def _require_same_inputs(directory: Path, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    """Raises ProofError unless the written processor reads the chats as the run's own: the same tokens, the same pixels."""
    for name, value in expected.items():
        _, _, kind = name.partition(".")
        known = found.get(name)
        if kind == "inputs.answer_index" or not kind.startswith("inputs."):
            continue
        if known is None or known.shape != value.shape or not torch.equal(known, value):
            raise ProofError(
                f"{directory.name}: the written processor reads a chat differently ({kind.removeprefix('inputs.')}); nothing was "
                "kept"
            )
