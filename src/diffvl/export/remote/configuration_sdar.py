"""Configuration of a language model in SDAR's layout: Qwen3's settings, and what block diffusion adds.

Serving engines load this file alone, under other releases of transformers than the model's code needs, so it uses nothing but
`PretrainedConfig`, and keeps `rope_theta` as an attribute: an engine that finds none takes another base for the rotation.
"""

from typing import Any

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """One checkpoint's description. Settings of the trunk have Qwen3's names.

    Args:
        block_size: tokens of a block; blocks begin at its multiples. mask_token_id: the token that stands for "not known yet".
        image_token_id, placeholder_ids: tokens that are never predicted besides the mask token.
        vocabulary_size: tokens of the tokenizer; rows of the table beyond are never predicted. Default: all rows.
        stop_token_ids: tokens that end an answer.
    """

    model_type = "sdar"
    stock_type = "qwen3"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  (as transformers has it)

    # How the weights are read: a position predicts its own token, blocks count from the first token of the prompt, and every
    # token sees its whole block.
    decoding, context, grid, target = "blocks", "block", "absolute", "same"
    image_inputs: tuple[str, ...] = ()

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 12288,
        num_hidden_layers: int = 36,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1000000.0,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_sliding_window: bool = False,
        sliding_window: int | None = None,
        max_window_layers: int | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        block_size: int = 4,
        mask_token_id: int = 151669,
        image_token_id: int | None = None,
        placeholder_ids: list[int] | None = None,
        vocabulary_size: int | None = None,
        stop_token_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.use_sliding_window = use_sliding_window
        self.sliding_window = sliding_window if use_sliding_window else None
        self.max_window_layers = num_hidden_layers if max_window_layers is None else max_window_layers
        self.use_cache = use_cache
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.image_token_id = mask_token_id if image_token_id is None else image_token_id
        self.placeholder_ids = list(placeholder_ids or [])
        self.vocabulary_size = vocab_size if vocabulary_size is None else vocabulary_size
        self.stop_token_ids = list(stop_token_ids or [])
        if kwargs.pop("rope_scaling", None) not in (None, {}):
            raise ValueError("rope_scaling is not in this layout")
        kwargs.pop("rope_parameters", None)  # written again by some releases; it says what rope_theta says
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}

    def stock_settings(self) -> dict[str, Any]:
        """The settings of the stock language model that this is."""
        settings = {name: getattr(self, name) for name in STOCK_SETTINGS}
        return {**settings, "rope_parameters": dict(self.rope_parameters)}

    def to_dict(self) -> dict[str, Any]:
        """As saved: without what the model puts beside its settings."""
        settings = super().to_dict()
        for name in ("text_config", "rope_parameters"):
            settings.pop(name, None)
        return settings


STOCK_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_bias"),
    *("attention_dropout", "use_sliding_window", "sliding_window", "max_window_layers", "use_cache", "tie_word_embeddings"),
)
