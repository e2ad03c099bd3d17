"""The adapters of a finished stage, as peft reads them.

Those that are merged into the weights are written beside these before, so that an export can keep them apart; their names are
those that peft looks for in the whole model. Gated ones are never merged: they and the mask row are all that a lossless stage
writes, with the place and the digest of their base; their names are those in the trunk.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from diffvl.hub.adapter_diffvl import ADAPTER_TENSORS, FOLDER, MASK_ROW_TENSORS, OF_PEFT, weights_digest
from diffvl.hub.gate_diffvl import MASK_ROW
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.store.checkpoint import ADAPTER
from diffvl.store.files import Writing, share
from diffvl.store.tensorfiles import weight_files
from diffvl.train.launch import main_only

Tensors = dict[str, torch.Tensor]


def write_adapters(model: DiffVLForConditionalGeneration, directory: Path) -> None:
    """Writes the adapters on the trunk, if there are any, as peft reads them; of a model in parts they are gathered, so all
    processes call it. Raises DiskError."""
    if not isinstance(model.trunk, PeftModel):
        return
    part = "source." if model.is_native else "language_model."
    found = get_peft_model_state_dict(model.trunk, save_embedding_layers=False)
    tensors = {
        name.replace(OF_PEFT, OF_PEFT + part, 1): _whole(tensor.detach()).cpu().contiguous().clone()
        for name, tensor in found.items()
    }
    main_only(lambda: _save(tensors, model.trunk.peft_config["default"], directory / ADAPTER))


def write_gated(model: DiffVLForConditionalGeneration, base: Path, dtype: torch.dtype, directory: Path) -> None:
    """Writes gated adapters and mask row, and says in the configuration which base they stand on. All processes call it.

    Args:
        base: the directory that the stage started from. directory: the stage's, unfinished.
    Raises:
        DiskError.
    """

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        return _whole(tensor.detach()).to("cpu", dtype).contiguous().clone()

    tensors = {
        OF_PEFT + name.replace(".default.", "."): stored(parameter)
        for name, parameter in model.trunk.named_parameters()
        if ".lora_" in name
    }
    row = {MASK_ROW: stored(model.get_parameter(MASK_ROW))}

    def save() -> None:
        _save_gated(tensors, row, model.trunk.peft_config["default"], directory / FOLDER)
        beside = base.resolve().parent == directory.resolve().parent
        place = f"../{base.name}" if beside else str(base.resolve())
        digest = weights_digest(weight_files(base))
        model.config.gated_adapter = {"base": place, "revision": None, "digest": digest}

    main_only(save)


def _save_gated(tensors: Tensors, row: Tensors, found: Any, folder: Path) -> None:
    config: Any = copy.copy(found)
    config.inference_mode, config.base_model_name_or_path = True, None
    folder.mkdir(exist_ok=True)
    with Writing(folder):
        config.save_pretrained(folder)
        save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
        save_file(row, folder / MASK_ROW_TENSORS, metadata={"format": "pt"})
        share(folder)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _save(tensors: Tensors, found: Any, folder: Path) -> None:
    config: Any = copy.copy(found)
    # By name, each: an expression for the trunk would also reach the tower.
    config.target_modules = sorted({name.removeprefix(OF_PEFT).partition(".lora_")[0] for name in tensors})
    config.inference_mode = True
    folder.mkdir(exist_ok=True)
    with Writing(folder):
        config.save_pretrained(folder)
        save_file(tensors, folder / ADAPTER_TENSORS, metadata={"format": "pt"})
        share(folder)
