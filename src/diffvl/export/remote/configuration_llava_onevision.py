"""Configuration of a vision-language model in SDAR-VL's layout: its keys, and what they mean for the model code beside it."""

import inspect
from typing import Any

from transformers import PreTrainedConfig, SiglipVisionConfig

from diffvl.export.remote.configuration_sdar import SDARConfig
from diffvl.export.remote.configuration_sdar_moe import SDARMoeConfig
from diffvl.hub.configuration_diffvl import DiffVLConfig

TEXT_CONFIGS = {config.model_type: config for config in (SDARConfig, SDARMoeConfig)}
VISION_TYPE = "siglip_vision_model"
ANYRES = "anyres_max_"
CONNECTOR = "mlp2x_gelu"


class LlavaOnevisionConfig(DiffVLConfig):
    """One checkpoint's description, under SDAR-VL's names.

    Args:
        text_config: the trunk's, an SDARConfig (dict or object). vision_config: the tower's, of SigLIP.
        image_token_index, video_token_index: tokens that show images and videos.
        image_grid_pinpoints: height and width in pixels of the canvases that an image is cut on, multiples of the tower's size.
        vision_aspect_ratio: "anyres_max_N": a grid with more tokens than N tiles have is reduced to as many.
        vision_feature_layer: index into the tower's hidden states.
    """

    model_type = "sdar_v"
    attribute_map = {"image_token_index": "image_token_id"}  # noqa: RUF012  (as transformers has it)

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        image_token_index: int = 151655,
        video_token_index: int = 151656,
        projector_hidden_act: str = "gelu",
        vision_feature_select_strategy: str = "full",
        vision_feature_layer: int = -1,
        vision_aspect_ratio: str = "anyres_max_9",
        image_grid_pinpoints: list[list[int]] | None = None,
        multimodal_projector_bias: bool = True,
        use_image_newline_parameter: bool = True,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        if (projector_hidden_act, vision_feature_select_strategy) != ("gelu", "full") or not multimodal_projector_bias:
            raise ValueError(
                "expected projector_hidden_act gelu, vision_feature_select_strategy full, and multimodal_projector_bias"
            )
        if not use_image_newline_parameter or not vision_aspect_ratio.startswith(ANYRES):
            raise ValueError(f"expected use_image_newline_parameter, and a vision_aspect_ratio of {ANYRES}N")
        text = _part(text_config, TEXT_CONFIGS, SDARConfig.model_type)
        vision = _part(vision_config, {VISION_TYPE: SiglipVisionConfig}, VISION_TYPE)
        side = vision.image_size
        pinpoints = image_grid_pinpoints or [[row * side, column * side] for row in range(1, 7) for column in range(1, 7)]
        self.sdar_config = text
        self.video_token_index = video_token_index
        self.ignore_index = ignore_index
        kwargs["tie_word_embeddings"] = False
        super().__init__(
            text_config=text,
            vision_config=vision,
            connector=CONNECTOR,
            vision_layer=vision_feature_layer,
            image_size=side,
            tiling={
                "grids": [[height // side, width // side] for height, width in pinpoints],
                "max_tiles": int(vision_aspect_ratio.removeprefix(ANYRES)),
            },
            image_token_id=image_token_index,
            mask_token_id=text.mask_token_id,
            vocabulary_size=text.vocabulary_size,
            stop_token_ids=text.stop_token_ids,
            placeholder_ids=text.placeholder_ids,
            decoding=text.decoding,
            block_size=text.block_size,
            context=text.context,
            grid=text.grid,
            target=text.target,
            **kwargs,
        )

    def to_dict(self) -> dict[str, Any]:
        """As saved: the layout's keys, not those that follow from them."""
        settings = super().to_dict()
        for name in (*FOLLOWING, "sdar_config"):
            settings.pop(name, None)
        assert self.tiling is not None
        return {
            **settings,
            "text_config": self.sdar_config.to_dict(),
            "image_token_index": self.image_token_id,
            "image_grid_pinpoints": [[side * self.image_size for side in grid] for grid in self.tiling["grids"]],
            "vision_aspect_ratio": f"{ANYRES}{self.tiling['max_tiles']}",
            "vision_feature_layer": self.vision_layer,
            **FIXED,
        }


# Settings of the model code that are read from the layout's; and what is the same in all checkpoints of the layout.
FOLLOWING = tuple(set(inspect.signature(DiffVLConfig.__init__).parameters) - {"self", "kwargs", "text_config", "vision_config"})
FIXED = {
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
    "vision_feature_select_strategy": "full",
}


def _part(config: dict[str, Any] | PreTrainedConfig | None, classes: dict[str, Any], default: str) -> Any:
    """The configuration of a part, of the class that its `model_type` names."""
    if isinstance(config, PreTrainedConfig):
        return config
    settings = dict(config or {})
    kind = settings.pop("model_type", default)
    if kind not in classes:
        raise ValueError(f"a part of the model_type {kind!r}; the code of this checkpoint knows {', '.join(classes)}")
    return classes[kind](**settings)
