"""Images and conversations -> tensors in SDAR-VL's layout, as the model was trained on them.

The files beside it also fit transformers' own LlavaOnevisionProcessor, which needs torchvision; this one does not.
"""

from typing import Any

from diffvl.hub.processing_diffvl import DiffVLProcessor

ANYRES = "anyres_max_"


class LlavaOnevisionProcessor(DiffVLProcessor):
    """The processor under the layout's names.

    Args:
        num_image_tokens: tokens of one view of an image. vision_aspect_ratio: "anyres_max_N".
        image_token: what stands in the text for a row of an image. video_token: not used; the layout names it.
        stop_token, system_turn: see `DiffVLProcessor`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 729,
        vision_feature_select_strategy: str = "full",
        vision_aspect_ratio: str = "anyres_max_9",
        image_token: str = "<|image_pad|>",
        video_token: str = "<|video_pad|>",
        stop_token: str = "<|im_end|>",
        system_turn: str = "template",
        chat_template: str | None = None,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_aspect_ratio = vision_aspect_ratio
        side = image_processor.size["height"]
        grids = [[height // side, width // side] for height, width in image_processor.image_grid_pinpoints]
        super().__init__(
            image_processor,
            tokenizer,
            image_token=image_token,
            image_tokens=num_image_tokens,
            stop_token=stop_token,
            chat_template=chat_template,
            system_turn=system_turn,
            tiling={"grids": grids, "max_tiles": int(vision_aspect_ratio.removeprefix(ANYRES))},
        )
