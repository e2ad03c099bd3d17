"""The tiny copy keeps what block attention depends on, whatever the size of the configuration, and its attention shows."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig

from diffvl.doctor import tiny_copy as miniature
from diffvl.doctor.tiny_copy import FIRST_ORDINARY, HEAD_DIM, VOCABULARY, WINDOW, build, describe, shrink
from diffvl.errors import UnsupportedModelError


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**settings)


# --- configuration -------------------------------------------------------------------------------------------------------


def test_sizes_shrink_and_the_given_configuration_stays():
    config = config_of("qwen2", num_key_value_heads=8, tie_word_embeddings=True, bos_token_id=151643, eos_token_id=151645)
    before = config.to_dict()
    tiny = shrink(config)
    assert config.to_dict() == before and type(tiny) is type(config)
    assert (tiny.hidden_size, tiny.num_hidden_layers, tiny.num_attention_heads, tiny.num_key_value_heads) == (64, 2, 4, 2)
    assert tiny.vocab_size == VOCABULARY and tiny.tie_word_embeddings
    assert tiny.bos_token_id < FIRST_ORDINARY and tiny.eos_token_id < FIRST_ORDINARY
    assert tiny.rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("gpt_bigcode", {}, 1),  # one key head for all
        ("llama", {}, 4),  # as many as query heads
        ("llama", {"num_key_value_heads": 8}, 2),  # grouped
        ("falcon", {}, 1),
    ],
)
def test_the_grouping_of_heads_is_kept(model_type: str, settings: dict, expected: int):
    modules = build(config_of(model_type, **settings)).named_modules()
    attention = next(module for name, module in modules if name.endswith(("attn", "attention")))
    keys: Any = getattr(attention, "k_proj", None)
    width = keys.weight.shape[0] if keys is not None else None
    if width is None:  # query, key and value in one projection
        fused: Any = getattr(attention, "c_attn", None) or getattr(attention, "query_key_value", None)
        width = (fused.weight.shape[0] - 4 * HEAD_DIM) // 2
    assert width == expected * HEAD_DIM


@pytest.mark.parametrize(
    ("model_type", "settings", "kinds"),
    [
        ("gemma3_text", {}, ["sliding_attention", "full_attention"]),
        ("llama4_text", {}, ["chunked_attention", "full_attention"]),
        ("gpt_oss", {}, ["sliding_attention", "full_attention"]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 20}, ["full_attention", "sliding_attention"]),
        ("gemma3n_text", {}, ["sliding_attention", "full_attention"]),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 16}, ["conv", "full_attention"]),
    ],
)
def test_every_kind_of_layer_is_kept_with_a_short_window(model_type: str, settings: dict, kinds: list[str]):
    tiny = shrink(config_of(model_type, **settings))
    assert list(dict.fromkeys(tiny.layer_types)) == kinds
    assert tiny.num_hidden_layers == len(tiny.layer_types) <= miniature.MAX_LAYERS
    if "sliding_attention" in kinds:
        assert tiny.sliding_window == WINDOW
    if "chunked_attention" in kinds:
        assert tiny.attention_chunk_size == miniature.CHUNK


def test_dense_and_expert_layers_are_kept_with_their_groups():
    tiny = shrink(config_of("deepseek_v3", first_k_dense_replace=3))
    assert (tiny.num_hidden_layers, tiny.first_k_dense_replace) == (2, 1)
    assert (tiny.n_routed_experts, tiny.num_experts_per_tok, tiny.n_group, tiny.topk_group) == (8, 2, 2, 1)
    assert tiny.qk_head_dim == tiny.qk_nope_head_dim + tiny.qk_rope_head_dim
    every_second = shrink(config_of("qwen3_moe", decoder_sparse_step=2, num_experts=128, mlp_only_layers=[5]))
    assert every_second.decoder_sparse_step == 2 and every_second.num_experts == 8
    layers: Any = build(config_of("qwen3_moe", decoder_sparse_step=2)).get_submodule("model.layers")
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False, True]


def test_layers_that_share_keys_keep_one_to_share_with():
    tiny = shrink(config_of("gemma3n_text"))
    own = tiny.layer_types[: -tiny.num_kv_shared_layers]
    assert tiny.num_kv_shared_layers > 0 and set(own) == set(tiny.layer_types)


def test_settings_of_single_layers_keep_their_ratio():
    config = config_of("gemma4_text")
    tiny = shrink(config)
    of_all = {number: layer.head_dim for number, layer in enumerate(tiny.per_layer_config)}
    assert list(of_all.values()) == [HEAD_DIM, 2 * HEAD_DIM], "256 and 512 in the default"


def test_rope_over_frequencies_fits_the_tiny_head():
    half = 48
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half, "rope_theta": 10000.0}
    tiny = shrink(config_of("phi3", rope_parameters=scaling | {"original_max_position_embeddings": 4096}))
    assert len(tiny.rope_parameters["short_factor"]) == len(tiny.rope_parameters["long_factor"]) == HEAD_DIM // 2
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]}
    tiny = shrink(config_of("qwen2", rope_parameters=mrope))
    assert tiny.rope_parameters["mrope_section"] == [2, 3, 3]


def test_quantisation_is_not_kept():
    quantised = config_of("llama", quantization_config={"quant_method": "fp8"}, dtype="bfloat16")
    tiny = shrink(quantised)
    assert not hasattr(tiny, "quantization_config") and build(quantised).dtype == torch.float32


# --- model ---------------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_state_stays():
    state = torch.get_rng_state()
    first, second, other = (build(config_of("qwen2"), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_oss", "mixtral", "granite", "deepseek_v3", "falcon"])
@torch.no_grad()
def test_attention_shows_in_the_logits(model_type: str):
    """Far above the tolerance of the probe, so that a wrong mask cannot hide."""
    model = build(config_of(model_type))
    ids = torch.randint(FIRST_ORDINARY, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -2] = FIRST_ORDINARY + (other[0, -2] == FIRST_ORDINARY)
    before, after = (model(input_ids=tokens).logits[0, -1] for tokens in (ids, other))
    assert float((after - before).abs().max() / before.std()) > 0.01


def test_biases_and_sinks_are_not_zero():
    parameters = dict(build(config_of("gpt_oss")).named_parameters())
    for name in ("model.layers.0.self_attn.sinks", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.router.bias"):
        assert float(parameters[name].detach().abs().min()) > 0.0, name
    routers = dict(build(config_of("deepseek_v3")).named_buffers())
    assert float(routers["model.layers.1.mlp.gate.e_score_correction_bias"].abs().min()) > 0.0


def test_a_copy_that_comes_out_too_large_is_never_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(miniature, "MAX_PARAMETERS", 1000)
    with pytest.raises(UnsupportedModelError, match=r"llama: its tiny copy has [\d,]+ parameters, too many for a probe"):
        build(config_of("llama"))


def test_attention_is_sdpa_where_the_class_has_it():
    assert describe(build(config_of("gemma2"))) == (
        "2 layers (sliding_attention, full_attention), window 10, 4 heads, 2 key heads, tied, eager attention"
    )
    assert describe(build(config_of("mixtral"))) == "2 layers, 4 heads, 2 key heads, 8 experts, untied, sdpa attention"
