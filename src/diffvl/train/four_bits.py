"""A trunk in 4 bits under adapters (QLoRA), through bitsandbytes: a 7B model then trains on one card of 24 GB.

Place in the flow: `stage.train` loads the model through here where `lora.bits` asks for it. Only the linear layers inside the
decoder's layers are in 4 bits; tables, head, vision tower, connector and mask row stay as they were. What is written at the end
is not made of 4-bit weights: the adapters are merged into the weights that the stage started from.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from diffvl.config.recipe import Stage
from diffvl.errors import ConfigError
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.store import checkpoint
from diffvl.train.launch import process_state
from diffvl.train.sharding import decoder_layers

PACKAGE = "bitsandbytes"


def is_in_four_bits(stage: Stage) -> bool:
    return stage.lora is not None and stage.lora.bits == 4


def require_four_bits(stage: Stage) -> None:
    """Raises ConfigError where a stage asks for 4 bits and this machine has no GPU or no bitsandbytes for it, or the model is to
    be sharded, which packed weights do not allow."""
    if not is_in_four_bits(stage):
        return
    if stage.sharding in ("full", "full_bf16"):
        raise ConfigError(
            f"lora.bits: 4 does not go with sharding: {stage.sharding}: packed weights cannot be cut, every process holds all of "
            "them. Leave it at auto"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "lora.bits: 4 needs a GPU with CUDA, and there is none here: leave bits out, and the trunk keeps its files' dtype"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(f"lora.bits: 4 needs the package {PACKAGE}: pip install {PACKAGE}, or leave bits out")


def load_in_four_bits(start: Path) -> DiffVLForConditionalGeneration:
    """Loads a DiffVL directory with its trunk's layers in 4 bits (NF4), onto this process's device."""
    device: Any = process_state().device
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=_others(start),
    )
    model = checkpoint.load_model(start, quantization_config=quantization, device_map={"": device})
    model.trunk.is_loaded_in_4bit = True  # by which peft knows that its layers are packed
    return model


def _others(start: Path) -> list[str]:
    """Names of the linear layers that are not inside the decoder's layers."""
    config, _ = checkpoint.load_description(start)
    with torch.device("meta"):
        empty = DiffVLForConditionalGeneration(config)
    inside = {id(module) for layer in decoder_layers(empty) for module in layer.modules()}
    return [name for name, module in empty.named_modules() if isinstance(module, nn.Linear) and id(module) not in inside]


@torch.no_grad()
def take_over(trained: DiffVLForConditionalGeneration, plain: DiffVLForConditionalGeneration) -> None:
    """Gives a model that is fitted to the same stage, with weights as its files hold them, what the one in 4 bits has learnt."""
    places: dict[str, Any] = dict(plain.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            places[name].data = parameter.detach().to("cpu", copy=True)
