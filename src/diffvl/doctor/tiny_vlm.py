"""The configuration of a vision-language model of any size -> a tiny random copy that sees real pixels.

Place in the flow: as `tiny_copy`, whose rules shrink the language half; what stands here is the other half. Kept is how images
become tokens: the kind of tower and connector, pixel shuffle, tiles and newlines, features for several layers, a second tower.
Invariant: the copy's tokens for images have ids of their own, which no text of a probe contains.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from diffvl.doctor.timm_tower import stand_in_towers
from diffvl.doctor.tiny_copy import (
    FIRST_ORDINARY,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    NUM_EXPERTS,
    NUM_HEADS,
    ROPE,
    build_with,
    shrink_settings,
)

IMAGE, PATCH = 56, 14  # pixels: 4 x 4 patches
LAYERS = 2
# What a tower that can be a backbone says of its layers: it follows from their number.
BACKBONE = {"stage_names", "out_features", "out_indices"}
VISION_PART = re.compile("vision|vit|qformer|projector_config|perceiver|adapter_config|resampler|vq_config|audio")
# Setting of a vision part -> tiny value, where the setting is a number.
SIZES = {
    name: value
    for names, value in {
        "depth num_hidden_layers layers num_global_layers": LAYERS,
        "num_heads num_attention_heads num_key_value_heads attention_heads": NUM_HEADS,
        "embed_dim hidden_size encoder_hidden_size projector_hidden_size adapter_in_dim mm_embed_dim": HIDDEN,
        # These are widths of the language half.
        "out_hidden_size projection_dim vision_output_dim text_hidden_size adapter_out_dim": HIDDEN,
        "projector_input_dim projector_output_dim output_proj_dims": HIDDEN,
        "intermediate_size mlp_dim": INTERMEDIATE,
        "moe_intermediate_size output_channels": HIDDEN // 2,
        "head_dim": HEAD_DIM,
        "num_local_experts num_experts": NUM_EXPERTS // 2,
        "num_position_embeddings": 64,
        "image_size": IMAGE,
        "patch_size": PATCH,
    }.items()
    for name in names.split()
}
# Lists of layers, whose number is LAYERS here.
LAYER_LISTS = {"fullatt_block_indexes": [1], "global_attn_indexes": [1], "deepstack_visual_indexes": [0, 1]}
NOT_KEPT = {"per_layer_config", "layer_types", "dtype", "torch_dtype", "transformers_version"}
MODALITY_IDS = re.compile(r".*(_token_id|_token_index|_patch_id|_start_id|_end_id|newline_id)")
TEXT_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIRST_MODALITY = 3
VQ_FIRST, VQ_IMAGE = 100, 32  # where images become ids of the vocabulary: the first such id, and pixels of a side


def shrink_vlm(config: PretrainedConfig) -> PretrainedConfig:
    """Makes the configuration of the tiny copy, of the same class; `config` is left as it is."""
    settings = config.to_dict()
    vision = {name: value for name, value in settings.items() if isinstance(value, dict) and VISION_PART.search(name)}
    tiny = shrink_settings({name: value for name, value in settings.items() if name not in vision})
    tiny |= {name: _shrink_vision(part) for name, part in vision.items()}
    tiny |= {name: _within_layers(value) for name, value in tiny.items() if name.startswith("vision_feature_layer")}
    _number_tokens(tiny)
    FITTINGS.get(config.model_type, _as_it_is)(tiny)
    return type(config).from_dict(tiny)


def _shrink_vision(settings: dict[str, Any]) -> dict[str, Any]:
    """Shrinks one level of a part that sees or hears."""
    tiny: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NOT_KEPT or name.lstrip("_") in BACKBONE:
            continue
        if name in LAYER_LISTS and value:
            tiny[name] = LAYER_LISTS[name]
        elif name in SIZES and isinstance(value, int | float) and not isinstance(value, bool):
            tiny[name] = SIZES[name]
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
            tiny[name] = [SIZES[name]] * len(value)
        elif isinstance(value, dict) and name not in ("id2label", "label2id", *ROPE):
            tiny[name] = _shrink_vision(value)
        else:
            tiny[name] = value
    return tiny


def _within_layers(value: Any) -> Any:
    """Names a layer that the tower still has, or several."""
    if isinstance(value, list | tuple):
        return [_within_layers(layer) for layer in value]
    return max(-LAYERS, min(value, LAYERS)) if isinstance(value, int) else value


def _number_tokens(tiny: dict[str, Any]) -> None:
    """Gives every token that belongs to images an id of its own; special tokens of the text keep to theirs."""
    following = FIRST_MODALITY
    for name, value in tiny.items():
        if name in TEXT_IDS:
            tiny[name] = TEXT_IDS[name] if isinstance(value, int) else value
        elif isinstance(value, int) and not isinstance(value, bool) and MODALITY_IDS.fullmatch(name):
            tiny[name] = following
            following += 1
    if isinstance(tiny.get("visual_indicator_token_ids"), list):  # of Ovis
        tiny["visual_indicator_token_ids"] = list(range(following, following + len(tiny["visual_indicator_token_ids"])))
        following += len(tiny["visual_indicator_token_ids"])
    assert following <= FIRST_ORDINARY, f"{following} ids of image tokens"
    if isinstance(tiny.get("text_config"), dict):
        tiny["text_config"] |= {name: id_ for name, id_ in TEXT_IDS.items() if tiny["text_config"].get(name) is not None}


def build_vlm(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Builds the tiny random copy of what `config` describes; as `tiny_copy.build`."""
    with stand_in_towers():
        return build_with(AutoModelForImageTextToText, shrink_vlm(config), seed)


# --- what fits together in single types ------------------------------------------------------------------------------------


def _as_it_is(tiny: dict[str, Any]) -> None:
    pass


def _tiles(tiny: dict[str, Any]) -> None:
    tiny["image_grid_pinpoints"] = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]


def _granite4(tiny: dict[str, Any]) -> None:
    """Rows go into several layers, which are named by number; four projectors look at a quarter of the patches each."""
    _tiles(tiny)
    tiny |= {"deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [1, 1, 1, 1], "downsample_rate": "1/2"}
    tiny["vision_config"]["patch_size"] = PATCH


def _granite_docling(tiny: dict[str, Any]) -> None:
    tiny["vision_config"] |= {"scale_factor": 2, "use_fine_route": False}


def _sam(settings: dict[str, Any]) -> None:
    """A tower for high resolution, which reduces a side by 16 for its patches, and by 4 more after them."""
    settings |= {"image_size": 128, "patch_size": 16, "window_size": 4, "output_channels": 32}


def _deepseek_ocr(tiny: dict[str, Any]) -> None:
    vision = tiny["vision_config"]
    _sam(vision["sam_config"])
    vision["sam_config"]["downsample_channels"] = [48, HIDDEN]


def _gemma3n(tiny: dict[str, Any]) -> None:
    tiny["vision_soft_tokens_per_image"] = 16
    tiny["text_config"]["vocab_size_per_layer_input"] = 130
    tiny["vision_config"] |= {"vocab_offset": 140, "vocab_size": 10}
    tiny["audio_config"] |= {"vocab_offset": 150, "vocab_size": 8, "conf_num_hidden_layers": 1}


def _molmo(tiny: dict[str, Any]) -> None:
    tiny["adapter_config"]["vision_feature_layer"] = [1, 0]
    tiny["vision_config"]["num_position_embeddings"] = 16


def _paligemma(tiny: dict[str, Any]) -> None:
    tiny["projection_dim"] = tiny["vision_config"]["projection_dim"] = HIDDEN


def _muse(tiny: dict[str, Any]) -> None:
    """The projector takes 2 x 2 patches side by side; the part for sound has lists of layers."""
    tiny |= {"out_hidden_size": 4 * HIDDEN, "projector_hidden_size": HIDDEN}
    if "audio_config" in tiny:
        tiny["audio_config"] |= {"patch_sizes": [16, 6], "hidden_sizes": [HIDDEN // 2, HIDDEN], "depths": [1, 1]}


# Its second tower, which makes images, is not used.
_JANUS = {"num_embeddings": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
_JANUS |= {"image_token_embed_dim": HIDDEN}


def _vq_tokens(images: list[str]) -> Callable[[dict[str, Any]], None]:
    """Images become ids of the vocabulary, in a table whose names the model reads."""

    def fit(tiny: dict[str, Any]) -> None:
        names = {image: VQ_FIRST + number for number, image in enumerate(images)}
        tiny["vocabulary_map"] = {"<image>": FIRST_MODALITY, "<|extra_200|>": FIRST_MODALITY + 1} | names
        tiny["image_token_id"] = FIRST_MODALITY
        sizes = {"num_embeddings": len(images), "codebook_size": len(images), "base_channels": 32, "channel_multiplier": [1, 1]}
        sizes |= {"num_res_blocks": 1, "embed_dim": 8, "latent_channels": 8, "resolution": VQ_IMAGE, "hidden_size": 32}
        known = tiny["vq_config"]
        tiny["vq_config"] = known | {name: value for name, value in sizes.items() if name in known}

    return fit


# Settings that hang together with a size elsewhere, by model type; each puts the tiny settings right in place.
FITTINGS: dict[str, Callable[[dict[str, Any]], None]] = {
    # A query for every two patches.
    "aria": lambda tiny: tiny.update(projector_patch_to_query_dict={16: 8}),
    "chameleon": _vq_tokens([f"IMGIMG{chr(65 + n // 10)}{chr(65 + n % 10)}Z" for n in range(32)]),
    "emu3": _vq_tokens([f"<|visual token {n:06d}|>" for n in range(32)]),
    "deepseek_ocr2": _deepseek_ocr,
    "deepseek_vl_hybrid": lambda tiny: _sam(tiny["high_res_vision_config"]),
    "gemma3": lambda tiny: tiny.update(mm_tokens_per_image=16),
    "shieldgemma2": lambda tiny: tiny.update(mm_tokens_per_image=16),
    "granite4_vision": _granite4,
    "granite_docling": _granite_docling,
    # Tables of what images and sounds say stand at the end of the vocabulary, and rows for layers at its beginning.
    "gemma3n": _gemma3n,
    "janus": lambda tiny: tiny["vq_config"].update(_JANUS),
    "kimi_k25": lambda tiny: tiny.update(projection_hidden_size=HIDDEN),
    # Four patches of HIDDEN values side by side.
    "llama4": lambda tiny: tiny["vision_config"].update(intermediate_size=4 * HIDDEN),
    "molmo2": _molmo,
    "paligemma": _paligemma,
    **dict.fromkeys(("idefics3", "smolvlm"), lambda tiny: tiny.update(scale_factor=2)),
    **dict.fromkeys(("muse_glimmer", "muse_spark"), _muse),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), _tiles),
}
