"""Weight files: tensors of a checkpoint under other names, written shard by shard, so that no more than one shard is in memory.

Place in the flow: the last step of every layout. Invariant: a file that needs no change is copied as it is; of the others each
tensor is read, renamed and written as it is, bit for bit.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

from diffvl.store.files import Writing, replace_text, share
from diffvl.store.tensorfiles import INDEX, SINGLE, Header

SHARD_BYTES = 5 * 10**9  # of one file, as hubs like them
HEADER_ROOM = 2**24  # bytes of names and shapes, which are not counted in a shard
PATTERN = "model{suffix}.safetensors"


def write_tensors(headers: Mapping[str, Header], directory: Path, shard_bytes: int | None = None) -> None:
    """Writes the tensors under the names that the mapping gives them.

    Args:
        shard_bytes: of the largest file; default: SHARD_BYTES.
    Raises:
        DiskError.
    """
    split = split_state_dict_into_shards_factory(
        dict(headers),  # type: ignore[arg-type]
        get_storage_size=lambda header: header.num_bytes,  # type: ignore[attr-defined]
        filename_pattern=PATTERN,
        max_shard_size=SHARD_BYTES if shard_bytes is None else shard_bytes,
    )
    with Writing(directory):
        for file, names in split.filename_to_tensors.items():
            _write_shard({name: headers[name] for name in names}, directory / file)
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            replace_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
        share(directory)


def _write_shard(headers: Mapping[str, Header], file: Path) -> None:
    """Copies the source's file where it holds just these tensors under these names; else reads and writes them."""
    sources = {header.file for header in headers.values()}
    if len(sources) == 1 and all(name == header.name for name, header in headers.items()):
        (source,) = sources
        with safe_open(source, "pt") as opened:
            same = set(opened.keys()) == set(headers)
        if same:
            shutil.copyfile(source, file)
            return
    tensors = {}
    for source in sources:
        with safe_open(source, "pt") as opened:
            for name, header in headers.items():
                if header.file == source:
                    tensors[name] = opened.get_tensor(header.name)
    if len({tensor.data_ptr() for tensor in tensors.values()}) < len(tensors):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # one tensor under two names
    save_file(tensors, file, metadata={"format": "pt"})


def copy_tensors(source: Path, headers: Mapping[str, Header], directory: Path) -> None:
    """Writes the tensors of a checkpoint as they are: copies of its files, unless one is larger than a shard.

    Raises:
        DiskError.
    """
    files = sorted({header.file for header in headers.values()})
    if any(file.stat().st_size > SHARD_BYTES + HEADER_ROOM for file in files):
        write_tensors(headers, directory)
        return
    with Writing(directory):
        for file in [*files, source / INDEX]:
            if file.name != INDEX or files != [source / SINGLE]:
                shutil.copyfile(file, directory / file.name)
