"""Whether and how images are cut into tiles, put into a processor: at preparation, and where a stage has another tiling.

Tiles are cut by transformers' own image processor of LLaVA-OneVision, with the sizes, the resampling and the colours of the
tower's own. Invariant: the view of the whole image has the pixels that the tower's own processor gives it.
"""

from typing import Any

import torch
from PIL import Image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from diffvl.config.recipe import Stage
from diffvl.errors import ConfigError, UnsupportedModelError
from diffvl.hub.processing_diffvl import DiffVLProcessor

_KEPT = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


def with_tiling(processor: DiffVLProcessor, tiling: dict[str, Any] | None) -> DiffVLProcessor:
    """Gives the processor that cuts images like this (see `DiffVLConfig.tiling`) and is otherwise the same.

    Raises:
        UnsupportedModelError: if the tower's own image processor does more than tiles get.
    """
    if tiling == processor.tiling:
        return processor
    images = processor.image_processor
    other = _square(images) if tiling is None else _tiled(images, tiling["grids"])
    _require_same_view(images, other)
    return DiffVLProcessor(
        other,
        processor.tokenizer,
        image_token=processor.image_token,
        image_tokens=processor.image_tokens,
        stop_token=processor.stop_token,
        system_turn=processor.system_turn,
        tiling=tiling,
    )


def processor_of_stage(processor: DiffVLProcessor, stage: Stage) -> DiffVLProcessor:
    """Gives the processor of a stage that goes on from a checkpoint with this one.

    Raises:
        ConfigError: if the stage's tiling has no effect on this model, or nothing would train the newline that it adds.
        UnsupportedModelError: see `with_tiling`.
    """
    if stage.tiling is None:
        return processor
    if processor.source is not None:
        raise ConfigError("tiling has no effect: this vision-language model cuts images by its own processor; leave it out")
    tiling = stage.tiling.settings
    if tiling is not None and processor.tiling is None and "connector" not in stage.trainable:
        raise ConfigError(
            "tiling adds a newline to the connector, and trainable has no connector, so nothing would train it: add connector "
            "to trainable, or set tiling in an earlier stage"
        )
    return with_tiling(processor, tiling)


def _square(images: Any) -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size=_side(images), do_resize=True, do_convert_rgb=True, **_kept(images))


def _tiled(images: Any, grids: list[list[int]]) -> LlavaOnevisionImageProcessorPil:
    size = _side(images)
    canvases = [[rows * size["height"], columns * size["width"]] for rows, columns in grids]
    return LlavaOnevisionImageProcessorPil(
        size=size, image_grid_pinpoints=canvases, do_resize=True, do_pad=True, do_convert_rgb=True, **_kept(images)
    )


def _side(images: Any) -> dict[str, int]:
    return {"height": images.size["height"], "width": images.size["width"]}


def _kept(images: Any) -> dict[str, Any]:
    kept = {name: getattr(images, name) for name in _KEPT}
    for name, neutral in (("image_mean", 0.5), ("image_std", 1.0)):  # the mean is also what fills squares up
        value = neutral if kept[name] is None else kept[name]
        kept[name] = list(value) if isinstance(value, list | tuple) else [value] * 3
    return kept


def _require_same_view(first: Any, second: Any) -> None:
    """Raises UnsupportedModelError unless both see a whole image alike."""
    bands = [Image.radial_gradient("L"), Image.linear_gradient("L"), Image.linear_gradient("L").rotate(90)]
    image = Image.merge("RGB", bands).crop((0, 0, 200, 120))
    views = [images(images=[image], return_tensors="pt")["pixel_values"].flatten(0, -4)[0] for images in (first, second)]
    if not torch.equal(*views):
        raise UnsupportedModelError(
            f"{type(first).__name__}: this image processor does more than to resize an image, rescale and normalise it, and "
            "tiles would not get that: leave tiling out, or take another vision tower"
        )
