"""Directories: what a DiffVL checkpoint directory holds, how it is written whole or not at all, and how it is read back.

A directory is written as `NAME.partial` and renamed when complete, so that a kill at any moment leaves the last good state.
The native layout is self-contained: weights, tokenizer, processor and the remote code (the files of `diffvl.hub`, copied byte
for byte), which load in a process without diffvl.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig

from diffvl import machine
from diffvl.config.recipe import PREPARED, Recipe
from diffvl.config.resolve import dump, read_yaml, resolve
from diffvl.errors import CheckpointError, UsageError, first_line
from diffvl.hub import configuration_diffvl
from diffvl.hub.adapter_diffvl import BaseRefusedError, base_place
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store.files import PARTIAL, Writing, read_json, replace_text, share, sync
from diffvl.store.published import quiet_report
from diffvl.terminal.console import shell_line

T = TypeVar("T")

# The tokenizer's loader looks the configuration up; known here, it never asks to run the copied remote code.
AutoConfig.register(DiffVLConfig.model_type, DiffVLConfig)

STATE_FILE = "diffvl.json"
RECIPE_FILE = "run.yaml"
ADAPTER = "adapter"  # folder of the adapters of a stage, which its weights have in them already
HUB = Path(configuration_diffvl.__file__).parent
HUB_FILES = tuple(sorted(path.name for path in HUB.glob("*_diffvl.py")))  # the remote code
MODEL_CLASS = "modeling_diffvl.DiffVLForConditionalGeneration"
MODEL_MAP = {
    "AutoConfig": "configuration_diffvl.DiffVLConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForCausalLM": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
}
PROCESSOR_MAP = {"AutoProcessor": "processing_diffvl.DiffVLProcessor"}


# --- writing -------------------------------------------------------------------------------------------------------------


def partial(directory: Path) -> Path:
    """Gives the name under which a directory is built before it gets its own."""
    return directory.with_name(directory.name + PARTIAL)


def require_empty(directory: Path) -> None:
    """Raises UsageError if writing `directory` would touch something that is already there."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"{directory} exists and is not empty; nothing was written. Choose another --out, remove it, or add --resume"
        )


def finish(directory: Path) -> None:
    """Gives a completed partial directory its name. The rename is the moment at which the output exists."""
    source = partial(directory)
    sync(source)
    if directory.exists():
        directory.rmdir()
    source.rename(directory)


def write_checkpoint(
    model: DiffVLForConditionalGeneration, processor: DiffVLProcessor, directory: Path, weights: bool = True
) -> None:
    """Writes the native layout into an existing directory (a partial one): weights, processor, remote code. Raises DiskError.

    Args:
        weights: False where they have been written already.
    """
    config = model.config
    config.architectures = [DiffVLForConditionalGeneration.__name__]
    config.auto_map = MODEL_MAP
    model.generation_config = _generation_config(model)
    with Writing(directory):
        if weights:
            model.save_pretrained(directory)
            share(directory)
        else:
            config.save_pretrained(directory)
            model.generation_config.save_pretrained(directory)
        processor.save_pretrained(directory)
        _edit_json(directory / "processor_config.json", {"auto_map": PROCESSOR_MAP, "processor_class": "DiffVLProcessor"})
        for name in HUB_FILES:
            shutil.copyfile(HUB / name, directory / name)


def _generation_config(model: DiffVLForConditionalGeneration) -> GenerationConfig:
    """Keeps the trunk's stop and pad ids, and adds what block decoding needs. Sampling settings of the AR model are not kept:
    they were tuned for another decoder."""
    config, own = model.config, model.trunk.generation_config
    pad = own.pad_token_id if own is not None else None
    return GenerationConfig(
        eos_token_id=config.stop_token_ids,
        pad_token_id=pad if pad is not None else config.stop_token_ids[0],
        bos_token_id=own.bos_token_id if own is not None else None,
        mask_token_id=config.mask_token_id,
        block_size=config.block_size,
    )


def write_state(directory: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Writes `run.yaml` (the resolved recipe) and `diffvl.json` (where this came from)."""
    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": machine.versions(),
        "machine": machine.describe(),
        **state,
    }
    replace_text(directory / RECIPE_FILE, dump(recipe))
    replace_text(directory / STATE_FILE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def _edit_json(path: Path, changes: dict[str, Any]) -> None:
    replace_text(path, json.dumps({**read_json(path), **changes}, indent=2, ensure_ascii=False) + "\n")


# --- reading -------------------------------------------------------------------------------------------------------------


def load_checkpoint(directory: Path, dtype: torch.dtype | None = None) -> tuple[DiffVLForConditionalGeneration, DiffVLProcessor]:
    """Reads a DiffVL directory with this package's own code (the copied remote code is not run).

    Args:
        dtype: default: the checkpoint's own.
    Raises:
        CheckpointError: if it is missing, of another kind, incomplete or damaged, or its token ids do not fit together.
    """
    _, processor = load_description(directory)
    return load_model(directory, dtype), processor


def load_model(directory: Path, dtype: torch.dtype | None = None, **more: Any) -> DiffVLForConditionalGeneration:
    """Reads the model of a directory whose description is known to be whole. Raises CheckpointError as `load_checkpoint`.

    Args:
        more: for `from_pretrained`.
    """
    loader: Any = DiffVLForConditionalGeneration
    arguments = {"dtype": dtype or "auto", "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    arguments |= more
    with quiet_report():
        model, info = _explain_damage(directory, lambda: loader.from_pretrained(directory, **arguments))
    problems = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(problems.values()):
        raise CheckpointError(f"{directory}: the weights do not fit the configuration: {problems}")
    return model


def load_description(directory: Path) -> tuple[DiffVLConfig, DiffVLProcessor]:
    """Reads what `load_checkpoint` reads, but for the weights."""
    require_diffvl(directory)
    config, processor = _explain_damage(
        directory, lambda: (DiffVLConfig.from_pretrained(directory), DiffVLProcessor.from_pretrained(directory))
    )
    parts = ("text_config", "vision_config") if config.source_config is None else ("text_config",)
    absent = [name for name in parts if getattr(config, name) is None]
    if absent:
        raise CheckpointError(f"{directory / 'config.json'}: no {' and no '.join(absent)} in it; copy the checkpoint again")
    _require_tokens(directory, config, processor)
    return config, processor


def _require_tokens(directory: Path, config: DiffVLConfig, processor: DiffVLProcessor) -> None:
    """Raises CheckpointError unless mask and image token are the tokenizer's own and have rows in the trunk's embedding. (The
    placeholder of a native model may be another token than the one that shows an image.)"""
    tokenizer, size = processor.tokenizer, config.text_config.vocab_size
    tokens = {"mask_token_id": tokenizer.mask_token}
    if config.source_config is None:
        tokens["image_token_id"] = processor.image_token
        if config.tiling != processor.tiling:
            raise CheckpointError(
                f"{directory}: config.json and processor_config.json cut images in different ways (tiling is {config.tiling} and "
                f"{processor.tiling}); copy the checkpoint again"
            )
    for name, token in tokens.items():
        given, expected = getattr(config, name), tokenizer.convert_tokens_to_ids(token)
        if given != expected or not 0 <= given < size:
            raise CheckpointError(
                f"{directory / 'config.json'}: {name} is {given}, expected {expected}, which the tokenizer gives {token}; the "
                f"embedding has {size} rows. Set it back, or copy the checkpoint again"
            )


def require_diffvl(directory: Path) -> None:
    """Raises CheckpointError unless `directory` looks like a finished DiffVL checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{directory}: no config.json there; expected a DiffVL checkpoint, as `diffvl convert` writes it")
    kind = read_json(directory / "config.json").get("model_type")
    if (directory / "generation_config.json").is_file():
        read_json(directory / "generation_config.json")  # transformers would go on without a damaged one
    if kind != DiffVLConfig.model_type:
        raise CheckpointError(
            f"{directory}: a {kind!r} checkpoint; expected one that `diffvl convert` wrote. "
            f"To convert it: {shell_line('diffvl', 'convert', directory)}"
        )


def _explain_damage(directory: Path, load: Callable[[], T]) -> T:
    try:
        return load()
    except (BaseRefusedError, ImportError) as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        message = f"the checkpoint cannot be read, a file is damaged or missing ({first_line(error)}); copy it or make it again"
        raise CheckpointError(f"{directory}: {message}") from error


def weights_place(directory: Path) -> Path:
    """Gives the directory that holds a checkpoint's weights: its own, but for gated adapters over a base that lies elsewhere."""
    gated = read_json(directory / "config.json").get("gated_adapter")
    return directory if gated is None else Path(base_place(gated["base"], str(directory)))


def saved_dtype(directory: Path) -> torch.dtype:
    """Gives the dtype in which a checkpoint's weights are stored. Raises CheckpointError for a directory that holds none."""
    require_diffvl(directory)
    return getattr(torch, read_json(directory / "config.json")["dtype"])


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Puts what a checkpoint of the model holds in a dtype, in place. What the model computes for itself, the frequencies of its
    rotation above all, stays as it is, as it does when the checkpoint is loaded."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def read_state(directory: Path) -> dict[str, Any]:
    """Reads `diffvl.json` of a finished directory. Raises CheckpointError if there is none."""
    path = directory / STATE_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {STATE_FILE} there; expected a directory that `diffvl convert` finished")
    return read_json(path)


def finished_stages(roots: Iterable[Path]) -> list[Path]:
    """Finds the finished stage directories of runs, in the order in which they were finished."""
    found = [(read_state(file.parent), file.parent) for root in roots for file in root.glob(f"*/{STATE_FILE}")]
    stages = [(state["created"], path) for state, path in found if state.get("kind") == path.name != PREPARED]
    return [path for _, path in sorted(stages)]


def recipe_of(directory: Path) -> Recipe:
    path = directory / RECIPE_FILE
    return resolve(read_yaml(path), [], str(path))
