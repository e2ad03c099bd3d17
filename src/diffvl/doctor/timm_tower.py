"""A stand-in for vision towers from the library timm, which a tiny copy does without.

Place in the flow: `tiny_vlm` builds a copy inside `stand_in_towers`. What such a copy proves is the language half and how it
takes images; the tower's own weights and sizes are timm's affair.

Shapes: N images, C width, h x w patches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

TIMM_TYPES = ("timm_wrapper", "gemma3n_vision")
PATCH = 14


class StandInTower(PreTrainedModel):
    """Patches through one projection: [N, C, h, w] like a convolutional tower, or [N, 1 + h * w, C] like a transformer."""

    config_class = PretrainedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.is_transformer = config.architecture.startswith("vit_")
        width = (config.model_args or {}).get("embed_dim") or config.hidden_size
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, pixel_values: torch.Tensor, **ignored: Any) -> BaseModelOutputWithPooling:
        states = self.patches(pixel_values)
        if self.is_transformer:
            states = states.flatten(2).transpose(1, 2)
            states = torch.cat([states.mean(1, keepdim=True), states], 1)
        return BaseModelOutputWithPooling(last_hidden_state=states)


@contextmanager
def stand_in_towers() -> Iterator[None]:
    """In the block AutoModel builds a stand-in for a tower from timm."""
    known: dict[Any, Any] = AutoModel._model_mapping._extra_content  # pyright: ignore[reportAttributeAccessIssue]
    added = [CONFIG_MAPPING[name] for name in TIMM_TYPES]
    known.update(dict.fromkeys(added, StandInTower))
    try:
        yield
    finally:
        for config_class in added:
            known.pop(config_class)


def has_timm_tower(config: PretrainedConfig) -> bool:
    """Tells whether images go through a tower from timm."""
    return getattr(getattr(config, "vision_config", None), "model_type", None) in TIMM_TYPES
