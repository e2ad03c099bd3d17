"""The models with random weights that are measured: their sizes on each kind of device, and how they are built.

Weights change no shape and no time.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from diffvl.errors import UsageError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration

STOP_TOKEN = 0
NUM_SPECIAL = 2  # the vocabulary's last ids: the image token and the mask token, which no text holds


@dataclass(frozen=True)
class TrunkSize:
    """A llama-like trunk with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device: the trunk, the trunk of the scaling part, its dtype, timed rounds."""

    trunk: TrunkSize
    scaling_trunk: TrunkSize
    dtype: torch.dtype
    rounds: int


# The widths of SmolLM2-135M, with as many of its 30 layers as two cores do in the time.
_CPU_TRUNK = TrunkSize(hidden=576, layers=3, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152)
_CPU_SCALING = TrunkSize(hidden=192, layers=2, heads=3, kv_heads=1, intermediate=512, vocabulary=4096)
# The shape of Qwen2.5-1.5B, whole.
_CUDA_TRUNK = TrunkSize(hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, vocabulary=151936)
_CUDA_SCALING = TrunkSize(hidden=1536, layers=8, heads=12, kv_heads=2, intermediate=8960, vocabulary=4096)
_QUICK_TRUNK = TrunkSize(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=512)

SCALES = {
    "cpu": Scale(_CPU_TRUNK, _CPU_SCALING, torch.float32, rounds=3),
    "cuda": Scale(_CUDA_TRUNK, _CUDA_SCALING, torch.bfloat16, rounds=10),
}
QUICK_SCALE = Scale(_QUICK_TRUNK, _QUICK_TRUNK, torch.float32, rounds=1)


def resize(size: TrunkSize, layers: int | None, hidden: int | None) -> TrunkSize:
    """Changes the layers or the width; the width of a head, the groups of heads and the MLP's ratio stay.

    Raises:
        UsageError: if the width is not made of whole heads and groups.
    """
    if layers is not None:
        size = replace(size, layers=layers)
    if hidden is None:
        return size
    unit = size.head_dim * (size.heads // size.kv_heads)
    if hidden < unit or hidden % unit:
        raise UsageError(f"--hidden {hidden}: expected a multiple of {unit} (heads of {size.head_dim} in groups)")
    heads = hidden // size.head_dim
    return replace(
        size,
        hidden=hidden,
        heads=heads,
        kv_heads=heads * size.kv_heads // size.heads,
        intermediate=size.intermediate * hidden // size.hidden,
    )


def build_model(size: TrunkSize, device: torch.device, dtype: torch.dtype, seed: int, std: float = 0.02) -> Any:
    """Builds a DiffVL model with random weights, in training mode; `std` is that of its linear layers.

    Its vision tower is as small as one can be and never runs, because no sample has an image.
    """
    text = {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "initializer_range": std,
        "bos_token_id": STOP_TOKEN,
        "eos_token_id": STOP_TOKEN,
        "attn_implementation": "sdpa",
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 8,
    }
    config = DiffVLConfig(
        text_config=text,
        vision_config=vision,
        image_size=8,
        image_token_id=size.vocabulary - 2,
        mask_token_id=size.vocabulary - 1,
        vocabulary_size=size.vocabulary,
        stop_token_ids=[STOP_TOKEN],
    )
    # Forked, so that the random state of the process stays; on CUDA the weights are drawn where they will be used.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = DiffVLForConditionalGeneration(config)
    for parameter in model.parameters():
        # Parameters only: the rotary frequencies are buffers and stay in fp32, as in a loaded checkpoint.
        parameter.data = parameter.data.to(dtype)
    return model.train()
