"""The adapters of a finished stage, written beside its weights before they are merged into them, so that an export can keep them
apart. Names are those that peft looks for in the whole model, not in the trunk alone.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.store.checkpoint import ADAPTER
from diffvl.store.files import Writing, share
from diffvl.train.launch import main_only

OF_PEFT = "base_model.model."  # peft's beginning of every name in an adapter's file


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


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _save(tensors: dict[str, torch.Tensor], found: Any, folder: Path) -> None:
    config: Any = copy.copy(found)
    # By name, each: an expression for the trunk would also reach the tower.
    config.target_modules = sorted({name.removeprefix(OF_PEFT).partition(".lora_")[0] for name in tensors})
    config.inference_mode = True
    folder.mkdir(exist_ok=True)
    with Writing(folder):
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        share(folder)
