"""Random tiny checkpoints of diffusion language models, as they are published: tensor names, config.json, tokenizer, no code.

Place in the flow: they stand in for MODEL as `standins` do for AR checkpoints, from which they are made: tensors are renamed,
settings written under the published keys. These names are written out here and not read from `convert/`, so that a mistake there
shows. The mask token is a token of the tokenizer with a row of its own; every table is untied, as the published ones are.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig, AutoTokenizer

from diffvl.demo.standins import make_trunk
from diffvl.errors import UsageError
from diffvl.store.files import read_json, share

STOCK = {"llada": "llama", "Dream": "qwen2", "sdar": "qwen3", "sdar_moe": "qwen3_moe"}
DLLMS: tuple[str, ...] = tuple(STOCK)
MASK = {"llada": "<|mdm_mask|>", "Dream": "<|mask|>", "sdar": "<|MASK|>", "sdar_moe": "<|MASK|>"}
CLASS = {"llada": "LLaDAModelLM", "Dream": "DreamModel", "sdar": "SDARForCausalLM", "sdar_moe": "SDARMoeForCausalLM"}
ROPE_THETA = 500_000.0  # not the stock default, so that a lost one shows
SPARE_ROWS = 16
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# As published: an assistant's header stands at the end whether it is asked for or not.
LLADA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
LLADA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLADA_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
    "model.layers": "model.transformer.blocks",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def make_dllm(directory: Path, model_type: str, seed: int = 0) -> Path:
    """Writes a diffusion language model of `model_type` (one of DLLMS) with tokenizer and chat template; returns `directory`."""
    if model_type not in STOCK:
        raise UsageError(f"no stand-in of type {model_type!r}: expected one of {', '.join(DLLMS)}")
    make_trunk(directory, STOCK[model_type], seed)
    stock: Any = AutoConfig.from_pretrained(directory)
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    mask = _add_tokens(tokenizer, model_type)
    tensors = _untied(load_file(directory / WEIGHTS), len(tokenizer) + SPARE_ROWS, seed)
    stock.vocab_size = len(tensors[EMBEDDING])
    save_file({_published(model_type, name): tensor for name, tensor in tensors.items()}, directory / WEIGHTS, {"format": "pt"})
    share(directory)
    tokenizer.save_pretrained(directory)
    if model_type != "llada":
        _split_tokenizer(directory, model_type)
    code = {"AutoConfig": "configuration_own.Config", "AutoModel": f"modeling_own.{CLASS[model_type]}"}
    config = {
        "architectures": [CLASS[model_type]],
        "auto_map": code,
        "model_type": model_type,
        "mask_token_id": mask,
        "torch_dtype": "float32",
        "transformers_version": "4.52.4",
        "use_cache": False,
        **{key: getattr(stock, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **CONFIGS[model_type](stock),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


# --- tensors -------------------------------------------------------------------------------------------------------------


def _untied(tensors: dict[str, torch.Tensor], rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Gives the table that many rows, and the head weights of its own."""
    generator = torch.Generator().manual_seed(seed)
    embedding = tensors[EMBEDDING]
    fresh = torch.randn(max(0, rows - len(embedding)), embedding.shape[1], generator=generator) * embedding.std()
    table = torch.cat([embedding, fresh])
    head = tensors.get(HEAD, embedding.flip(1))
    return {**tensors, EMBEDDING: table, HEAD: torch.cat([head, fresh.flip(0) * head.std() / embedding.std()])}


def _published(model_type: str, name: str) -> str:
    if model_type == "llada":
        for stock, own in LLADA_NAMES.items():
            name = name.replace(stock, own)
    return name


# --- settings ------------------------------------------------------------------------------------------------------------


def _llada(stock: Any) -> dict[str, Any]:
    return {
        "d_model": stock.hidden_size,
        "mlp_hidden_size": stock.intermediate_size,
        "n_layers": stock.num_hidden_layers,
        "n_heads": stock.num_attention_heads,
        "n_kv_heads": stock.num_key_value_heads,
        "max_sequence_length": stock.max_position_embeddings,
        "rms_norm_eps": stock.rms_norm_eps,
        "rope_theta": ROPE_THETA,
        "vocab_size": stock.vocab_size,
        "embedding_size": stock.vocab_size,
        "weight_tying": False,
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "embedding_dropout": 0.0,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
    }


def _same_names(*more: str) -> Callable[[Any], dict[str, Any]]:
    """Settings of a model that kept the names of a Qwen."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act")
    names += ("max_position_embeddings", "rms_norm_eps", "vocab_size", "initializer_range", "attention_dropout", *more)
    fixed = {"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "tie_word_embeddings": False}

    def settings(stock: Any) -> dict[str, Any]:
        rope = {"rope_theta": ROPE_THETA, "max_window_layers": stock.num_hidden_layers}
        return {**{name: getattr(stock, name) for name in names}, **fixed, **rope}

    return settings


def _sdar(*more: str) -> Callable[[Any], dict[str, Any]]:
    """As the finetuning folders have it; the released configurations name neither mask token nor block size."""
    fixed = {"attn_implementation": "flex_attention", "block_size": 4, "debug": False, "ep_size": 1, "fuse_cross_entropy": True}
    qwen = _same_names("attention_bias", "head_dim", *more)
    return lambda stock: {**qwen(stock), **fixed, "micro_forward": False, "skip_checkpoint": False, "use_deepep": False}


EXPERTS = ("decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size", "norm_topk_prob", "num_experts")
EXPERTS += ("num_experts_per_tok", "output_router_logits", "router_aux_loss_coef")
CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llada": _llada,
    "Dream": _same_names(),
    "sdar": _sdar(),
    "sdar_moe": _sdar(*EXPERTS),
}


# --- tokenizer -----------------------------------------------------------------------------------------------------------


def _add_tokens(tokenizer: Any, model_type: str) -> int:
    """Gives a tokenizer what the published ones have; returns the id of the mask token. LLaDA's does not say which it is."""
    if model_type == "llada":
        tokenizer.add_special_tokens({"bos_token": "<|startoftext|>"})
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in LLADA_TOKENS], special_tokens=True)
        tokenizer.chat_template = LLADA_TEMPLATE
    tokenizer.add_tokens([AddedToken(MASK[model_type], special=True, normalized=False)], special_tokens=True)
    if model_type != "llada":
        tokenizer.add_special_tokens({"mask_token": MASK[model_type]})
    return tokenizer.convert_tokens_to_ids(MASK[model_type])


def _split_tokenizer(directory: Path, model_type: str) -> None:
    """Writes vocab.json and merges.txt in the place of tokenizer.json, and names tokenizer code that is not there."""
    whole = read_json(directory / "tokenizer.json")
    (directory / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in whole["model"]["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (directory / "tokenizer.json").unlink()
    own = "DreamTokenizer" if model_type == "Dream" else "Qwen2Tokenizer"
    settings = read_json(directory / "tokenizer_config.json")
    added = {str(token.pop("id")): token for token in whole["added_tokens"]}
    settings |= {"tokenizer_class": own, "auto_map": {"AutoTokenizer": [f"tokenization_own.{own}", None]}}
    settings["added_tokens_decoder"] = added
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
