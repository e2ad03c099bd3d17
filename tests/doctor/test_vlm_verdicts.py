"""`diffvl doctor` on vision-language models: what is supported passes with images, the rest is refused for the right reason."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PretrainedConfig

from diffvl.config.supported import is_vlm, is_vlm_type, vlm_refusal
from diffvl.demo.standin_processors import PROCESSORS
from diffvl.demo.standin_vlms import VLMS, make_vlm
from diffvl.doctor import tiny_vlm
from diffvl.doctor.doctor import examine, judge
from diffvl.doctor.survey import judge_vlm_type
from diffvl.doctor.verdict import Verdict
from diffvl.doctor.vlm_defaults import default_vlm_config
from diffvl.doctor.vlm_verdict import SPARE_TOKEN, judge_vlm
from diffvl.prepare import source_traits
from diffvl.prepare.attention_proof import TOLERANCE

CHECKS = [
    *("own forward", "AR parity", "position ids", "images show", "no leak", "a leak is caught", "block sees itself"),
    *("clean stream untouched", "direct forward", "train = decode", "image cut in two", "packed in one row"),
    *("head on some rows", "head in chunks", "gradients", "new token"),
]
# Packed patches, tiles with newlines, spans, frames as images.
DIFFERENT = ("qwen2_5_vl", "llava_next", "gemma3", "smolvlm")


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**settings)


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def require_passes(verdict: Verdict, rule: str) -> None:
    assert (verdict.answer, verdict.kind, verdict.reason) == ("supported", "", "")
    assert [check.name for check in verdict.checks] == CHECKS and failed(verdict) == set()
    assert verdict.image_attention == rule
    assert verdict.worst_error is not None and verdict.worst_error < 2e-5, "measured: below 9e-6"
    seen = [check.error for check in verdict.checks if check.wanted.startswith(">")]
    assert len(seen) == 3 and all(change is not None and change > 10 * TOLERANCE for change in seen)


# --- what is supported -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type", [*DIFFERENT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in VLMS if kind not in DIFFERENT)]
)
def test_every_stand_in_passes(model_type: str, source: Callable[[str], Path], tmp_path: Path):
    whole = model_type in PROCESSORS
    verdict = examine(str(source(model_type) if whole else make_vlm(tmp_path, model_type)))
    require_passes(verdict, "runs" if model_type == "gemma3" else "causal")
    assert (verdict.model_type, verdict.image_inputs[0]) == (model_type, "pixel_values")
    assert ("its processor was not looked at" in verdict.template) != whole


def test_of_a_diffvl_directory_the_source_is_probed(prepared: Callable[[str], Path]):
    verdict = examine(str(prepared("gemma3")))
    require_passes(verdict, "runs")
    assert verdict.model_type == "gemma3"


def test_a_processor_that_cannot_be_used_is_a_reason(source: Callable[[str], Path], tmp_path: Path):
    """By the same proof as prepare's, after the architecture has passed."""
    model = tmp_path / "model"
    shutil.copytree(source("llava"), model)
    (model / "processor_config.json").write_text('{"processor_class": "NoSuchProcessor"}', encoding="utf-8")
    verdict = examine(str(model))
    assert (verdict.answer, verdict.kind, verdict.attention_holds) == ("not supported", "processor", True)
    assert "transformers has no processor for it (NoSuchProcessor)" in verdict.reason


# Sizes as published checkpoints have them, where they differ from the defaults in more than a width.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen2.5-VL-3B": (
        *("qwen2_5_vl", "causal"),
        {
            "tie_word_embeddings": True,
            "text_config": {
                **{"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
                **{"use_sliding_window": False, "max_window_layers": 70, "sliding_window": 32768, "tie_word_embeddings": True},
                "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            },
            "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
        },
    ),
    "SmolVLM2-2.2B": (
        *("smolvlm", "causal"),
        {
            "scale_factor": 3,
            "text_config": {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64},
            "vision_config": {"hidden_size": 1152, "image_size": 384, "patch_size": 14, "num_hidden_layers": 27},
        },
    ),
    "Gemma-3-4B": (
        *("gemma3", "runs"),
        {
            "text_config": {
                **{"hidden_size": 2560, "num_hidden_layers": 34, "head_dim": 256, "sliding_window": 1024},
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": {"image_size": 896, "patch_size": 14, "num_hidden_layers": 27, "vision_use_head": False},
        },
    ),
    "Pixtral-12B": (
        *("llava", "causal"),
        {
            **{"image_token_index": 10, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
            "text_config": {"model_type": "mistral", "hidden_size": 5120, "head_dim": 128, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", "image_size": 1024, "patch_size": 16, "head_dim": 64},
        },
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("Qwen2.5-VL-3B", "Gemma-3-4B") else pytest.mark.slow) for name in PUBLISHED]
)
def test_configurations_of_published_sizes_are_shrunk_and_pass(name: str):
    model_type, rule, settings = PUBLISHED[name]
    require_passes(judge(name, config_of(model_type, **settings)), rule)


@pytest.mark.parametrize("model_type", ["molmo2", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_where_no_row_can_be_added_the_mask_token_must_be_a_spare_one(model_type: str):
    verdict = judge_vlm_type(model_type)
    assert (verdict.answer, verdict.reason, failed(verdict)) == ("supported", SPARE_TOKEN, {"new token"})


def test_a_tower_from_timm_is_replaced_and_that_is_told():
    verdict = judge_vlm_type("fast_vlm")
    require_passes(verdict, "causal")
    assert verdict.copy.endswith("; its tower, of the library timm, replaced by a stand-in")


def test_the_limit_of_the_text_part_holds_here_too():
    verdict = judge_vlm_type("llama4")
    assert (verdict.answer, verdict.limit) == ("supported", 8191)


# --- what is refused -------------------------------------------------------------------------------------------------------

REFUSED = {
    "florence2": ("encoder-decoder", "answers come from a decoder of their own"),
    "mllama": ("images not by placeholders", "its forward takes cross_attention_mask"),
    "kosmos-2": ("images not by placeholders", "its forward takes image_embeds_position_mask"),
    "blip": ("forward lacks inputs", "takes no position_ids, past_key_values, mm_encoder_outputs"),
    "qwen3_5": ("recurrent or convolutional layers", "layers of type linear_attention"),
    "lfm2_vl": ("recurrent or convolutional layers", "layers of type conv"),
    "minimax_m3_vl": ("sparse attention: not in yet", "sparse attention layers (minimax_m3_sparse)"),
    "unlimited_ocr": ("attention of another kind", "layers of type reference_sliding_attention"),
    "qwen2_5_omni_thinker": ("positions that text and images alone do not tell", "numbers its tokens with sounds in mind"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_static_refusal_gives_its_reason(model_type: str):
    kind, words = REFUSED[model_type]
    verdict = judge_vlm_type(model_type)
    assert (verdict.answer, verdict.kind, verdict.checks) == ("not supported", kind, ())
    assert verdict.reason.startswith(model_type) and words in verdict.reason


def test_a_configuration_that_names_no_image_token_is_refused():
    refused = vlm_refusal(config_of("chameleon"))  # without its map of the vocabulary
    assert refused is not None and refused.kind == "no image token"
    assert vlm_refusal(default_vlm_config("chameleon")) is None


def test_masks_that_a_forward_cannot_take_are_told(monkeypatch: pytest.MonkeyPatch):
    """PaliGemma 2 has layers of two kinds, and its forward takes one mask for all: its text part has to be given them. Other such
    models might take none there either."""
    monkeypatch.setattr(source_traits, "_masks_at", lambda _: "forward")
    text = {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 4}
    verdict = judge("paligemma2", config_of("paligemma", text_config=text))
    assert (verdict.answer, failed(verdict)) == ("not supported", {"AR parity"})
    assert "'dict' object has no attribute 'ndim'" in verdict.reason


def test_what_cannot_be_built_is_unknown_with_the_fault(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiny_vlm, "FITTINGS", {})
    verdict = judge_vlm_type("molmo2")
    assert (verdict.answer, verdict.kind) == ("unknown", "no tiny copy")
    assert verdict.reason.startswith("molmo2: no tiny copy of it could be built and shown an image (StrictDataclass")


def test_types_in_both_lists_are_vision_language_models_if_they_name_an_image_token():
    assert is_vlm(config_of("gemma3")) and is_vlm(config_of("fuyu")) and is_vlm(config_of("qwen2_vl"))
    assert not any(is_vlm(config_of(kind)) for kind in ("gemma3_text", "qwen2", "git"))
    assert is_vlm_type({"model_type": "gemma3", "image_token_index": 7}) and is_vlm_type({"model_type": "llava"})
    assert not is_vlm_type({"model_type": "gemma3"}) and not is_vlm_type({"model_type": "qwen2"})


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run_cli: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs `diffvl doctor WORDS` in this process; returns (exit code, stdout, stderr)."""
    return partial(run_cli, "doctor")


def test_the_command_tells_how_images_are_seen(run, source: Callable[[str], Path]):
    directory = str(source("gemma3"))
    code, out, err = run(directory)
    assert (code, err) == (0, "")
    assert all(name in out for name in CHECKS) and "fails" not in out
    assert "images: pixel_values; attention among image tokens: runs" in out
    assert out.endswith(f"{directory} (gemma3): supported\n")


def test_json(run, source: Callable[[str], Path]):
    code, out, _ = run(str(source("qwen2_vl")), "--json")
    figures = json.loads(out)
    assert code == 0 and figures["answer"] == "supported"
    assert (figures["image_attention"], figures["image_inputs"]) == ("causal", ["pixel_values", "image_grid_thw"])


def test_a_refused_one_is_exit_code_1(run, tmp_path: Path):
    config_of("mllama").save_pretrained(tmp_path)
    code, out, _ = run(str(tmp_path))
    assert code == 1 and "mllama does not show images as tokens of the text" in out


def test_files_that_do_not_fit_are_told_before_anything_is_probed(tmp_path: Path):
    directory = make_vlm(tmp_path, "qwen2_vl")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings["text_config"]["intermediate_size"] = 96
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    verdict = examine(str(directory))
    assert (verdict.answer, verdict.kind, verdict.checks) == ("not supported", "its files", ())


def test_judging_leaves_the_configuration_as_it_is():
    config = default_vlm_config("qwen3_vl")
    before = config.to_dict()
    judge_vlm("it", config)
    assert config.to_dict() == before
