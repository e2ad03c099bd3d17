"""The weight files of a checkpoint by their headers: which tensors there are, of what shape and type, and whether a file is what
its name says. No weight is read.

Place in the flow: `weights` asks before any work is done, for the trunk and for the vision tower. Invariant: what is told here
is what transformers would find when it loads: the same files in the same order of preference.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffvl.errors import CheckpointError, first_few, first_line
from diffvl.store.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLED = ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt", "*.ckpt")
NOT_WEIGHTS = ("training_args.bin", "scheduler.pt", "optimizer.pt", "rng_state.pth", "tokenizer.bin")
OTHER_FORMATS = ("*.gguf", "*.safetensors", "*.h5", "*.msgpack", "*.onnx", "*.npz")
SHOWN = 3


@dataclass(frozen=True)
class Header:
    """One tensor of a file. name: that it has there. dtype: in safetensors' words (F32, BF16, I64 ...)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * int(re.sub(r"\D", "", self.dtype.partition("_")[0]) or 8) // 8


def read_headers(directory: Path, loader: str = "AutoModelForCausalLM") -> dict[str, Header]:
    """Lists every tensor of a checkpoint directory by name.

    Args:
        loader: the class of transformers with which files of another format can be converted.
    Raises:
        CheckpointError: if there are no safetensors files, one is missing, or one is not whole.
    """
    headers: dict[str, Header] = {}
    for file in weight_files(directory, loader):
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (it is no dict)
                    tensor = opened.get_slice(name)
                    headers[name] = Header(file, name, tuple(tensor.get_shape()), str(tensor.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {_fault(file, error)}") from error
    return headers


def weight_files(directory: Path, loader: str = "AutoModelForCausalLM") -> list[Path]:
    """Lists the files that transformers would read. Raises CheckpointError if there are none or one is missing."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        raise CheckpointError(_no_safetensors(directory, loader))
    if pointer := _pointer(index):
        raise CheckpointError(f"{index}: {pointer}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names in it; fetch the checkpoint again")
    files = [directory / name for name in sorted(set(places.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{directory}: {len(missing)} of the {len(files)} weight files that {INDEX} names are not there: {some(missing)}; "
            "fetch them, or the whole checkpoint again"
        )
    return files


def has_weights(directory: Path) -> bool:
    """Tells whether a directory holds weights in any format; one with a config.json alone does not."""
    return any(_found(directory, (*PICKLED, *OTHER_FORMATS))) or (directory / INDEX).exists()


def read_tensor(header: Header) -> Any:
    """Reads one tensor whole."""
    with safe_open(header.file, "pt") as opened:
        return opened.get_tensor(header.name)


def some(names: Iterable[str]) -> str:
    """Gives the first few of many names."""
    return ", ".join(first_few(list(names), SHOWN))


# --- what is there instead -----------------------------------------------------------------------------------------------


def _found(directory: Path, patterns: Iterable[str]) -> list[str]:
    names = {path.name for pattern in patterns for path in directory.glob(pattern)}
    return sorted(names - set(NOT_WEIGHTS))


def _no_safetensors(directory: Path, loader: str) -> str:
    """Tells why a directory without model.safetensors cannot be read, and the way out."""
    expected = f"expected {SINGLE}, or shards with {INDEX}"
    others = _found(directory, OTHER_FORMATS)
    if shards := [name for name in others if name.endswith(".safetensors")]:
        missing = (
            "their index is missing: fetch it" if any("-of-" in name for name in shards) else "rename it, or fetch the other"
        )
        return f"{directory}: {expected}; there is {some(shards)}: {missing}"
    if pickled := _found(directory, PICKLED):
        code = (
            f"from transformers import {loader} as M; d = {str(directory)!r}; "
            "M.from_pretrained(d, use_safetensors=False, dtype='auto').save_pretrained(d)"
        )
        return (
            f"{directory}: its weights are pickled ({some(pickled)}), and only safetensors files are read, which cannot run "
            f'code. To convert a checkpoint that you trust: python -c "{code}"'
        )
    if ggufs := [name for name in others if name.endswith(".gguf")]:
        return f"{directory}: no safetensors files there; to convert a .gguf file, name the file itself: {directory / ggufs[0]}"
    there = f"there is {some(others)}" if others else "there are no weights"
    return f"{directory}: {expected}; {there}. Fetch the checkpoint again"


def _pointer(file: Path) -> str | None:
    """Tells what a text file under the name of another is: what git leaves without LFS, or a page of a web server."""
    with file.open("rb") as opened:
        start = opened.read(200)
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: run `git lfs pull` there, or fetch the checkpoint again"
    if start.lstrip()[:1] == b"<":
        return "a web page, not the file itself (its download was refused or redirected); fetch it again, logged in if need be"
    return None


def _fault(file: Path, error: Exception) -> str:
    """Tells what is wrong with a file that safetensors cannot open."""
    if not file.is_file() or isinstance(error, PermissionError):
        return f"cannot be read ({error}); expected a safetensors file"
    size = file.stat().st_size
    if size == 0:
        return "the file is empty (0 bytes); fetch it again"
    if pointer := _pointer(file):
        return pointer
    with file.open("rb") as opened:
        start = opened.read(8)
        if start.startswith(b"PK\x03\x04") or start.startswith(b"\x80"):
            return "a pickled PyTorch file under the name of a safetensors file; name it pytorch_model.bin and convert it"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + length > size:
            return f"damaged or cut short ({size:,} bytes do not hold its header); fetch it again"
        whole = 8 + length + _end_of_data(opened.read(length))
    if size < whole:
        return f"cut short: {size:,} bytes, where its header names {whole:,}; fetch it again"
    return f"damaged ({first_line(error)}); fetch it again"


def _end_of_data(header: bytes) -> int:
    """Bytes of tensors that a header names; 0 where it is damaged."""
    try:
        content = json.loads(header)
        return max((entry["data_offsets"][1] for name, entry in content.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return 0
