"""Diffusion language models as they are published: translated exactly, or refused with every reason."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_checkpoints as made
import pytest
import torch
from broken_checkpoints import broken
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from diffvl.config.families import diffusion_source, family_of
from diffvl.demo.standin_dllms import DLLMS, EMBEDDING, LLADA_NAMES, ROPE_THETA, STOCK
from diffvl.demo.standins import make_trunk
from diffvl.errors import CheckpointError, UnsupportedModelError
from diffvl.store.published import load_config
from diffvl.store.renamed import translated
from diffvl.store.weights import check_trunk, load_trunk

LLADA = {
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 1,
    "mlp_hidden_size": 64,
    "vocab_size": 128,
    "block_type": "llama",
    "rope": True,
}
LLADA |= {"activation_type": "silu", "layer_norm_type": "rms", "weight_tying": False}
QWEN = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
QWEN |= {"vocab_size": 128, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
QWEN |= {"norm_topk_prob": True}
LEAST = {"llada": LLADA, "Dream": QWEN, "sdar": QWEN, "sdar_moe": QWEN}


def stock_config(model_type: str, **settings: Any) -> Any:
    return translated("here", {**LEAST[model_type], **settings}, family_of(model_type))


# --- the same model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", DLLMS)
def test_it_loads_as_the_stock_model_with_the_tensors_of_the_files(model_type: str, dllm: Callable[[str], Path], tmp_path: Path):
    """Against a stock checkpoint whose file was never renamed, with the settings that the published ones stand for."""
    config = load_config(str(dllm(model_type)), False)
    check_trunk(str(dllm(model_type)), config)
    trunk = load_trunk(str(dllm(model_type)), config).eval()
    reference = AutoConfig.from_pretrained(make_trunk(tmp_path, STOCK[model_type]))
    reference.update({"tie_word_embeddings": False, "vocab_size": config.vocab_size})
    reference.rope_parameters = {"rope_type": "default", "rope_theta": ROPE_THETA}
    plain: Any = AutoModelForCausalLM.from_config(reference, dtype=torch.float32).eval()
    if model_type == "llada":
        plain.load_state_dict({to_stock(name): tensor for name, tensor in load_file(dllm("llada") / made.WEIGHTS).items()})
    else:
        plain.load_state_dict(trunk.state_dict())
    assert type(trunk) is type(plain) and trunk.dtype == torch.float32
    ids = torch.randint(0, 250, (2, 23), generator=torch.Generator().manual_seed(0))
    mask, position = torch.ones(2, 1, 23, 23, dtype=torch.bool), torch.arange(23).expand(2, -1)
    with torch.no_grad():
        both = [model(input_ids=ids, attention_mask=mask, position_ids=position).logits for model in (trunk, plain)]
        causal = trunk(input_ids=ids).logits
    assert torch.equal(*both) and not torch.allclose(causal, both[0], atol=0.1)
    trunk.save_pretrained(tmp_path / "saved")
    assert any(name.startswith("model.layers.0.self_attn.") for name in load_file(tmp_path / "saved" / made.WEIGHTS))


def to_stock(name: str) -> str:
    """LLaDA's name of a tensor -> Llama's, by whole parts."""
    own = {value.removeprefix("model.transformer."): key for key, value in LLADA_NAMES.items()}
    *parts, last = name.removeprefix("model.transformer.").split(".")
    if parts[0] != "blocks":
        return f"{own[parts[0]] if parts[0] != 'ff_out' else 'lm_head'}.{last}"
    part = own[parts[2]] if parts[2] != "ff_out" else "mlp.down_proj"
    return f"model.layers.{parts[1]}.{part}.{last}"


@pytest.mark.parametrize("model_type", DLLMS)
def test_what_the_trunk_remembers(model_type: str, dllm: Callable[[str], Path], caplog: pytest.LogCaptureFixture):
    config = load_config(str(dllm(model_type)), False)
    assert not caplog.messages, "every published setting is known"
    source = diffusion_source(config)
    assert source is not None and source.model_type == model_type and config.model_type == STOCK[model_type]
    assert source.target == ("shift" if model_type == "Dream" else "same")
    assert source.block_size == (4 if model_type.startswith("sdar") else None)
    assert diffusion_source(config.to_dict()) == source == diffusion_source(type(config).from_dict(config.to_dict()))


@pytest.mark.parametrize(("model_type", "agreed"), [("llada", 126336), ("Dream", 151666), ("sdar", 151669), ("sdar_moe", 151669)])
def test_the_mask_token_is_the_checkpoints_else_the_agreed_one(model_type: str, agreed: int):
    named, silent = (diffusion_source(stock_config(model_type, **given)) for given in ({"mask_token_id": 7}, {}))
    assert named is not None and silent is not None and (named.mask_token_id, silent.mask_token_id) == (7, agreed)


def test_another_block_size_of_the_checkpoint_counts():
    source = diffusion_source(stock_config("sdar", block_size=16))
    assert source is not None and (source.block_size, source.grid) == (16, "absolute")


def test_a_block_size_that_stands_in_the_name_alone_is_told(caplog: pytest.LogCaptureFixture):
    for name, settings in (("JetLM/SDAR-4B-Chat-b16", {}), ("x-b4", {}), ("x-b16", {"block_size": 16}), ("x", {})):
        translated(name, {**QWEN, **settings}, family_of("sdar"))
    (told,) = [message for message in caplog.messages if "block size" in message]
    assert told.startswith("JetLM/SDAR-4B-Chat-b16: its config.json names no block size, so 4 is taken;") and "of 16" in told


def test_published_defaults_and_nulls():
    config = stock_config("llada", n_kv_heads=None, embedding_size=None, rope_theta=5e5, eos_token_id=3)
    assert (config.num_key_value_heads, config.vocab_size, config.rope_parameters["rope_theta"]) == (2, 128, 5e5)
    assert (config.eos_token_id, config.max_position_embeddings, config.architectures) == (3, 1024, ["LlamaForCausalLM"])
    assert stock_config("llada", embedding_size=160).vocab_size == 160


# --- conditions ------------------------------------------------------------------------------------------------------------

OTHER: dict[str, Any] = {
    **{"block_type": "sequential", "block_group_size": 2, "activation_type": "swiglu", "layer_norm_type": "default"},
    **{"layer_norm_with_affine": False, "bias_for_layer_norm": True, "rope": False, "alibi": True, "include_bias": True},
    **{"include_qkv_bias": True, "scale_logits": True, "attention_layer_norm": True, "input_emb_norm": True},
    **{"multi_query_attention": True, "architectures": ["OtherModel"], "hidden_act": "gelu", "use_sliding_window": True},
    **{"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "use_mrope": True, "attention_bias": True, "block_size": 32},
}


def conditions() -> list[tuple[str, str]]:
    found = [(kind, setting) for kind in DLLMS for setting in (family_of(kind).loads_as or pytest.fail()).conditions]
    assert {setting for _, setting in found} == set(OTHER), "every condition has a value here that breaks it"
    return found


@pytest.mark.parametrize(("model_type", "setting"), conditions())
def test_each_condition_is_refused_with_the_reason(model_type: str, setting: str):
    with pytest.raises(UnsupportedModelError) as refused:
        stock_config(model_type, **{setting: OTHER[setting]})
    assert f"{setting} {OTHER[setting]!r} (expected " in str(refused.value)
    assert f"A {model_type} model is read as a stock {STOCK[model_type]}" in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "setting"), [(k, s) for k in DLLMS for s in (family_of(k).loads_as or pytest.fail()).requires]
)
def test_a_setting_that_must_be_there(model_type: str, setting: str):
    with pytest.raises(UnsupportedModelError, match=f"its config.json has no {setting}"):
        stock_config(model_type, **{setting: None})


def test_all_reasons_at_once():
    with pytest.raises(UnsupportedModelError) as refused:
        stock_config("llada", alibi=True, d_model=None, include_bias=True)
    assert "has no d_model, alibi True (expected False), include_bias True (expected False). A llada" in str(refused.value)


def test_a_config_that_names_no_architecture_is_not_taken_for_it():
    """The published code's own defaults are those of another model."""
    with pytest.raises(UnsupportedModelError, match="block_type 'sequential'"):
        translated("here", {key: value for key, value in LLADA.items() if key != "block_type"}, family_of("llada"))


@pytest.mark.parametrize(
    ("setting", "value"), [("mask_token_id", "x"), ("mask_token_id", -1), ("block_size", 0), ("block_size", True)]
)
def test_numbers_that_are_none(setting: str, value: Any):
    with pytest.raises(CheckpointError, match=f"{setting} in its config.json is {value!r}; expected a whole number"):
        stock_config("sdar", **{setting: value})


def test_unknown_settings_are_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        stock_config("llada", use_cache=False, init_std=0.02, new_trick=3, off=False)
    assert caplog.messages == [
        "here: settings of its config.json that its family does not know, and that have no effect: new_trick"
    ]


# --- released models -------------------------------------------------------------------------------------------------------

RELEASED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "sdarv"}, "a released SDAR-VL checkpoint (model_type 'sdarv')"),
    ({"model_type": "other", "vision_config": {}, "text_config": {"model_type": "sdar"}}, "a released SDAR-VL checkpoint"),
    ({"model_type": "diffusionvl_qwenvl"}, "a released DiffusionVL checkpoint (model_type 'diffusionvl_qwenvl')"),
    ({"model_type": "diffusionvl_qwen"}, "a released DiffusionVL checkpoint"),
    ({"model_type": "llava_llada_bd3lm"}, "a released DiffusionVL checkpoint"),
]


@pytest.mark.parametrize(("settings", "says"), RELEASED)
def test_released_models_are_named(settings: dict[str, Any], says: str, tmp_path: Path):
    made.edit_json(tmp_path / "config.json", **settings, auto_map={"AutoConfig": "own.Config"})
    with pytest.raises(UnsupportedModelError) as refused:
        load_config(str(tmp_path), False)
    assert says in str(refused.value) and "comes with its layout, in a later version" in str(refused.value)


def test_sdar_vl_is_read_as_its_language_model(tmp_path: Path):
    made.edit_json(tmp_path / "config.json", model_type="sdar_v")
    with pytest.raises(CheckpointError, match="no text_config in its config.json"):
        load_config(str(tmp_path), False)


def test_a_config_without_a_model_type(tmp_path: Path):
    made.edit_json(tmp_path / "config.json", model_type="")
    with pytest.raises(UnsupportedModelError):
        load_config(str(tmp_path), False)


# --- tensors ---------------------------------------------------------------------------------------------------------------

WTE, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"
GATE = "model.transformer.blocks.1.ff_proj.weight"


def without(name: str) -> Callable[[Path], Any]:
    return made.tensors(lambda content: {key: tensor for key, tensor in content.items() if key != name})


def more(**tensors: torch.Tensor) -> Callable[[Path], Any]:
    return made.tensors(lambda content: {**content, **tensors})


WRONG: list[tuple[Callable[[Path], Any], list[str]]] = [
    (without(GATE), ["lacks model.layers.1.mlp.gate_proj.weight", "names of the stock LlamaForCausalLM, as which it is read"]),
    (without(HEAD), ["lacks lm_head.weight", '"weight_tying": true']),
    (more(**{"model.transformer.wpe.weight": torch.zeros(4, 4)}), ["has model.transformer.wpe.weight besides"]),
    (more(**{"model.transformer.blocks.0.q_norm.weight": torch.zeros(4)}), ["has model.layers.0.q_norm.weight besides"]),
    (more(**{EMBEDDING: torch.zeros(4, 4)}), [f"{EMBEDDING} and {WTE} both stand for {EMBEDDING}"]),
    (made.config(mlp_hidden_size=96), ["ff_out.weight has the shape [64, 128], but config.json asks for [64, 96]"]),
    (made.config(weight_tying=True), ["lm_head.weight differs from model.embed_tokens.weight", '"weight_tying": true']),
    (made.config(n_layers=1), ["has model.layers.1.input_layernorm.weight"]),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=range(len(WRONG)))
def test_tensors_that_do_not_fit(change: Callable[[Path], Any], says: list[str], dllm: Callable[[str], Path], tmp_path: Path):
    model = str(broken(dllm("llada"), tmp_path / "model", change))
    with pytest.raises(CheckpointError) as refused:
        check_trunk(model, load_config(model, False))
    assert all(text in str(refused.value) for text in says), refused.value


def test_a_tied_one(dllm: Callable[[str], Path], tmp_path: Path):
    change = made.both(made.config(weight_tying=True), without(HEAD))
    model = str(broken(dllm("llada"), tmp_path / "model", change))
    config = load_config(model, False)
    check_trunk(model, config)
    trunk: Any = load_trunk(model, config)
    assert trunk.lm_head.weight is trunk.model.embed_tokens.weight


def test_a_bias_that_a_dream_must_have(dllm: Callable[[str], Path], tmp_path: Path):
    model = str(broken(dllm("Dream"), tmp_path / "model", without("model.layers.0.self_attn.q_proj.bias")))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.bias"):
        check_trunk(model, load_config(model, False))
