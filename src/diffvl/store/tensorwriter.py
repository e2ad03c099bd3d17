"""Weights written as they come, one tensor after the other, into safetensors files of a bounded size with their index.

Place in the flow: a model that no process holds whole is saved through it. Invariant: what is held in memory is one file at most,
and a file has its final name only when all of them are written; they are what `save_pretrained` calls its shards.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffvl.store.files import PARTIAL, Writing, replace_text, share
from diffvl.store.tensorfiles import INDEX, SINGLE

LARGEST = 2 * 10**9  # bytes of a file, unless one tensor has more


class TensorWriter:
    """Collects tensors and writes a file whenever one is full. `finish` gives the files their names."""

    def __init__(self, directory: Path, largest: int = LARGEST) -> None:
        self._directory, self._largest = directory, largest
        self._held: dict[str, torch.Tensor] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._bytes = self._all_bytes = self._all_numbers = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Takes a tensor, which nobody may change any more. Raises DiskError."""
        if self._held and self._bytes + tensor.nbytes > self._largest:
            self._write()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        self._all_bytes += tensor.nbytes
        self._all_numbers += tensor.numel()

    def finish(self) -> None:
        """Writes what is held, names the files and writes their index, where there are several. Raises DiskError."""
        self._write()
        count, places = len(self._files), {}
        for number, (file, names) in enumerate(self._files, start=1):
            name = SINGLE if count == 1 else SINGLE.replace(".", f"-{number:05d}-of-{count:05d}.")
            file.rename(self._directory / name)
            places |= dict.fromkeys(names, name)
        if count > 1:
            facts = {"total_parameters": self._all_numbers, "total_size": self._all_bytes}
            index = {"metadata": facts, "weight_map": dict(sorted(places.items()))}
            replace_text(self._directory / INDEX, json.dumps(index, indent=2) + "\n")
        share(self._directory)

    def _write(self) -> None:
        file = self._directory / f"weights-{len(self._files)}.safetensors{PARTIAL}"
        with Writing(self._directory):
            save_file(self._held, file, metadata={"format": "pt"})
        self._files.append((file, list(self._held)))
        self._held, self._bytes = {}, 0
