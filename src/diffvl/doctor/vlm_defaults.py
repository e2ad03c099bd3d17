"""What the default configurations of vision-language types leave open although the class needs it, or leave out although the
type's checkpoints have it."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig


def _rotary(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(sections)} | more


_GLM = {"text_config": {"rope_parameters": _rotary(8, 12, 12, partial_rotary_factor=0.5)}}
_COHERE = {
    "model_type": "cohere_compass_text",
    "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _rotary(16, 24, 24)),
}
_PERCEPTION = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "model_args": {"embed_dim": 1024}}
COMPLETIONS: dict[str, dict[str, Any]] = {
    # In checkpoints the map names every token of the vocabulary that stands for a part of an image.
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "emu3": {"vocabulary_map": {"<image>": 151859}},
    "cohere_compass": {"text_config": _COHERE},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 11, "num_experts_per_tok": 6, "n_routed_experts": 64}
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _rotary(22, 22, 20)}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision"}},
    **dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga"), _GLM),
    "granite4_vision": {"deepstack_layer_map": [[-2, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl": {"text_config": {"rope_parameters": _rotary(16, 16, 16, 16)}},
    "lfm2_vl": {"text_config": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 16}},
    "minimax_m3_vl": {"text_config": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 30}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _rotary(16, 24, 24)}},
    "perception_lm": {"vision_config": _PERCEPTION},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), {"text_config": {"rope_parameters": _rotary(16, 24, 24)}}),
    "step3p7": {"text_config": {"sliding_window": 512}},
}


def default_vlm_config(model_type: str) -> PretrainedConfig:
    """Gives the default configuration, completed."""
    return CONFIG_MAPPING[model_type](**COMPLETIONS.get(model_type, {}))
