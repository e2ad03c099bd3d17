"""A checkpoint of a lossless conversion: adapters with a gate and a mask row, over a base whose weights they never change.

The directory holds a folder `gated_adapter`: low-rank adapters as peft writes them, and the mask row. The base's weights lie
elsewhere (`config.gated_adapter["base"]`: a directory, seen from this one, or a hub id), or in the same directory (`"."`), as an
export writes it. `from_pretrained` reads the base, proves by a digest of all its weights that it is the one, and puts the rest
in. Adapters fit one base only: over another one they would load without an error, and draft nonsense.

The layers are peft's, which transformers puts in; peft must be installed.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from .gate_diffvl import MASK_ROW, AdapterGate, attach_mask_row, require_gate

FOLDER = "gated_adapter"
ADAPTER_CONFIG, ADAPTER_TENSORS, MASK_ROW_TENSORS = "adapter_config.json", "adapter_model.safetensors", "mask_row.safetensors"
FILES = (ADAPTER_CONFIG, ADAPTER_TENSORS, MASK_ROW_TENSORS)
OF_PEFT = "base_model.model."  # peft's beginning of every name in an adapter's file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HERE = "."  # the base whose weights lie beside the adapters
# Of `from_pretrained`: where files come from, which the adapters' directory and its base need not share.
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
PIECE = 2**24  # bytes that are read at a time


class BaseRefusedError(ValueError):
    """The base of gated adapters is not there, or not the one that they were trained on."""


class WithGatedAdapters:
    """What a model class needs to load such a checkpoint. gate: of a model with gated adapters; None for any other."""

    config_class: Any
    gate: AdapterGate | None = None

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, base: Any = None, **named: Any) -> Any:
        """As of any model.

        Args:
            base: of gated adapters: where their base lies, in the place of what the configuration says.
        Raises:
            BaseRefusedError: if the base is not there, or another one.
            ImportError: if gated adapters are there, and peft is not.
            ValueError: if the adapters do not fit, or `base` has no effect.
        """
        load: Any = super().from_pretrained  # type: ignore[misc]
        download = {key: value for key, value in named.items() if key in DOWNLOAD}
        config = named.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(name, **download)
        if getattr(config, "gated_adapter", None) is None:  # configurations of other layouts know nothing of it
            if base is not None:
                raise ValueError(f"base has no effect: {name} has no gated adapters")
            return load(name, *arguments, **named)
        revision = named.get("revision") if config.gated_adapter["base"] == HERE else config.gated_adapter["revision"]
        place = str(base) if base is not None else base_place(config.gated_adapter["base"], str(name))
        _require_base(name, place, {**download, "revision": revision}, config.gated_adapter["digest"])
        loaded = load(place, *arguments, **{**named, "config": config, "revision": revision or "main"})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        put_adapters(model, _folder(str(name), download))
        model.generation_config = GenerationConfig.from_pretrained(name, **download)
        return loaded


def base_place(base: str, directory: str) -> str:
    """Where a base lies: a directory as seen from that of the adapters, or what has this name anywhere."""
    if base == HERE:
        return directory
    beside = Path(directory) / base
    return str(beside) if beside.is_dir() else base


def put_adapters(model: Any, folder: Path) -> None:
    """Puts what a folder holds into a model of the base, in place; the gate is shut.

    Raises:
        ImportError: peft is not installed.
        ValueError: the adapters do not fit the trunk, or cannot be gated in it.
    """
    try:
        model.trunk.load_adapter(str(folder))
    except ImportError as error:
        raise ImportError(f"{folder}: these adapters need peft: pip install peft ({error})") from error
    model.gate = AdapterGate.attach(model.trunk)
    own = {name.replace(".default.", "."): parameter for name, parameter in model.trunk.named_parameters() if ".lora_" in name}
    stored = {name.removeprefix(OF_PEFT): tensor for name, tensor in load_state_dict(folder / ADAPTER_TENSORS).items()}
    if odd := sorted(own.keys() ^ stored.keys()):
        raise ValueError(f"{folder}: the adapters do not fit the trunk: {', '.join(odd[:3])}")
    attach_mask_row(model)
    row, table = model.get_parameter(MASK_ROW), model.get_input_embeddings().weight
    stored_row = load_state_dict(folder / MASK_ROW_TENSORS)[MASK_ROW]
    if stored_row.shape != row.shape:
        raise ValueError(f"{folder}: the mask row has {len(stored_row)} values, the trunk is {len(row)} wide")
    row.requires_grad_(False)
    row.data = stored_row.to(table.device, table.dtype)
    require_gate(model)


def _folder(name: str, download: dict[str, Any]) -> Path:
    """The folder with the adapters, on this machine."""
    files = [cached_file(name, f"{FOLDER}/{file}", **download) for file in FILES]
    return Path(str(files[0])).parent


# --- which base ---------------------------------------------------------------------------------------------------------------


def _require_base(name: Any, place: str, download: dict[str, Any], digest: str) -> None:
    """Raises BaseRefusedError unless the weights of the base are those that the adapters were trained on."""
    try:
        files = _weight_files(place, download)
    except OSError as error:
        raise BaseRefusedError(
            f"the base of these adapters is {place}, which is not there. Bring it back, or say where it lies: "
            f'"base" of "gated_adapter" in {name}/config.json'
        ) from error
    found = weights_digest(files)
    if found != digest:
        raise BaseRefusedError(
            f"{place} is another base than these adapters were trained on (its weights have the digest {found[:12]}, expected "
            f'{digest[:12]}); over it they would draft nonsense. Name the right one: "base" of "gated_adapter" in '
            f"{name}/config.json"
        )


def _weight_files(place: str, download: dict[str, Any]) -> list[Path]:
    """The weight files of a base. Raises OSError where there are none."""
    single = cached_file(place, SINGLE, _raise_exceptions_for_missing_entries=False, **download)
    if single is not None:
        return [Path(single)]
    index = cached_file(place, INDEX, **download)
    names = json.loads(Path(str(index)).read_text(encoding="utf-8"))["weight_map"].values()
    return [Path(str(cached_file(place, name, **download))) for name in sorted(set(names))]


def weights_digest(files: list[Path]) -> str:
    """One number for all tensors of safetensors files: their names, types, shapes and every byte, however they are spread over
    files."""
    with ThreadPoolExecutor() as pool:
        lines = pool.map(_line, [entry for file in files for entry in _entries(file)])
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _entries(file: Path) -> Iterator[tuple[Path, str, int, int]]:
    """(file, name with type and shape, first byte, number of bytes) of each tensor."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:  # a pointer to a large file that was never fetched begins with words
            raise BaseRefusedError(f"{file} holds no weights: fetch it again")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield file, f"{name} {entry['dtype']} {entry['shape']}", 8 + length + start, end - start


def _line(entry: tuple[Path, str, int, int]) -> str:
    file, told, start, left = entry
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(start)
        while left > 0:
            piece = opened.read(min(PIECE, left))
            if not piece:
                raise BaseRefusedError(f"{file} is cut short: fetch it again")
            digest.update(piece)
            left -= len(piece)
    return f"{told} {digest.hexdigest()}"
