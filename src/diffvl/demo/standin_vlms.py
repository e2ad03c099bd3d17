"""Random tiny vision-language checkpoints on disk, one for each kind of native VLM: how images become tokens, and who sees them.

Place in the flow: they stand in for MODEL on the AR-VLM route, as `standins` does for trunks and towers; `standin_processors`
writes tokenizer, processor and chat template beside them. Invariant: the same (model_type, tokenizer, seed) gives the same
bytes, and the caller's random state is untouched.

Sizes that a processor must fit, the same for all families: PATCH pixels for a patch, IMAGE pixels for an image or a tile, which
makes 4 x 4 patches; SHAPES are the shapes in pixels that tiled families cut an image to. Qwen and GLM join 2 x 2 patches into a
token (and show a still image as two frames); InternVL and Idefics shuffle 2 x 2 into one, so a tile has TILE_TOKENS there, and
PLAIN_TOKENS elsewhere. Gemma's span of PLAIN_TOKENS is longer than its window.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from diffvl.demo.standins import (
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    WINDOW,
    make_tokenizer,
    rescale_trunk,
)
from diffvl.errors import UsageError
from diffvl.store.files import share

PATCH, IMAGE = 14, 56
PLAIN_TOKENS, TILE_TOKENS = 16, 4
SHAPES = [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
MAX_POSITIONS = 2048
TOWER_HIDDEN, TOWER_HEADS, TOWER_LAYERS = 32, 2, 2
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}  # time, height, width of half a head
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass(frozen=True)
class Kind:
    """A family of VLMs. text, vision: settings of the two halves, beside the sizes that all have. top: settings that stand beside
    the halves. tokens: setting -> text of the token whose id it is; the first shows an image."""

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {"image_token_id": "<image>"})


def _packed(**more: Any) -> dict[str, Any]:
    """Gives the settings of a tower that reads patches in one row, of images of any size."""
    sizes = {"depth": TOWER_LAYERS, "hidden_size": TOWER_HIDDEN, "intermediate_size": 2 * TOWER_HIDDEN, "num_heads": TOWER_HEADS}
    return sizes | {"out_hidden_size": HIDDEN, "patch_size": PATCH} | more


def _square(model_type: str, **more: Any) -> dict[str, Any]:
    """Gives the settings of a tower that reads images of one size."""
    sizes = {"hidden_size": TOWER_HIDDEN, "intermediate_size": 2 * TOWER_HIDDEN, "num_hidden_layers": TOWER_LAYERS}
    sizes |= {"num_attention_heads": TOWER_HEADS, "image_size": IMAGE, "patch_size": PATCH}
    return {"model_type": model_type} | sizes | more


_QWEN3 = _packed(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
_LLAVA = {"image_token_index": "<image>"}
_TILES = {"image_grid_pinpoints": SHAPES}
_GEMMA_TOKENS = {
    "image_token_index": "<image_soft_token>",
    "boi_token_index": "<start_of_image>",
    "eoi_token_index": "<end_of_image>",
}
_GLM_TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
KINDS: dict[str, Kind] = {
    # Qwen's tower names the width of the text hidden_size, and its own embed_dim.
    "qwen2_vl": Kind(
        {"rope_parameters": MROPE},
        {"depth": TOWER_LAYERS, "embed_dim": TOWER_HIDDEN, "num_heads": TOWER_HEADS, "mlp_ratio": 2}
        | {"hidden_size": HIDDEN, "patch_size": PATCH},
        tokens=QWEN_TOKENS,
    ),
    "qwen2_5_vl": Kind(
        {"rope_parameters": MROPE, "tie_word_embeddings": True},
        _packed(fullatt_block_indexes=[1], window_size=2 * 2 * PATCH),  # windows of 2 x 2 tokens
        {"tie_word_embeddings": True},
        QWEN_TOKENS,
    ),
    "qwen3_vl": Kind({"rope_parameters": MROPE, "head_dim": HEAD_DIM}, _QWEN3, tokens=QWEN_TOKENS),
    "qwen3_vl_moe": Kind(
        {"rope_parameters": MROPE, "head_dim": HEAD_DIM, "tie_word_embeddings": False}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN},
        _QWEN3,
        tokens=QWEN_TOKENS,
    ),
    "glm4v": Kind({"rope_parameters": MROPE}, _packed(image_size=IMAGE), tokens=_GLM_TOKENS),
    "llava": Kind(
        {"model_type": "llama", "head_dim": HEAD_DIM},
        _square("clip_vision_model", projection_dim=TOWER_HIDDEN),
        {"image_seq_length": PLAIN_TOKENS},
        _LLAVA,
    ),
    "llava_next": Kind(
        {"model_type": "llama", "head_dim": HEAD_DIM},
        _square("clip_vision_model", projection_dim=TOWER_HIDDEN),
        {"image_seq_length": PLAIN_TOKENS} | _TILES,
        _LLAVA,
    ),
    "llava_onevision": Kind(
        {"model_type": "qwen2"},
        _square("siglip_vision_model", vision_use_head=False),
        _TILES,
        _LLAVA | {"video_token_index": "<video>"},
    ),
    "internvl": Kind(
        {"model_type": "qwen2", "tie_word_embeddings": False},
        _square("internvl_vision", image_size=[IMAGE, IMAGE], patch_size=[PATCH, PATCH]),
        {"image_seq_length": TILE_TOKENS, "tie_word_embeddings": False},
        {"image_token_id": "<IMG_CONTEXT>"},
    ),
    "gemma3": Kind(
        {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        _square("siglip_vision_model", vision_use_head=False),
        {"mm_tokens_per_image": PLAIN_TOKENS},
        _GEMMA_TOKENS,
    ),
    # As PaliGemma 2, whose text part has windows; that of PaliGemma has none.
    "paligemma": Kind(
        {"model_type": "gemma2", "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        _square("siglip_vision_model", vision_use_head=False),
        {"projection_dim": HIDDEN},
        {"image_token_index": "<image>"},
    ),
    "idefics2": Kind(
        {"model_type": "mistral", "head_dim": HEAD_DIM},
        _square("idefics2_vision"),
        {"perceiver_config": {"hidden_size": HIDDEN, "resampler_n_latents": TILE_TOKENS, "resampler_depth": 1}},
    ),
    "idefics3": Kind({"model_type": "llama", "head_dim": HEAD_DIM}, _square("idefics3_vision"), {"scale_factor": 2}),
    "smolvlm": Kind({"model_type": "llama", "head_dim": HEAD_DIM}, _square("smolvlm_vision"), {"scale_factor": 2}),
}
VLMS: tuple[str, ...] = tuple(KINDS)


def make_vlm(directory: Path, model_type: str, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Writes the weights and configuration of a stock VLM of `model_type` (one of VLMS), in fp32; returns `directory`.

    Args:
        tokenizer: decides the size of the vocabulary and, by the tokens' texts, the ids of image tokens; by default
            `vlm_tokenizer`'s. It is not written.
    Raises:
        UsageError: for another type, or a tokenizer without the family's image token.
    """
    if model_type not in KINDS:
        raise UsageError(f"no stand-in VLM of type {model_type!r}: expected one of {', '.join(VLMS)}")
    tokenizer = tokenizer or vlm_tokenizer(model_type)
    config = _config(model_type, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _rescale(model)
    model.generation_config = GenerationConfig(**_special_ids(tokenizer))
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    share(directory)
    return directory


def vlm_tokenizer(model_type: str) -> PreTrainedTokenizerBase:
    """Makes the tokenizer of `standins` with the image tokens of a family."""
    tokenizer = make_tokenizer("gemma2" if model_type in ("gemma3", "paligemma") else "llama")
    tokenizer.add_tokens(list(KINDS[model_type].tokens.values()), special_tokens=True)
    return tokenizer


def _config(model_type: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Puts sizes and token ids together. A token that the tokenizer lacks gets an id above all that it has."""
    kind, known = KINDS[model_type], tokenizer.get_vocab()
    image = next(iter(kind.tokens.values()))
    if image not in known:
        raise UsageError(f"the tokenizer has no token {image!r}, which shows an image in a {model_type}")
    ids: dict[str, int] = {}
    rows = max(known.values()) + 1
    for setting, text in kind.tokens.items():
        ids[setting] = known.get(text, rows)
        rows = max(rows, ids[setting] + 1)
    special = _special_ids(tokenizer)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "intermediate_size": INTERMEDIATE, "vocab_size": rows}
    sizes |= {"num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS, "max_position_embeddings": MAX_POSITIONS}
    top = {"pad_token_id": special["pad_token_id"]} if model_type in ("idefics3", "smolvlm") else {}
    return AutoConfig.for_model(
        model_type, text_config=sizes | special | kind.text, vision_config=dict(kind.vision), **kind.top, **ids, **top
    )


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _rescale(model: PreTrainedModel) -> None:
    """Redraws the weights, so that logits have the spread of the other stand-ins', and images move them."""
    decoder: Any = model.get_decoder()
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is table.weight
    rescale_trunk(model, decoder.norm.weight, tied, is_gemma=decoder.config.model_type.startswith("gemma"))
