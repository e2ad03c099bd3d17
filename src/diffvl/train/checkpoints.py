"""Checkpoints inside a stage: what trains, its optimiser, and where schedule and curricula stand.

One form for every way to train, through torch.distributed.checkpoint: each process writes its share. A checkpoint is written into
a staging folder and renamed, so that every folder named checkpoint-N is whole. What is frozen is not in it: that is bit-identical
in the directory that the stage started from. Randomness is not in it either: it is a function of seed and step.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from diffvl.errors import CheckpointError, DiskError
from diffvl.store.files import Writing, read_json, replace_text, sync
from diffvl.train.launch import agreed, main_only, process_state

CHECKPOINTS = "checkpoints"
STAGING = "saving"  # under CHECKPOINTS: a checkpoint that has no name yet
STATE_FILE = "state.json"
ROWS = "rows_per_step"  # in a checkpoint's state: of all processes together
INDEX = ".metadata"  # which tensor stands where in the files beside it

_TRAINED = StateDictOptions(ignore_frozen_params=True)


def save(run_dir: Path, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int) -> None:
    """Writes `checkpoint-STEP` and removes all but the `keep` newest. All processes call it.

    Args:
        run_dir: the folder of the stage's checkpoints. state: for JSON; `step` gives the name.
    Raises:
        DiskError: the disk takes no more; the checkpoints that were there stay.
    """
    staging, final = run_dir / STAGING, run_dir / f"checkpoint-{state['step']}"
    main_only(lambda: _empty(staging))
    weights, moments = _trained(model, optimizer)
    try:
        agreed(lambda: _write(staging, {"model": weights, "optimizer": moments}))
        main_only(lambda: _name(staging, final, state, keep))
    except DiskError:
        shutil.rmtree(staging, ignore_errors=True)  # the room that it takes may be what is needed to go on
        raise


def _trained(model: Any, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trains, and its moments; without what weights in 4 bits have beside them under their own names."""
    weights, moments = get_state_dict(model, optimizer, options=_TRAINED)
    frozen = {name.removeprefix("module.") for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in weights.items() if name.rpartition(".")[0] not in frozen}, moments


def _write(staging: Path, tensors: dict[str, Any]) -> None:
    several = process_state().num_processes > 1  # on several machines each puts its own files on the disk; else `sync` does it
    with Writing(staging.parent), _plain_errors():
        state_dict_saver.save(tensors, storage_writer=FileSystemWriter(staging, sync_files=several))


def _empty(staging: Path) -> None:
    if staging.exists():  # left by a run that was killed
        shutil.rmtree(staging)
    staging.mkdir(parents=True)


def _name(staging: Path, final: Path, state: dict[str, Any], keep: int) -> None:
    replace_text(staging / STATE_FILE, json.dumps(state))
    sync(staging)
    staging.rename(final)
    for old in all_of(final.parent)[:-keep]:
        shutil.rmtree(old)


def load(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's tensors into model and optimiser, in place; returns its state. All processes call it.

    Raises:
        CheckpointError: it holds other parameters than this stage trains.
    """
    weights, moments = _trained(model, optimizer)
    tensors = {"model": weights, "optimizer": moments}
    reader = FileSystemReader(folder)
    stored = set(reader.read_metadata().state_dict_metadata)
    _require_names(folder, stored, weights)
    with _plain_errors():
        state_dict_loader.load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_state_dict(
        model,
        optimizer,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )
    # A parameter without a gradient so far has no moments in the file, and none again: torch has made some up for it.
    for name, parameter in model.named_parameters():
        if not any(f"optimizer.state.{name.removeprefix('module.')}.{moment}" in stored for moment in ("step", "exp_avg")):
            optimizer.state.pop(parameter, None)
    return read_json(folder / STATE_FILE)


def _require_names(folder: Path, stored: set[str], weights: dict[str, Any]) -> None:
    saved = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    if odd := sorted(saved ^ weights.keys()):
        raise CheckpointError(f"{folder}: holds other parameters than this stage trains: {odd[:5]}")


def all_of(run_dir: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(run_dir.glob("checkpoint-*"), key=step_of)


def step_of(folder: Path) -> int:
    """The optimiser steps that were done when a checkpoint was made, which its name says."""
    return int(folder.name.rsplit("-", 1)[1])


def newest(work: Path) -> Path | None:
    """The checkpoint of an unfinished stage with the highest step; every one that has its name is whole, unless something else
    damaged it. Raises CheckpointError then."""
    found = all_of(work / CHECKPOINTS)
    if not found:
        return None
    require_whole(found[-1])
    return found[-1]


def require_whole(folder: Path) -> None:
    """Raises CheckpointError if a file is missing or was cut short; without this checkpoint the one before can be resumed."""
    advice = f"remove {folder}, and --resume goes on from the checkpoint before it"
    path = folder / STATE_FILE
    try:
        json.loads(path.read_text(encoding="utf-8"))
        path = folder / INDEX
        stored = FileSystemReader(folder).read_metadata().storage_data or {}
        ends: dict[str, int] = {}
        for place in stored.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = folder / name
            if (size := path.stat().st_size) < end:
                raise ValueError(f"{size} bytes where {end} are expected")
    except (OSError, ValueError, EOFError, AttributeError, ImportError, IndexError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); {advice}") from error


def drop(directory: Path) -> None:
    """Removes a stage's checkpoints, which only a resume needs: the optimiser's state is larger than the model."""
    if (directory / CHECKPOINTS).exists():
        shutil.rmtree(directory / CHECKPOINTS)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """In the block torch's checkpoints raise what went wrong itself. (Theirs is no `Exception`, and holds that of each process.)
    Without a process group torch asks whether one process is meant, each time: it is."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    except CheckpointException as error:
        raise next(fault for fault, _ in error.failures.values()) from None
