"""A vision-language model in SDAR-VL's layout: a stock SigLIP tower, a connector of two layers, and a stock Qwen3, under the
names of tensors and classes that SDAR-VL gives them, with block attention and block decoding.

It needs no flash-attn and runs on a CPU. It is called as SDAR-VL's `generate.py` does: `model(ids, pixel_values=...,
image_sizes=..., attention_mask=[1, queries, keys] with 1 = attend, position_ids, past_key_values, use_cache, store_kv)`;
`generate` decodes by itself.

Shapes: N views of images, S side of a view in pixels, P patches, H trunk width.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from diffvl.export.remote.configuration_llava_onevision import LlavaOnevisionConfig
from diffvl.hub.connector_diffvl import fresh_newline
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration


class LlavaOnevisionMultiModalProjector(nn.Module):
    """Tower features [N, P, width] -> image tokens [N, P, H]."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features.to(self.linear_1.weight.dtype))))


class VisionTower(nn.Module):
    """The stock tower, under the name that the layout gives it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.vision_model: Any = AutoModel.from_config(config)

    @property
    def config(self) -> Any:
        return self.vision_model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.dtype

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **arguments: Any) -> Any:
        return self.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **arguments)


class LlavaOnevisionForConditionalGeneration(DiffVLForConditionalGeneration):
    """Its parts are `vision_tower`, `multi_modal_projector`, `image_newline` and `language_model`."""

    config_class: Any = LlavaOnevisionConfig

    def _make_parts(self, config: Any) -> None:
        text = config.sdar_config
        self.vision_tower = VisionTower(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(text.stock_type, **text.stock_settings()), attn_implementation=config._attn_implementation
        )
        config.text_config, config.vision_config = self.language_model.config, self.vision_tower.config
        self.multi_modal_projector = LlavaOnevisionMultiModalProjector(config.vision_config.hidden_size, text.hidden_size)
        self.image_newline = fresh_newline(text.hidden_size)

    @property
    def connector(self) -> nn.Module:
        return self.multi_modal_projector
