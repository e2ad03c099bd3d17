"""Configuration of a DiffVL model: the stock parts that it is made of, and what block diffusion adds.

There are two kinds. One has a stock text trunk and a stock vision tower, joined by a connector of ours. The other has a whole
stock vision-language model (`source_config`) with its own vision part, placeholders and position ids.

Everything the decoder must share with training stands here: block size, context, grid, target, mask token,
and what is never predicted.
"""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from .layout_diffvl import IMAGE_ATTENTION
from .tiling_diffvl import TILED_INPUTS, Tiling

CHOICES = {
    "decoding": ("blocks", "ar"),
    "context": ("block", "causal"),
    "grid": ("absolute", "response"),
    "target": ("same", "shift"),
    "image_attention": IMAGE_ATTENTION,
    "token_types": ("images", "answers"),
    "masks_at": ("forward", "text_part"),
}


class DiffVLConfig(PreTrainedConfig):
    """One checkpoint's description.

    Args:
        source_config: configuration of a whole stock vision-language model (dict or object). The settings of tower and connector
            then have no meaning, and `text_config` is the one inside it.
        text_config: configuration of the trunk, any stock causal LM (dict or object).
        vision_config: configuration of the tower, any stock vision model with patch tokens.
        connector: "mlp2x_gelu", "linear" or "pixel_shuffle".
        shuffle_factor: patches per side that pixel_shuffle joins; 1 for the other connectors.
        vision_layer: index into the tower's hidden states.
        image_size: pixels per side of the square image that the tower sees.
        tiling: how images are cut into several such squares, `{"grids": [[rows, columns], ...], "max_tiles": ...}` (see
            `tiling_diffvl`), or None: one square an image.
        image_token_id, mask_token_id: rows of the trunk's embedding.
        image_inputs: names of the tensors that say what the images are, as `forward` and `generate` take them.
        video_token_id, video_inputs: the same of videos, where the model has a token of its own for them.
        image_attention: how clean image tokens see each other, one of IMAGE_ATTENTION.
        token_types: what the token types mark that a source's forward takes, "images" or "answers".
        masks_at: where the source takes a mask for each kind of its layers: its "forward", or only its "text_part".
        first_position: rotary position of the first token, for a trunk that counts its tokens.
        placeholder_ids: further ids that stand for something else than text, and are never predicted.
        vocabulary_size: tokens of the tokenizer; rows beyond are padding and never predicted.
        stop_token_ids: ids that end an answer.
        decoding: "blocks", or "ar" for a model that has only seen the next-token objective.
        block_size: tokens of a block. context: how clean tokens see each other, "block" (their whole block and all before it) or
            "causal". grid: where blocks begin, "absolute" (at multiples of the size from token 0) or "response" (at the start of
            every answer). target: which token a position predicts, its own ("same") or the next ("shift").
        gated_adapter: of a lossless conversion, else None: the weights are its parent's, and adapters that act on noisy tokens
            only lie beside them (see `gate_diffvl`). `block_size` is then the longest draft.
    """

    model_type = "diffvl"
    sub_configs = {  # pyright: ignore[reportAssignmentType]
        "source_config": AutoConfig,
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
    }

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        source_config: dict[str, Any] | PreTrainedConfig | None = None,
        connector: str = "mlp2x_gelu",
        shuffle_factor: int = 1,
        vision_layer: int = -2,
        image_size: int = 224,
        tiling: dict[str, Any] | None = None,
        image_token_id: int = 0,
        mask_token_id: int = 0,
        vocabulary_size: int = 0,
        stop_token_ids: list[int] | None = None,
        image_inputs: list[str] | None = None,
        video_token_id: int | None = None,
        video_inputs: list[str] | None = None,
        image_attention: str = "causal",
        token_types: str = "images",
        masks_at: str = "forward",
        first_position: int = 0,
        placeholder_ids: list[int] | None = None,
        decoding: str = "ar",
        block_size: int = 1,
        context: str = "causal",
        grid: str = "response",
        target: str = "shift",
        gated_adapter: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.source_config = _sub_config(source_config)
        self.text_config = _sub_config(text_config)
        if self.source_config is not None:
            self.text_config = self.source_config.get_text_config(decoder=True)
        self.vision_config = _sub_config(vision_config)
        self.connector = connector
        self.shuffle_factor = shuffle_factor
        self.vision_layer = vision_layer
        self.image_size = image_size
        self.tiling = tiling
        self.image_token_id = image_token_id
        self.mask_token_id = mask_token_id
        self.vocabulary_size = vocabulary_size
        self.stop_token_ids = list(stop_token_ids or [])
        self.image_inputs = list(image_inputs or (["pixel_values"] if tiling is None else TILED_INPUTS))
        self.video_token_id = video_token_id
        self.video_inputs = list(video_inputs or [])
        self.image_attention = image_attention
        self.token_types = token_types
        self.masks_at = masks_at
        self.first_position = first_position
        self.placeholder_ids = list(placeholder_ids or [])
        self.decoding = decoding
        self.block_size = block_size
        self.context = context
        self.grid = grid
        self.target = target
        self.gated_adapter = gated_adapter
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.text_config is not None:
            # Engines look for these two beside the text settings.
            self.text_config.mask_token_id = mask_token_id
            self.text_config.block_size = block_size
        super().__init__(**kwargs)

    def set_decoding(self, decoding: str, block_size: int, context: str, grid: str, target: str) -> None:
        """Records how the weights were trained, here and in the text configuration."""
        self.decoding, self.block_size, self.context, self.grid, self.target = decoding, block_size, context, grid, target
        self.text_config.block_size = block_size

    def set_tiling(self, tiling: dict[str, Any] | None) -> None:
        """Records how images are cut, and by which tensors they come."""
        self.tiling = tiling
        self.image_inputs = ["pixel_values"] if tiling is None else list(TILED_INPUTS)

    def to_dict(self) -> dict[str, Any]:
        """As saved: the text configuration inside a source's is not written twice, and nothing of tiles that are not cut and of
        adapters that are not there."""
        settings = super().to_dict()
        for name in ("tiling", "gated_adapter"):
            if getattr(self, name) is None:
                settings.pop(name, None)
        if self.source_config is not None:
            settings.pop("text_config", None)
        if self.video_token_id is None:
            settings = {name: value for name, value in settings.items() if name not in ("video_token_id", "video_inputs")}
        return settings

    @property
    def image_tokens(self) -> int:
        """Tokens that one view of an image takes in the text, for a tower of ours: the whole image where it is not tiled."""
        return self._side**2

    @property
    def tiles(self) -> Tiling | None:
        """How images are cut; None where they are not, and for a native model, which does that itself."""
        return None if self.tiling is None else Tiling.of(self.tiling, self._side, self.image_size)

    @property
    def _side(self) -> int:
        return self.image_size // self.vision_config.patch_size // self.shuffle_factor


def never_predicted(config: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [V]: the mask token, the image token, other placeholders and the table's padding rows."""
    forbidden = torch.arange(vocabulary, device=device) >= config.vocabulary_size
    forbidden[[config.mask_token_id, config.image_token_id, *config.placeholder_ids]] = True
    return forbidden


def _sub_config(config: dict[str, Any] | PreTrainedConfig | None) -> Any:
    """A dict as saved in config.json -> the stock configuration class it names."""
    if isinstance(config, dict):
        settings = dict(config)
        if "model_type" not in settings:
            raise ValueError("a part of the configuration (text_config, vision_config, source_config) names no model_type")
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config
