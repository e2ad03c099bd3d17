"""Two random images for the tiny copy of a vision-language model, as its processor would hand them over.

Place in the flow: `vlm_checks` shows them to the copy. What a family's images look like is read off the arguments of its forward
and its configuration; the few whose format says more stand in a table.

Shapes: N images, S pixels of a side, C values of a patch.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from diffvl.doctor.tiny_vlm import IMAGE, PATCH, VQ_IMAGE

Pixels = dict[str, torch.Tensor]
GRID = [[1, 4, 12], [1, 2, 6]]  # frames, rows and columns of patches; the first image is longer than the window
NUM_PATCHES = sum(t * h * w for t, h, w in GRID)


def images_of(model: PreTrainedModel) -> Pixels:
    """Draws two images, the same in every call."""
    config: Any = model.config
    names = inspect.signature(type(model).forward).parameters
    if make := OWN_FORMATS.get(config.model_type):
        return make(config)
    if "image_grid_thw" in names:
        vision = config.vision_config
        more = {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in names else {}
        return {"pixel_values": _random(NUM_PATCHES, _values(vision)), "image_grid_thw": torch.tensor(GRID), **more}
    size = getattr(getattr(config, "vision_config", None), "image_size", IMAGE)
    size = size if isinstance(size, int) else IMAGE
    if getattr(config, "image_grid_pinpoints", None):
        # A small copy and four tiles of each; the second image is narrower than its tiles.
        shapes = torch.tensor([[size, 2 * size], [2 * size, size + 4]])
        return {"pixel_values": _random(2, 5, 3, size, size), "image_sizes": shapes}
    pixels = {"pixel_values": _random(2, 3, size, size)}
    if "pixel_attention_mask" in names:  # tiles of all images of a text, one after the other
        return {"pixel_values": pixels["pixel_values"][None]}
    if "image_sizes" in names and not hasattr(config, "vision_feature_select_strategy"):
        pixels["image_sizes"] = torch.tensor([[size, size]] * 2)
    if "pixel_mask" in names:
        pixels["pixel_mask"] = torch.ones(2, size, size, dtype=torch.bool)
    return pixels


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _values(vision: Any) -> int:
    """Counts the values of a flattened patch."""
    channels = next((value for name in ("in_channels", "in_chans", "num_channels") if (value := getattr(vision, name, None))), 3)
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
    return channels * frames * vision.patch_size**2


def _square_patches(config: Any) -> Pixels:
    """Patches that are not flattened."""
    side = config.vision_config.patch_size
    return {"pixel_values": _random(NUM_PATCHES, 3, side, side), "image_grid_thw": torch.tensor(GRID)}


def _placed_patches(config: Any) -> Pixels:
    """Patches with their places, of Gemma 4, and as many for each image. It averages squares of them; or takes such squares."""
    vision = config.vision_config
    pooled, values = vision.pooling_kernel_size, 3 * vision.patch_size**2
    side, values = (4, values * pooled**2) if config.model_type == "gemma4_unified" else (4 * pooled, values)
    places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
    return {"pixel_values": _random(2, side * side, values).sigmoid(), "image_position_ids": places.repeat(2, 1, 1)}


def _pooled_patches(config: Any) -> Pixels:
    """Patches, and which four of them become a token: of Molmo 2."""
    place = torch.arange(16).view(4, 4)
    pools = torch.stack([place[row : row + 2, column : column + 2].flatten() for row in (0, 2) for column in (0, 2)])
    return {
        "pixel_values": _random(2, 16, 3 * PATCH**2),
        "image_token_pooling": torch.cat([pools, pools + 16]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * 2),
        "image_num_crops": torch.tensor([1, 1]),
    }


def _two_towers(config: Any) -> Pixels:
    side = config.high_res_vision_config.image_size
    return {"pixel_values": _random(2, 3, IMAGE, IMAGE), "high_res_pixel_values": _random(2, 3, side, side)}


OWN_FORMATS: dict[str, Callable[[Any], Pixels]] = {
    "chameleon": lambda config: {"pixel_values": _random(2, 3, VQ_IMAGE, VQ_IMAGE)},
    "emu3": lambda config: {
        "pixel_values": _random(2, 3, VQ_IMAGE, VQ_IMAGE),
        "image_sizes": torch.tensor([[VQ_IMAGE, VQ_IMAGE]] * 2),
    },
    "deepseek_vl_hybrid": _two_towers,
    "fuyu": lambda config: {"pixel_values": _random(1, 14, 3 * config.patch_size**2)},
    **dict.fromkeys(("gemma4", "gemma4_unified"), _placed_patches),
    # A tile is an image of its own there, and a flag says which of them are to be read twice.
    "granite_docling": lambda config: {
        "pixel_values": _random(1, 2, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool),
    },
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _square_patches),
    "molmo2": _pooled_patches,
    "perception_lm": lambda config: {"pixel_values": _random(2, 1, 3, IMAGE, IMAGE)},
}
