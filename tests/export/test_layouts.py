"""What an export writes, in each layout: names, shapes, settings, code; and that it is the same model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, weights_of
from safetensors.torch import load_file
from transformers import AutoTokenizer

from diffvl.config.families import family_of
from diffvl.demo.standins import QWEN3_ROWS
from diffvl.export import code, sdar_v, shards
from diffvl.export import run as export_run
from diffvl.export.remote.configuration_llava_onevision import LlavaOnevisionConfig
from diffvl.export.remote.configuration_sdar import SDARConfig
from diffvl.export.remote.modeling_llava_onevision import LlavaOnevisionForConditionalGeneration
from diffvl.export.remote.modeling_sdar import SDARForCausalLM
from diffvl.export.run import LAYOUTS, export
from diffvl.export.source import Run
from diffvl.store.checkpoint import HUB, HUB_FILES, load_checkpoint
from diffvl.store.files import read_json

BLOCK, MASK = 4, 151669
# Tensors of the released 4B checkpoints, without numbers of layers (from the public model folders), and their totals.
OF_LAYERS = r"(mlp\.(gate|up|down)_proj|self_attn\.([qkvo]_proj|[qk]_norm)|(input|post_attention)_layernorm)\.weight"
TEXT_NAMES = rf"(model\.(embed_tokens|norm)|lm_head)\.weight|model\.layers\.\d+\.{OF_LAYERS}"
VISION_NAMES = (
    r"image_newline|multi_modal_projector\.linear_[12]\.(weight|bias)"
    r"|vision_tower\.vision_model\.(embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.([qkv]|out)_proj)\.(weight|bias)"
    r"|post_layernorm\.(weight|bias))"
)
QWEN3_4B: dict[str, Any] = {"hidden_size": 2560, "intermediate_size": 9728}
SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}


@pytest.mark.parametrize("layout", ["native", "sdar"])
def test_every_layout_is_the_same_model(layout: str, run: Run, small: Run, in_this_process: None, tmp_path: Path):
    figures = export((small if layout == "native" else run).directory, layout, tmp_path / "out", QUIET)
    kinds = {"prefill", "denoised", "stored", "following"}
    images = set() if layout == "sdar" else {f"{kind}, with an image" for kind in kinds}
    assert figures.keys() == kinds | images and max(figures.values()) <= 1e-5
    assert not (tmp_path / "out" / export_run.MARK).exists() and not (tmp_path / "out.partial").exists()
    told = read_json(tmp_path / "out" / "diffvl.json")
    assert told["export"]["layout"] == layout and told["export"]["parity"] == figures
    assert told["kind"] == ("prepared" if layout == "native" else "export")


def test_a_clean_process_proves_it(run: Run, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]):
    """Without diffvl, PYTHONPATH or the user's caches; SDAR-VL's layout has the most code of its own."""
    code, out, err = run_cli("export", str(run.directory), "--layout", "sdar_v", "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert "proving parity in a clean process" in out and "parity: largest difference" in out
    figures = read_json(tmp_path / "out" / "diffvl.json")["export"]["parity"]
    assert len(figures) == 8 and max(figures.values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "layout"), [("qwen3", "native"), ("qwen3", "sdar"), ("qwen3_moe", "sdar"), ("qwen3_moe", "sdar_v")]
)
def test_a_clean_process_proves_the_other_layouts(model_type: str, layout: str, finished: Callable[[str], Path], tmp_path: Path):
    assert max(export(finished(model_type), layout, tmp_path / "out", QUIET).values()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen2_5_vl", "llava_onevision"])
def test_native_is_for_every_family(model_type: str, prepared: Callable[[str], Path], in_this_process: None, tmp_path: Path):
    assert max(export(prepared(model_type), "native", tmp_path / "out", QUIET).values()) <= 1e-5


# --- sdar_v ----------------------------------------------------------------------------------------------------------------


def test_sdar_vl_has_the_tensors_of_the_released_checkpoint():
    """841 tensors, 9,667,843,808 bytes in bf16; every name is one of theirs."""
    config = LlavaOnevisionConfig(text_config={**QWEN3_4B, "rope_theta": 1e6}, vision_config=SIGLIP)
    with torch.device("meta"):
        tensors = LlavaOnevisionForConditionalGeneration(config).state_dict()
    assert len(tensors) == 841 and 2 * sum(tensor.numel() for tensor in tensors.values()) == 9_667_843_808
    text = {name.removeprefix("language_model.") for name in tensors if name.startswith("language_model.")}
    assert all(re.fullmatch(TEXT_NAMES, name) for name in text)
    assert all(re.fullmatch(VISION_NAMES, name) for name in tensors if not name.startswith("language_model."))


@pytest.fixture(scope="module")
def written(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout sdar_v of the run, without its proof."""
    directory = tmp_path_factory.mktemp("written")
    sdar_v.write(run, directory)
    return directory


def test_sdar_vl_is_written_to_the_letter(run: Run, written: Path):
    tmp_path = written
    tensors = weights_of(tmp_path)
    own = weights_of(run.directory)
    for name, tensor in tensors.items():
        assert re.fullmatch(VISION_NAMES, name) or re.fullmatch(TEXT_NAMES, name.removeprefix("language_model.")), name
        assert tensor.dtype == torch.float32
    assert torch.equal(tensors["language_model.lm_head.weight"], own["language_model.model.embed_tokens.weight"])
    assert torch.equal(tensors["image_newline"], own["image_newline"])
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"] and config["model_type"] == "sdar_v"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"}
    assert (config["image_token_index"], config["video_token_index"]) == (151655, 151656)
    assert config["image_grid_pinpoints"] == [[32, 32], [32, 64], [64, 32], [64, 64]]
    assert (config["vision_aspect_ratio"], config["vision_feature_layer"]) == ("anyres_max_3", -1)
    text = config["text_config"]
    assert (text["model_type"], text["architectures"]) == ("sdar", ["SDAR"])
    assert (text["block_size"], text["mask_token_id"]) == (BLOCK, MASK)
    assert not text["tie_word_embeddings"] and not config["tie_word_embeddings"] and text["rope_theta"] == 10000.0
    assert config["vision_config"]["vision_use_head"] is False and text["vocab_size"] == QWEN3_ROWS
    for names in (config["auto_map"], text["auto_map"]):
        for place in names.values():
            module, _, name = place.partition(".")
            assert f"class {name}(" in (tmp_path / f"{module}.py").read_text(encoding="utf-8")
    processor = read_json(tmp_path / "processor_config.json")
    assert processor["processor_class"] == "LlavaOnevisionProcessor" and processor["num_image_tokens"] == 16
    images = read_json(tmp_path / "preprocessor_config.json")
    assert images["image_grid_pinpoints"] == config["image_grid_pinpoints"] and images["size"] == {"height": 32, "width": 32}
    assert read_json(tmp_path / "added_tokens.json")["<|MASK|>"] == MASK
    assert read_json(tmp_path / "special_tokens_map.json")["mask_token"] == "<|MASK|>"


def test_the_chat_template_takes_parts_and_says_the_same(run: Run, written: Path):
    """transformers' own processor hands content over in parts; the text is the run's own."""
    tokenizer: Any = AutoTokenizer.from_pretrained(written)
    image = run.processor.image_token
    for text in (" What?\n", "naïve"):
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        rendered = [
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
            for content in (f"{image}{text}", parts)
        ]
        own = run.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        assert rendered[0] == rendered[1] == own


def test_code_beside_weights_is_the_package_s_own(written: Path):
    """Line for line, but for imports of neighbours."""
    for file in written.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        own = ((HUB if file.name in HUB_FILES else code.REMOTE) / file.name).read_text(encoding="utf-8")
        differing = [(theirs, ours) for theirs, ours in zip(text.splitlines(), own.splitlines(), strict=True) if theirs != ours]
        assert all(re.match(r"from \.\w+ import ", theirs) and "from diffvl." in ours for theirs, ours in differing)
        assert "from diffvl" not in text and "import diffvl" not in text


# --- sdar ------------------------------------------------------------------------------------------------------------------


def test_sdar_is_written_to_the_letter(run: Run, tmp_path: Path):
    LAYOUTS["sdar"].write(run, tmp_path)
    assert all(re.fullmatch(TEXT_NAMES, name) for name in weights_of(tmp_path))
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == ["SDARForCausalLM"] and config["model_type"] == "sdar"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_sdar.SDARForCausalLM"
    assert (config["mask_token_id"], config["block_size"]) == (MASK, BLOCK)
    assert (tmp_path / "sglang.yaml").read_text(encoding="utf-8") == "block_size: 4\n"
    family = family_of("sdar").loads_as
    assert family is not None and set(family.requires) <= config.keys()  # so that it can be read back


def test_sdar_has_the_tensors_of_the_released_checkpoint():
    config: Any = SDARConfig(**QWEN3_4B)
    with torch.device("meta"):
        tensors = SDARForCausalLM(config).state_dict()
    assert len(tensors) == 399 and 2 * sum(tensor.numel() for tensor in tensors.values()) == 8_822_848_512


def test_an_engine_finds_the_base_of_the_rotation():
    """SGLang takes 10,000 where the configuration has no attribute of that name, whatever `rope_parameters` say."""
    config = SDARConfig(rope_theta=1e6)
    assert config.rope_theta == 1e6 and config.rope_parameters["rope_theta"] == 1e6
    again = SDARConfig(**json.loads(config.to_json_string()))
    assert again.rope_theta == 1e6 and again.stock_settings() == config.stock_settings()


def test_other_rotations_are_refused_by_the_configuration():
    with pytest.raises(ValueError, match="rope_scaling is not in this layout"):
        SDARConfig(rope_scaling={"rope_type": "yarn", "factor": 4.0})


# --- shards ----------------------------------------------------------------------------------------------------------------


def test_large_checkpoints_are_written_in_shards(
    small: Run, in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10**5)
    monkeypatch.setattr(shards, "HEADER_ROOM", 0)
    export(small.directory, "native", tmp_path / "out", QUIET)
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    written = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    own = weights_of(small.directory)
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in own.values())
    load_checkpoint(tmp_path / "out")


def test_what_needs_no_change_is_copied(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Byte for byte, and no weight is read."""
    monkeypatch.setattr(shards, "save_file", None)
    LAYOUTS["native"].write(small, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (small.directory / "model.safetensors").read_bytes()
