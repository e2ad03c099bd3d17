"""Images in tiles: what each is in the text, which follows from its size, and in pixels.

Pixels come from an image processor of transformers, that of LLaVA-OneVision with Pillow; how it cuts is said in `tiling_diffvl`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .chat_diffvl import ImageText
from .clips_diffvl import ClipSize, Sampler
from .messages_diffvl import Placeholders
from .seen_diffvl import Size
from .template_diffvl import Visual
from .tiling_diffvl import NUM_TILES, Tiling

MAX_SIZES = 16_384  # remembered


class TiledImages:
    """Images through an image processor that cuts tiles.

    Args:
        image_token, image_id: what stands in the text for a row of an image.
    """

    structured = False
    sampler: Sampler | None = None  # no videos
    first_ids: list[int] = []
    first_text = ""
    tokens: frozenset[str] = frozenset()

    def __init__(self, processor: Any, tiling: Tiling, image_token: str, image_id: int) -> None:
        self.processor, self.tiling, self.image_token, self.image_id = processor, tiling, image_token, image_id
        self.placeholders: Placeholders = {Visual.IMAGE: image_token}
        self._by_size: dict[tuple[Size, bool], int] = {}

    def of(self, size: Size | ClipSize, alone: bool = True) -> ImageText:
        """What an image of this height and width is in the text. alone: whether it is the only one of its question."""
        assert not isinstance(size, ClipSize)
        if (size, alone) not in self._by_size:
            if len(self._by_size) >= MAX_SIZES:
                self._by_size.clear()
            self._by_size[size, alone] = self.tiling.tokens(size, alone)
        count = self._by_size[size, alone]
        return ImageText(self.image_token * count, [self.image_id] * count)

    def in_place(self, images: list[ImageText], following: list[str]) -> list[ImageText]:
        """Nothing is written beside an image."""
        return images

    def pixels(self, images: Sequence[Any], alone: Sequence[bool]) -> list[dict[str, torch.Tensor]]:
        """The pixel tensors of each image. alone: see `of`, for each."""
        squares = iter(self._squares([image for image, is_alone in zip(images, alone, strict=True) if not is_alone]))
        return [
            self._parts(self.processor(images=[image], return_tensors="pt"), 0) if is_alone else next(squares)
            for image, is_alone in zip(images, alone, strict=True)
        ]

    def _squares(self, images: list[Any]) -> list[dict[str, torch.Tensor]]:
        """Images that are one view each. The processor makes these of a list of several; of a list of one it makes tiles."""
        if not images:
            return []
        inputs = self.processor(images=[images if len(images) > 1 else images * 2], return_tensors="pt")
        return [self._parts(inputs, number) for number in range(len(images))]

    def _parts(self, inputs: Any, number: int) -> dict[str, torch.Tensor]:
        views, size = inputs["pixel_values"][number : number + 1], inputs["image_sizes"][number : number + 1]
        return {"pixel_values": views, "image_sizes": size, NUM_TILES: torch.tensor([views.shape[1]])}
