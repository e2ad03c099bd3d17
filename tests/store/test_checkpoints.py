"""Checkpoints as people bring them: each is converted, or refused in one message before any work, by `convert`, by its dry run
and by `doctor` alike; nothing is written."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_checkpoints as made
import huggingface_hub
import pytest
import torch
from broken_checkpoints import broken
from tiny_runs import Workshop, command, the_message, workshop
from transformers import LlamaConfig, LlamaForCausalLM

from diffvl.config.supported import check_supported
from diffvl.demo import standins
from diffvl.errors import DiffvlError
from diffvl.store.published import load_config
from diffvl.store.weights import check_tower, check_trunk, load_trunk, tower_config

Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def convert(source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path) -> Workshop:
    return workshop(source, tower, shapes, tmp_path)


def all_refuse(convert: Workshop, model: Path, says: list[str], *words: str) -> None:
    """`convert`, its dry run and `doctor` say the same."""
    convert.refuses(*words, model=model, says=says)
    convert.refuses("--dry-run", *words, model=model, says=says)
    ended = command("doctor", model, *words)
    assert ended.code in (1, 2), ended
    told = the_message(ended.err) if ended.code == 2 else ended.out
    for text in says:
        assert text in told, (text, told)


HEAD = 'the checkpoint lacks lm_head.weight. If the embedding is the head, set "tie_word_embeddings": true in its config.json'
HTML = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"

MISFITS: dict[str, tuple[str, Change, list[str]]] = {
    "vocab_size": (
        "llama",
        made.config(vocab_size=300),
        [
            "/model.safetensors: model.embed_tokens.weight has the shape [268, 64], but config.json asks for [300, 64] "
            "(vocab_size 300)"
        ],
    ),
    "fewer rows": ("qwen2", made.config(vocab_size=270), ["embed_tokens.weight has the", "[284, 64]", "vocab_size 270); 1 more"]),
    "width": ("llama", made.config(hidden_size=32), ["[268, 64]", "asks for [268, 32] (hidden_size 32); 19 more tensors"]),
    "heads": ("llama", made.config(num_attention_heads=8), ["o_proj.weight has the shape [64, 64]", "[64, 128]; 3 more"]),
    "key heads": ("llama", made.config(num_key_value_heads=4), ["k_proj.weight has the shape [32, 64]"]),
    "heads that do not divide": ("qwen2", made.config(num_attention_heads=7), ["config.json"]),
    "intermediate": ("llama", made.config(intermediate_size=96), ["asks for [64, 96]; 5 more tensors differ too"]),
    "experts": ("qwen3_moe", made.config(num_local_experts=5), ["asks for [5, "]),
    "a layer more": ("llama", made.config(num_hidden_layers=3), ["lacks model.layers.2.input_layernorm.weight, ", "and 6 more"]),
    "a layer less": ("llama", made.config(num_hidden_layers=1), ["has model.layers.1.", "and 6 more besides"]),
    "no head": ("llama", made.config(tie_word_embeddings=False), [HEAD]),
    "foreign tensor": (
        "llama",
        made.tensors(lambda content: {**content, "model.value_head.weight": torch.ones(1, 64)}),
        ["has model.value_head.weight besides"],
    ),
    "own head, called tied": (
        "qwen2",
        made.config(tie_word_embeddings=True),
        ["model.safetensors: lm_head.weight differs from model.embed_tokens.weight", '"tie_word_embeddings": true'],
    ),
    "own head in shards": (
        "qwen2",
        made.both(made.sharded, made.config(tie_word_embeddings=True)),
        ["-of-", "lm_head.weight differs from model.embed_tokens.weight"],
    ),
}  # fmt: skip

FILES: dict[str, tuple[Change, list[str]]] = {
    "bin": (made.pickled, ["its weights are pickled (pytorch_model.bin)", 'python -c "from']),
    "bin shards": (
        made.both(
            made.pickled, lambda model: (model / "pytorch_model.bin").rename(model / "pytorch_model-00001-of-00002.bin")
        ),
        ["its weights are pickled (pytorch_model-00001-of-00002.bin)"],
    ),
    "another name": (
        lambda model: (model / "model.safetensors").rename(model / "consolidated.safetensors"),
        ["expected model.safetensors, or shards with model.safetensors.index.json; there is consolidated.safetensors"],
    ),
    "no index": (
        made.both(made.sharded, made.without("model.safetensors.index.json")),
        ["there is model-00001-of-0", "their index is missing: fetch it"],
    ),
    "empty": (made.instead(b""), ["/model.safetensors: the file is empty (0 bytes)"]),
    "pointer": (made.instead(POINTER), ["/model.safetensors: a git-lfs pointer", "git lfs pull"]),
    "web page": (made.instead(HTML), ["/model.safetensors: a web page, not the file itself"]),
    "noise": (made.instead(bytes(range(256)) * 20), ["/model.safetensors: damaged"]),
    "short header": (made.instead(b"\x10"), ["/model.safetensors: damaged or cut short (1 bytes do not hold its header)"]),
    "bytes missing": (made.short(10), ["/model.safetensors: cut short: ", " bytes, where its header names "]),
    "index as a pointer": (
        made.both(made.sharded, made.instead(POINTER, "model.safetensors.index.json")),
        ["/model.safetensors.index.json: a git-lfs pointer"],
    ),
    "index without a map": (
        made.both(made.sharded, made.instead(b"{}", "model.safetensors.index.json")),
        ["/model.safetensors.index.json: no weight_map"],
    ),
    "index that is no JSON": (
        made.both(made.sharded, made.instead(b"{", "model.safetensors.index.json")),
        ["/model.safetensors.index.json: damaged, not readable as JSON"],
    ),
    "shard missing": (made.in_shards(lambda shard: shard.unlink()), ["5 weight files that model.safetensors.index.json names"]),
    "shard empty": (made.in_shards(lambda shard: shard.write_bytes(b"")), ["-of-", "the file is empty (0 bytes)"]),
    "shard cut": (made.in_shards(lambda shard: shard.write_bytes(shard.read_bytes()[:-4])), ["-of-", "cut short: "]),
    "shard of a page": (made.in_shards(lambda shard: shard.write_bytes(HTML)), ["-of-", "a web page"]),
}  # fmt: skip

METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "(gptq, 4 bits)"),
    "awq": ({"quant_method": "awq", "bits": 4}, "(awq, 4 bits)"),
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "(bitsandbytes, 4 bits)"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "(compressed-tensors)"),
    "mxfp4": ({"quant_method": "mxfp4"}, "(mxfp4)"),
}
QUANTIZED: dict[str, tuple[Change, list[str]]] = {
    **{name: (made.config(quantization_config=settings), [words]) for name, (settings, words) in METHODS.items()},
    "in the text part": (made.config(text_config={"quantization_config": {"quant_method": "gptq"}}), ["(gptq)"]),
    "mlx": (made.config(quantization={"group_size": 64, "bits": 4}), ["(4 bits)"]),
    "old gptq": (made.beside("quantize_config.json", bits=4), ["(GPTQ, says quantize_config.json)"]),
    "fp8 tensors": (
        made.tensors(lambda content: {name: tensor.to(torch.float8_e4m3fn) for name, tensor in content.items()}),
        ["model.safetensors holds ", " as F8_E4M3"],
    ),
    "int8 tensors": (
        made.tensors(lambda content: {name: tensor.to(torch.int8) for name, tensor in content.items()}),
        ["model.embed_tokens.weight is I8"],
    ),
    "packed tensors": (
        made.tensors(lambda content: {**content, "model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2, dtype=torch.int32)}),
        ["model.safetensors holds model.layers.0.mlp.up_proj.qweight as I32"],
    ),
}


def read(model: Path, trust_remote_code: bool = False) -> None:
    """What the three commands ask of a checkpoint, in their order."""
    config = load_config(str(model), trust_remote_code)
    check_supported(config)
    check_trunk(str(model), config)


def message(model: Path) -> str:
    with pytest.raises(DiffvlError) as caught:
        read(model)
    return str(caught.value)


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_the_configuration(case: str, source: Callable[[str], Path], tmp_path: Path):
    model_type, change, says = MISFITS[case]
    told = message(broken(source(model_type), tmp_path / "model", change))
    assert told.startswith(f"{tmp_path}/model") and all(text in told for text in says), told


@pytest.mark.parametrize("case", FILES)
def test_weight_files_that_are_not_whole(case: str, source: Callable[[str], Path], tmp_path: Path):
    change, says = FILES[case]
    told = message(broken(source("llama"), tmp_path / "model", change))
    assert told.startswith(f"{tmp_path}/model") and all(text in told for text in says), told


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights(case: str, source: Callable[[str], Path], tmp_path: Path):
    change, says = QUANTIZED[case]
    told = message(broken(source("llama"), tmp_path / "model", change))
    assert told.startswith(f"{tmp_path}/model: its weights are quantized ("), told
    assert "cannot be trained. Give the checkpoint that" in told and all(text in told for text in says), told


ONE_OF_EACH: dict[str, tuple[str, Change, list[str]]] = {
    **{name: MISFITS[name] for name in ("vocab_size", "a layer less", "own head, called tied")},
    **{name: ("llama", *FILES[name]) for name in ("bin", "pointer", "shard missing")},
    **{name: ("llama", *QUANTIZED[name]) for name in ("gptq", "int8 tensors")},
}


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_all_commands_know_it_before_any_work(case: str, convert: Workshop, source: Callable[[str], Path], tmp_path: Path):
    model_type, change, says = ONE_OF_EACH[case]
    all_refuse(convert, broken(source(model_type), tmp_path / "model", change), says)


def test_the_original_of_quantized_weights_is_named_where_it_is_known(source: Callable[[str], Path], tmp_path: Path):
    model = broken(source("llama"), tmp_path / "model", made.config(quantization_config={"quant_method": "awq"}))
    (model / "README.md").write_text("---\nlicense: mit\nbase_model:\n- someone/original\n---\n# AWQ\n", encoding="utf-8")
    assert "made from (someone/original, says its README.md), with weights in bf16, fp16 or fp32" in message(model)


def test_the_way_out_of_pickled_weights_works(source: Callable[[str], Path], tmp_path: Path):
    model = broken(source("llama"), tmp_path / "model", made.pickled)
    told = message(model)
    exec(told[told.index('python -c "') + len('python -c "') : told.rindex('"')], {})
    read(model)


def test_an_adapter_is_not_a_model(convert: Workshop, tmp_path: Path):
    model = broken(convert.trunk, tmp_path / "model", made.adapter_alone)
    says = [
        f"{model}: a LoRA adapter for someone/base (adapter_config.json), not a whole model; merge it into someone/base first"
    ]
    all_refuse(convert, model, says)


def test_an_adapter_beside_the_weights_is_not_put_on_them_in_silence(convert: Workshop, tmp_path: Path):
    change = made.beside("adapter_config.json", peft_type="LORA", base_model_name_or_path="someone/base", r=2)
    model = broken(convert.trunk, tmp_path / "model", change)
    all_refuse(
        convert, model, [f"{model}: a LoRA adapter (adapter_config.json) lies beside the weights", "merge it into someone/base"]
    )


def test_code_of_the_checkpoint_cannot_come_along(convert: Workshop, tmp_path: Path):
    model = broken(convert.trunk, tmp_path / "model", made.own_code("own-llama"))
    says = [
        "transformers has no class of its own for model_type 'own-llama'; the checkpoint brings one along (own.OwnForCausalLM)"
    ]
    says += ["so it cannot be converted, with --trust-remote-code neither"]
    all_refuse(convert, model, says)
    assert not (tmp_path / "modules").exists(), "the code was not read"
    all_refuse(convert, model, says, "--trust-remote-code")


def test_code_of_a_vision_tower_cannot_come_along(convert: Workshop, tower: Path, tmp_path: Path):
    code = (
        made.REMOTE.replace("own-llama", "own-vision")
        .replace("Llama", "SiglipVision")
        .replace("SiglipVisionForCausalLM", "SiglipVisionModel")
    )

    def change(folder: Path) -> None:
        (folder / "own.py").write_text(code, encoding="utf-8")
        names = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnForCausalLM"}
        made.edit_json(folder / "config.json", model_type="own-vision", auto_map=names)

    own = broken(tower, tmp_path / "own", change)
    for words in ((), ("--trust-remote-code",)):
        says = [f"{own}: transformers has no class of its own for model_type 'own-vision'", "(own.OwnForCausalLM)"]
        convert.refuses("--set", f"prepare.vision_tower={own}", *words, says=says)


TOWER_FAULTS: dict[str, tuple[Change, list[str]]] = {
    "width": (made.config(hidden_size=16), ["/model.safetensors: ", "but config.json asks for [16"]),
    "a layer more": (made.config(num_hidden_layers=4), ["lacks encoder.layers.3."]),
    "a layer less": (made.config(num_hidden_layers=2), ["has encoder.layers.2.", "besides"]),
    "image": (made.config(image_size=64), ["embeddings.position_embedding.weight has the shape [16, 32]", "[64, 32]"]),
    "bin": (made.pickled, ["its weights are pickled (pytorch_model.bin)", "import AutoModel as M"]),
    "quantized": (made.config(quantization_config={"quant_method": "gptq", "bits": 4}), ["quantized (gptq, 4 bits)"]),
    "cut": (made.short(10), ["cut short: "]),
    "adapter": (made.beside("adapter_config.json", peft_type="LORA"), ["lies beside the weights"]),
}


@pytest.mark.parametrize("case", TOWER_FAULTS)
def test_a_vision_tower_that_is_not_whole(case: str, tower: Path, tmp_path: Path):
    change, says = TOWER_FAULTS[case]
    bad = broken(tower, tmp_path / "bad", change)
    with pytest.raises(DiffvlError) as caught:
        check_tower(str(bad), tower_config(str(bad), False))
    told = str(caught.value)
    assert told.startswith(str(bad)) and all(text in told for text in says), told


def test_a_tower_of_another_width_is_known_before_any_work(convert: Workshop, tower: Path, tmp_path: Path):
    bad = broken(tower, tmp_path / "bad", TOWER_FAULTS["width"][0])
    for words in ((), ("--dry-run",)):
        convert.refuses("--set", f"prepare.vision_tower={bad}", *words, says=[f"{bad}/model.safetensors: ", "[16"])


@pytest.mark.parametrize("kind", [*standins.TOWERS, standins.FULL_CLIP])
def test_a_vision_half_may_leave_the_text_half_unread(kind: str, tmp_path: Path):
    made_tower = standins.make_tower(tmp_path, kind)
    check_tower(str(made_tower), tower_config(str(made_tower), False))


# --- what is no fault ------------------------------------------------------------------------------------------------------


def tied_twice(content: made.Tensors) -> made.Tensors:
    return {**content, "lm_head.weight": content["model.embed_tokens.weight"].clone()}


RIGHT: dict[str, tuple[str, Change]] = {
    "rotary buffers of old": (
        "llama",
        made.tensors(lambda content: {**content, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}),
    ),
    "masks of old": (
        "gpt2",
        made.tensors(lambda content: {**content, "transformer.h.0.attn.bias": torch.ones(1, 1, 512, 512, dtype=torch.uint8)}),
    ),
    "without the prefix": (
        "gpt2",
        made.tensors(lambda content: {name.removeprefix("transformer."): tensor for name, tensor in content.items()}),
    ),
    "a head that is the embedding": ("llama", made.tensors(tied_twice)),
    "a head that is the embedding, in shards": ("llama", made.both(made.tensors(tied_twice), made.sharded)),
    "shards": ("qwen3_moe", made.sharded),
    "null": ("llama", made.config(quantization_config=None)),
    "half precision": ("llama", made.tensors(lambda content: {name: tensor.half() for name, tensor in content.items()})),
    "its own code besides": ("llama", made.own_code("llama")),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_transformers_accepts_is_accepted(case: str, source: Callable[[str], Path], tmp_path: Path):
    model_type, change = RIGHT[case]
    model = broken(source(model_type), tmp_path / "model", change)
    read(model)
    load_trunk(str(model), load_config(str(model), False))


def test_of_two_classes_that_of_transformers_is_taken(convert: Workshop, tmp_path: Path):
    model = broken(convert.trunk, tmp_path / "model", made.own_code("llama"))
    for trusted in (False, True):
        config = load_config(str(model), trusted)
        assert type(config) is LlamaConfig and type(load_trunk(str(model), config)) is LlamaForCausalLM
