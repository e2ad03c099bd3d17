"""A configuration of any size -> a two-layer random copy of the architecture, small enough to be probed in a second.

Place in the flow: `doctor` shrinks what it was given and `probe` runs the copy. Kept is all that decides whether block attention
works: every kind of layer with its window or chunk (shortened, so that a lost one shows), tied or untied head, grouped or single
key heads, norms, the kind of rope, soft-caps, experts and their groups. Invariant: the same (config, seed) gives the same
weights, the caller's random state is untouched, and the weights are large enough that attention shows in the logits
(transformers' initialisation, std 0.02, makes attention uniform and every mask look right; see `standins`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffvl.errors import UnsupportedModelError
from diffvl.prepare.attention_proof import ProbeText

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, ROPE_DIM, INTERMEDIATE = 64, 4, 2, 16, 8, 96
RANK, NUM_EXPERTS, TOP_EXPERTS = 32, 8, 2
VOCABULARY, FIRST_ORDINARY = 160, 16  # ids below stand for whatever special tokens the configuration names
WINDOW, CHUNK, MAX_POSITIONS, ORIGINAL_POSITIONS = 10, 16, 512, 256
MAX_LAYERS = 8
MAX_PARAMETERS = 100_000_000  # more means that a size escaped the table below
SHARPNESS = 1.5  # gain of the query and key projections; at 1 the attention of short texts is almost flat
EMBEDDING_STD = 0.5
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"),
    *("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"),
)
LAYER_INDICES = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "cross_attention_layers", "ple_layer_ids", "hybrid_layer_ids")
FIRST_LAYERS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
)  # this many first layers differ
LAST_LAYERS = ("num_kv_shared_layers",)
LAYER_STEPS = ("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", "moe_layer_freq")  # every n-th layer
NOT_KEPT = {"quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version", "per_layer_config"}
ROPE = ("rope_parameters", "rope_scaling")
TOKEN_IDS = ("_token_id", "_token_ids", "_token_index")


# Setting -> tiny value, where the setting is a positive number.
SIZES = {
    name: value
    for names, value in {
        "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size input_embedding_size": HIDDEN,
        "output_embedding_size hidden_size_global dim_model_base lru_width embed_dim moe_hidden_size": HIDDEN,
        "pronunciation_embed_dim shape_embed_dim": HIDDEN,  # of RoCBert
        "head_dim attention_head_dim attention_head_size global_head_dim kv_channels dim_head d_head": HEAD_DIM,
        "swa_head_dim qk_nope_head_dim v_head_dim swa_v_head_dim index_head_dim query_pre_attn_scalar": HEAD_DIM,
        "linear_key_head_dim linear_value_head_dim linear_head_dim": HEAD_DIM,
        "qk_rope_head_dim rotary_dim": ROPE_DIM,
        "qk_head_dim": HEAD_DIM + ROPE_DIM,
        "kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank laurel_rank hidden_size_per_layer_input adapter_rank": RANK,
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads": NUM_HEADS,
        "num_decoder_attention_heads num_encoder_attention_heads index_n_heads swa_num_attention_heads": NUM_HEADS,
        "linear_num_key_heads linear_num_value_heads linear_num_heads": NUM_HEADS,
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff d_inner ffn_hidden_size": INTERMEDIATE,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size": INTERMEDIATE,
        "expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size": INTERMEDIATE,
        "moe_shared_expert_intermediate_size feed_forward_size alignment_intermediate_size": INTERMEDIATE,
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num": NUM_EXPERTS,
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length": MAX_POSITIONS,
        "sliding_window sliding_window_size window_size": WINDOW,
        "local_attention": 2 * WINDOW,  # of ModernBERT: reaches to both sides
        "attention_chunk_size": CHUNK,
        "topk_group": 1,
    }.items()
    for name in names.split()
}
# The same, where a smaller number is kept.
LIMITS = {
    "original_max_position_embeddings": ORIGINAL_POSITIONS,
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "num_selected_experts"), TOP_EXPERTS),
    **dict.fromkeys(("moe_k", "moe_topk", "moe_top_k", "top_k_experts"), TOP_EXPERTS),
}
KV_HEADS = re.compile(r".*num_(global_)?(key_value|kv)_heads|kv_n_heads|num_query_groups")


# --- configuration -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """Which of the `count` layers of a configuration the tiny copy has."""

    count: int
    layers: list[int]


LayerRule = Callable[[int, Kept], int | None]
LAYER_RULES: dict[str, LayerRule] = {
    **dict.fromkeys(LAYER_COUNTS, lambda value, kept: len(kept.layers) if value == kept.count else min(value, 2)),
    **dict.fromkeys(FIRST_LAYERS, lambda value, kept: sum(layer < value for layer in kept.layers)),
    **dict.fromkeys(LAST_LAYERS, lambda value, kept: sum(layer >= kept.count - value for layer in kept.layers)),
    **dict.fromkeys(LAYER_STEPS, lambda value, kept: min(value, 2)),
    "moe_layer_end_index": lambda value, kept: len(kept.layers) - 1,
    "num_layers_per_stack": lambda value, kept: None,  # of HRM, which then reckons num_hidden_layers anew
}


def shrink(config: PretrainedConfig) -> PretrainedConfig:
    """Makes the configuration of the tiny copy, of the same class; `config` is left as it is."""
    return type(config).from_dict(shrink_settings(config.to_dict()))


def shrink_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Shrinks one level of a configuration; sub-configurations have layers of their own."""
    kept = _kept_layers(settings)
    tiny: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NOT_KEPT or name.lstrip("_").startswith("attn_implementation"):
            continue
        if name in ROPE and isinstance(value, dict):
            tiny[name] = _shrink_rope(value)
        elif isinstance(value, dict) and not name.endswith(("2id", "2label")) and all(isinstance(key, str) for key in value):
            tiny[name] = shrink_settings(value)
        elif isinstance(value, list):
            tiny[name] = _shrink_list(name, value, kept, settings)
        elif name in LAYER_RULES and isinstance(value, int):
            tiny[name] = LAYER_RULES[name](value, kept)
        else:
            tiny[name] = _shrink_value(name, value, settings)
    if rope_dim := settings.get("qk_rope_head_dim"):  # there head_dim is the part of a head that is rotated
        tiny["head_dim"] = max(1, ROPE_DIM * (settings.get("head_dim") or rope_dim) // rope_dim)
    if own := settings.get("per_layer_config"):
        tiny["per_layer_config"] = _shrink_own(own, kept, settings)
    return tiny


def _is_per_layer(name: str, value: Any, count: int) -> bool:
    """Tells whether a setting is a list with one entry per layer."""
    is_list = isinstance(value, list) and len(value) == count > 0
    return is_list and name not in LAYER_INDICES and not name.endswith(TOKEN_IDS)


def _kept_layers(settings: dict[str, Any]) -> Kept:
    """Gives the first layer of every kind, in their order; two at least."""
    count = next((settings[name] for name in LAYER_COUNTS if isinstance(settings.get(name), int)), 0)
    lists = [value for name, value in settings.items() if _is_per_layer(name, value, count)]
    indices = [settings[name] for name in LAYER_INDICES if isinstance(settings.get(name), list)]
    first = [settings[name] for name in FIRST_LAYERS if isinstance(settings.get(name), int)]
    last = [count - settings[name] for name in LAST_LAYERS if isinstance(settings.get(name), int)]
    steps = [settings[name] for name in LAYER_STEPS if isinstance(settings.get(name), int) and settings[name] > 1]
    own = {int(index): str(value) for index, value in (settings.get("per_layer_config") or {}).items()}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kind = [str(values[layer]) for values in lists] + [str(layer in members) for members in indices]
        kind += [str(layer >= start) for start in (*first, *last)] + [str((layer + 1) % step == 0) for step in steps]
        kinds.setdefault(" ".join([*kind, own.get(layer, "")]), layer)
    layers = list(kinds.values())[:MAX_LAYERS]
    spare = [layer for layer in range(count) if layer not in layers]
    return Kept(count, sorted(layers + spare[: max(0, 2 - len(layers))]))


def _shrink_list(name: str, value: list[Any], kept: Kept, settings: dict[str, Any]) -> list[Any]:
    if name in LAYER_INDICES:
        return [new for new, layer in enumerate(kept.layers) if layer in value]
    if _is_per_layer(name, value, kept.count):
        return [_shrink_value(name, value[layer], settings) for layer in kept.layers]
    if name.endswith(TOKEN_IDS):
        return [token % FIRST_ORDINARY for token in value]
    if name == "attention_types":  # of GPT-Neo: [[kinds, repeats], ...]
        return [[value[0][0], 1]]
    return value


def _shrink_value(name: str, value: Any, settings: dict[str, Any]) -> Any:
    """Shrinks a setting that says nothing about layers."""
    if value is None and name == "head_dim":
        return HEAD_DIM
    if name.endswith("attention_multiplier") and isinstance(value, float):
        return HEAD_DIM**-0.5  # the scale of the scores, which follows the size of a head
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    if name.endswith(TOKEN_IDS):
        return value % FIRST_ORDINARY
    if KV_HEADS.fullmatch(name):
        return _shrink_kv_heads(name, value, settings)
    if "vocab" in name:
        return VOCABULARY
    return min(value, LIMITS[name]) if name in LIMITS else SIZES.get(name, value)


def _shrink_kv_heads(name: str, value: int, settings: dict[str, Any]) -> int:
    """Keeps the grouping: one key head stays one, as many as query heads stay as many, grouped stay grouped."""
    names = ("swa_num_attention_heads",) if name.startswith("swa") else ("num_attention_heads", "n_head", "n_heads", "num_heads")
    heads = next((settings[own] for own in names if isinstance(settings.get(own), int)), value)
    return 1 if value == 1 else NUM_HEADS if value == heads else NUM_KV_HEADS


def _shrink_own(own: dict[str, dict[str, Any]], kept: Kept, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings that single layers have for themselves: they keep their ratio to the setting of all."""

    def ratio(name: str, value: Any) -> Any:
        of_all = settings.get(name)
        if name in SIZES and isinstance(of_all, int) and isinstance(value, int):
            return max(1, SIZES[name] * value // of_all)
        return _shrink_value(name, value, settings)

    by_layer = {int(index): values for index, values in own.items()}
    found = {str(new): by_layer[layer] for new, layer in enumerate(kept.layers) if layer in by_layer}
    return {new: {name: ratio(name, value) for name, value in values.items()} for new, values in found.items()}


def _shrink_rope(rope: dict[str, Any], head_dim: int = HEAD_DIM) -> dict[str, Any]:
    """Shrinks rope parameters, per layer type or not; lists over frequencies are cut to the tiny head."""
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    tiny = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            tiny[name] = _shrink_rope(value)
        elif name in ("long_factor", "short_factor"):
            tiny[name] = value[:half]
        elif name == "mrope_section":
            parts = [round(half * part / sum(value)) for part in value[:-1]]
            tiny[name] = [*parts, half - sum(parts)]
        else:
            tiny[name] = min(value, LIMITS[name]) if name in LIMITS else value
    return tiny


# --- model ---------------------------------------------------------------------------------------------------------------


def build(config: PretrainedConfig, trust_remote_code: bool = False, seed: int = 0) -> PreTrainedModel:
    """Builds the tiny random copy of what `config` describes, in fp32 and evaluation mode.

    Raises:
        UnsupportedModelError: if it comes out too large for a probe, or with an attention that takes no dense mask.
        Exceptions of the model's own code, of many types, where the configuration does not fit the class.
    """
    return build_with(AutoModelForCausalLM, shrink(config), seed, trust_remote_code)


def build_with(maker: Any, tiny: PretrainedConfig, seed: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model of a tiny configuration by one of transformers' Auto classes; raises as `build`."""

    def make() -> PreTrainedModel:
        # Without a choice of attention transformers takes sdpa where the class supports it, and eager elsewhere.
        return maker.from_config(tiny, trust_remote_code=trust_remote_code, dtype=torch.float32)

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make().parameters())
    if parameters > MAX_PARAMETERS:
        raise UnsupportedModelError(f"{tiny.model_type}: its tiny copy has {parameters:,} parameters, too many for a probe")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        rescale(model)
    implementation = model.config.get_text_config(decoder=True)._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(f"{tiny.model_type}: its attention is {implementation!r}; expected sdpa or eager")
    return model.eval()


@torch.no_grad()
def rescale(model: nn.Module) -> None:
    """Redraws every parameter in place: unit-variance projections, visible biases and sinks, norms off their neutral value."""
    drawn: set[int] = set()  # a tied head is the embedding's own tensor and must not be drawn again as a projection
    for name, module in model.named_modules():
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) not in drawn:
                drawn.add(id(weight))
                _redraw(name, key, module, weight)
        for key, buffer in module.named_buffers(recurse=False):
            if key.endswith("bias") and buffer.is_floating_point():  # routers keep the bias of their experts so
                buffer.normal_(std=0.1)


def _redraw(name: str, key: str, module: nn.Module, weight: torch.Tensor) -> None:
    if key.endswith(("bias", "sinks", "sink")):
        weight.normal_(std=0.3)
    elif isinstance(module, nn.Embedding):
        weight.normal_(std=EMBEDDING_STD)
    elif weight.dim() <= 1:  # norms and layer scales stand at 1, or at 0 where the model adds the 1 itself
        weight.add_(torch.randn_like(weight), alpha=0.1)
    elif isinstance(module, nn.Linear | Conv1D | nn.Conv1d | nn.Conv2d):
        fan_in = weight.shape[0] if isinstance(module, Conv1D) else weight[0].numel()
        sharp = re.search(r"(q|k|qkv|query|key|query_key_value|c_attn|q_b|kv_b)(_proj)?$", name)
        weight.normal_(std=(SHARPNESS if sharp else 1.0) * fan_in**-0.5)
    else:  # experts in one tensor, in either order of their two widths; class tokens, tables
        weight.normal_(std=(weight.shape[-1] * weight.shape[-2]) ** -0.25)


def describe(model: PreTrainedModel) -> str:
    """Tells what the tiny copy kept, in words."""
    config = model.config.get_text_config(decoder=True)

    def number(*names: str) -> int:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)

    kinds = getattr(config, "layer_types", None) or []
    words = [f"{number(*LAYER_COUNTS)} layers" + (f" ({', '.join(kinds)})" if kinds else "")]
    words += [f"{word} {size}" for word, name in (("window", "sliding_window"), ("chunk", "attention_chunk_size"))
              if (size := number(name))]  # fmt: skip
    heads, kv_heads = number("num_attention_heads"), number("num_key_value_heads")
    words.append(f"{heads} heads" + (f", {kv_heads} key heads" if 0 < kv_heads < heads else ""))
    experts = number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    words += [f"{experts} experts"] if experts > 1 else []
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    words.append("tied" if head is not None and head.weight is table.weight else "untied")
    return ", ".join([*words, f"{config._attn_implementation} attention"])


# --- what it reads -------------------------------------------------------------------------------------------------------


def vocabulary(trunk: PreTrainedModel) -> int:
    """Counts the rows of the embedding table; the last stands for the mask token."""
    table: Any = trunk.get_input_embeddings()
    return table.weight.shape[0]


def ordinary_tokens(trunk: PreTrainedModel) -> range:
    """Gives the tokens that a text is made of: neither special ones nor the mask token."""
    return range(FIRST_ORDINARY, vocabulary(trunk) - 1)


def probe_text(trunk: PreTrainedModel, context: str) -> ProbeText:
    """Lays out the conversations that a copy is measured on."""
    return ProbeText.make(trunk, context, ordinary_tokens(trunk), vocabulary(trunk) - 1)
