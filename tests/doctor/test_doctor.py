"""`diffvl doctor`: what is supported passes, what is not is refused for the right reason, and every check can fail."""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_checkpoints import REMOTE, REMOTE_NAMES, broken, config
from helpers import trunks
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from diffvl.config.supported import refusal
from diffvl.demo import standins
from diffvl.doctor.checks import Check, above, below
from diffvl.doctor.doctor import examine, judge
from diffvl.doctor.verdict import Verdict, exact_up_to
from diffvl.hub import layout_diffvl
from diffvl.prepare.attention_proof import TOLERANCE, largest, smallest

CHECKS = [
    *("AR parity", "no leak", "a leak is caught", "block sees itself", "clean stream untouched", "direct forward"),
    *("doubled layout", "train = decode", "embeddings given", "head on some rows", "head in chunks", "gradients", "new token"),
]


def config_of(model_type: str, **settings: Any) -> PretrainedConfig:
    return CONFIG_MAPPING[model_type](**settings)


def verdict_on(model_type: str, **settings: Any) -> Verdict:
    return judge(model_type, config_of(model_type, **settings))


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


# --- what is supported ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", trunks())
def test_every_stand_in_passes(model_type: str, source: Callable[[str], Path]):
    verdict = examine(str(source(model_type)))
    assert (verdict.answer, verdict.model_type, verdict.kind, verdict.reason) == ("supported", model_type, "", "")
    assert [check.name for check in verdict.checks] == CHECKS and failed(verdict) == set()
    assert verdict.worst_error is not None and verdict.worst_error < 1e-5, "measured: below 4e-6"
    seen = [check.error for check in verdict.checks if check.wanted.startswith(">")]
    assert len(seen) == 2 and all(change is not None and change > 10 * TOLERANCE for change in seen)


def test_the_chat_template_is_looked_at(source: Callable[[str], Path], tmp_path: Path):
    """By the same proof as prepare's; a template that takes no system turn is no reason against a model."""
    advice = examine(str(source("gemma2"))).template
    assert advice.startswith("its chat template takes no system turn (System role not supported)")
    assert advice.endswith("prepare.system_turn=first_question puts it in front of the first question")
    assert examine(str(source("llama"))).template == ""
    model = tmp_path / "model"
    shutil.copytree(source("llama"), model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if loop.last or m['role'] == 'user' %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    verdict = examine(str(model))
    assert (verdict.answer, verdict.kind, verdict.attention_holds) == ("not supported", "chat template", True)
    assert "does not write '<|im_end|>' after answer 1" in verdict.reason
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    verdict = examine(str(model))
    assert verdict.answer == "supported" and verdict.template.startswith("no tokenizer beside it")


@pytest.mark.parametrize("model_type", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_mixture_of_experts_passes(model_type: str):
    verdict = verdict_on(model_type)
    assert verdict.answer == "supported" and "8 experts" in verdict.copy


def test_of_a_diffvl_directory_the_trunk_is_probed(prepared: Callable[[str], Path]):
    verdict = examine(str(prepared("gemma2")))
    assert (verdict.answer, verdict.model_type) == ("supported", "gemma2")


def test_a_limit_is_told_and_is_real():
    assert exact_up_to(config_of("llama4_text")) == ("floor_scale", 8191)
    assert exact_up_to(config_of("llama4_text", attn_temperature_tuning=False)) is None
    assert "direct forward" not in failed(verdict_on("llama4_text"))
    assert "direct forward" in failed(verdict_on("llama4_text", floor_scale=8))


def test_a_limit_stands_in_the_verdict(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffvl.doctor.verdict.exact_up_to", lambda config: ("floor_scale", 8191))
    verdict = verdict_on("llama")
    assert (verdict.answer, verdict.limit) == ("supported", 8191)
    assert verdict.reason == "exact while clean and noisy tokens together are at most 8,191 (floor_scale in its config.json)"


# --- what is not, by configuration and class -----------------------------------------------------------------------------

REFUSED = {
    "bloom": ("no position_ids", "bloom takes no position_ids (it counts positions by itself, as ALiBi models do)"),
    "mpt": ("no position_ids", "mpt takes no position_ids"),
    "rwkv": ("recurrent or convolutional layers", "rwkv is recurrent"),
    "qwen3_5": ("recurrent or convolutional layers", "qwen3_5 has layers of type linear_attention"),
    "deepseek_v32": ("sparse attention: not in yet", "are at most 2,048 (index_topk). Not in yet"),
    "phi4_multimodal": ("vision-language model of another kind", "its config has vision_config"),
    "moshi": ("audio model", "its config has audio_encoder_config"),
    "gemma4_text": ("per-layer embeddings: not in yet", "hidden_size_per_layer_input is 256"),
    "gemma4_unified_assistant": ("draft model", "is the draft model of another one"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_static_refusal_gives_its_reason(model_type: str):
    kind, words = REFUSED[model_type]
    verdict = verdict_on(model_type)
    assert (verdict.answer, verdict.kind) == ("not supported", kind)
    assert words in verdict.reason


def test_recurrent_layers_are_refused_from_a_directory_without_a_probe(tmp_path: Path):
    verdict = examine(str(standins.make_recurrent(tmp_path)))
    assert (verdict.answer, verdict.checks) == ("not supported", ())
    assert verdict.reason.startswith("mamba has layers of type linear_attention: only attention layers")


def test_attention_of_what_is_refused_for_another_reason_is_measured():
    """So that docs/architectures.md can tell what is worth supporting next."""
    vision, alibi = verdict_on("git"), verdict_on("mpt")
    assert vision.kind == "vision-language model of another kind" and vision.attention_holds and failed(vision) == set()
    assert not alibi.attention_holds and {"direct forward", "train = decode"} <= failed(alibi)
    per_layer = verdict_on("gemma3n_text")
    assert per_layer.attention_holds and failed(per_layer) == {"embeddings given"}


# --- what is not, by measurement -----------------------------------------------------------------------------------------


def test_a_causal_mask_inside_the_model_is_caught_by_measurement():
    assert refusal(config_of("gpt_neo")) is None, "nothing in its configuration or class tells"
    verdict = verdict_on("gpt_neo")
    assert failed(verdict) == {"block sees itself", "direct forward", "train = decode"}
    assert (verdict.answer, verdict.kind) == ("not supported", "causal mask of its own")
    assert verdict.reason.startswith("gpt_neo: it keeps a causal mask of its own, whatever mask it is given")


@pytest.mark.parametrize(
    ("model_type", "settings", "kind", "words"),
    [
        ("bert", {}, "not autoregressive", "as a decoder it needs is_decoder: true"),
        ("roberta", {"is_decoder": True}, "positions that do not start at 0", "one after pad_token_id"),
        ("openai-gpt", {}, "takes no 4-D mask", "its code takes no mask with an entry for every two tokens (it said: "),
    ],
)
def test_experiments_find_the_reason(model_type: str, settings: dict, kind: str, words: str):
    verdict = verdict_on(model_type, **settings)
    assert (verdict.answer, verdict.kind) == ("not supported", kind)
    assert words in verdict.reason


def without(monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    """Qwen2 as if its code ignored an argument."""
    original = Qwen2ForCausalLM.forward

    @functools.wraps(original)
    def deaf(self: Any, *arguments: Any, **named: Any) -> Any:
        return original(self, *arguments, **{**named, argument: None})

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", deaf)


def test_a_model_that_ignores_the_mask_is_caught(monkeypatch: pytest.MonkeyPatch):
    assert verdict_on("qwen2").answer == "supported"
    without(monkeypatch, "attention_mask")
    verdict = verdict_on("qwen2")
    assert (verdict.answer, verdict.kind) == ("not supported", "ignores the mask")
    assert verdict.reason == "qwen2: it ignores the attention mask that it is given"


def test_a_model_that_ignores_positions_is_caught(monkeypatch: pytest.MonkeyPatch):
    without(monkeypatch, "position_ids")
    verdict = verdict_on("qwen2")
    assert (verdict.answer, verdict.kind) == ("not supported", "ignores position_ids")
    assert {"direct forward", "doubled layout"} <= failed(verdict) and "AR parity" not in failed(verdict)


def test_a_leak_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The bug of the attention rule: `<=` for `<`."""
    original = layout_diffvl.attends

    def leaky(q: dict, k: dict, *rest: Any, **named: Any) -> torch.Tensor:
        own_copy = q["noisy"].bool() & ~k["noisy"].bool() & (q["block"] == k["block"]) & k["valid"]
        return original(q, k, *rest, **named) | own_copy

    monkeypatch.setattr(layout_diffvl, "attends", leaky)
    verdict = verdict_on("qwen2")
    assert failed(verdict) == {"no leak", "direct forward", "doubled layout", "train = decode"}
    assert verdict.kind == "a noisy block sees its own clean copy or later tokens"


def test_a_lost_window_is_caught(monkeypatch: pytest.MonkeyPatch):
    original = layout_diffvl.attends
    monkeypatch.setattr(layout_diffvl, "attends", lambda q, k, context, *_: original(q, k, context))
    for model_type in ("mistral", "gemma2", "llama4_text"):
        verdict = verdict_on(model_type)
        assert {"AR parity", "direct forward", "doubled layout"} <= failed(verdict), model_type
        assert verdict.kind == "with an explicit causal mask its logits are not its own"


def test_what_cannot_be_built_is_unknown_with_the_fault():
    verdict = verdict_on("dots1")  # its default configuration has no number of experts
    assert (verdict.answer, verdict.kind) == ("unknown", "no tiny copy")
    assert verdict.reason.startswith("dots1: no tiny copy of it could be built (TypeError: ")


# --- the command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(run_cli: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Runs `diffvl doctor WORDS` in this process; returns (exit code, stdout, stderr)."""
    return partial(run_cli, "doctor")


def test_supported_is_exit_code_0_with_the_table(run, source: Callable[[str], Path]):
    code, out, err = run(str(source("llama")))
    assert (code, err) == (0, "")
    assert all(name in out for name in CHECKS) and "fails" not in out
    assert "probed: 2 layers, 4 heads, 2 key heads, tied, sdpa attention; random weights, fp32; " in out
    assert out.endswith(f"{source('llama')} (llama): supported\n")


def test_not_supported_is_exit_code_1_with_the_reason(run, tmp_path: Path):
    code, out, err = run(str(standins.make_recurrent(tmp_path)))
    assert (code, err) == (1, "")
    assert out.startswith(f"{tmp_path} (mamba): not supported\nmamba has layers of type linear_attention: ")


def test_a_failed_check_stands_in_the_table(run, tmp_path: Path):
    config_of("gpt_neo").save_pretrained(tmp_path)
    code, out, _ = run(str(tmp_path))
    assert code == 1
    assert [line.split()[-2] for line in out.splitlines() if "block sees itself" in line] == ["fails"]
    assert "it keeps a causal mask of its own" in out.splitlines()[-1]


def test_json(run, tmp_path: Path):
    config_of("gpt_neo").save_pretrained(tmp_path)
    code, out, _ = run(str(tmp_path), "--json")
    figures = json.loads(out)
    assert code == 1 and (figures["answer"], figures["kind"]) == ("not supported", "causal mask of its own")
    assert (figures["model"], figures["model_type"], figures["limit"]) == (str(tmp_path), "gpt_neo", None)
    assert [check["name"] for check in figures["checks"]] == CHECKS
    by_name = {check["name"]: check for check in figures["checks"]}
    assert figures["worst_error"] >= by_name["direct forward"]["error"] > 0.1 and not figures["attention_holds"]
    assert by_name["gradients"] == {"name": "gradients", "passed": True, "error": None, "wanted": "finite", "fault": ""}


def test_json_knows_no_infinity():
    check = Check("new token", False, float("inf"), "< 0.001")
    figures = Verdict("m", "m", "not supported", checks=(check,)).as_json()
    assert figures["checks"][0]["error"] is None and figures["worst_error"] is None
    assert "Infinity" not in json.dumps(figures)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one MODEL, or --all of them"),
        (["m", "--all"], "name one MODEL, or --all of them"),
        (["m", "--out", "x.md"], "--out has no effect without --all"),
        (["qwen2.5-7bb"], "'qwen2.5-7bb': no such model name or directory; did you mean qwen2.5-7b"),
        (["./nowhere/at-all"], "./nowhere/at-all: no such directory here"),
    ],
)
def test_a_mistake_is_exit_code_2(words: list[str], message: str, run):
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}")


def test_a_directory_without_or_with_a_damaged_configuration_is_a_mistake(run, tmp_path: Path):
    assert run(str(tmp_path))[0] == 2
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", ', encoding="utf-8")
    code, _, err = run(str(tmp_path))
    assert code == 2 and "config.json: damaged, not readable as JSON" in err


def test_a_type_that_transformers_does_not_know_is_not_supported(run, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}', encoding="utf-8")
    code, out, _ = run(str(tmp_path))
    assert code == 1 and "transformers cannot load it" in out


def test_a_configuration_with_a_value_of_a_wrong_type_is_told_with_its_name(run, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": "wide"}', encoding="utf-8")
    code, out, _ = run(str(tmp_path))
    assert code == 1 and "transformers cannot load it" in out and "hidden_size" in out


def test_a_model_that_brings_its_code_is_refused_with_or_without_running_it(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With permission its attention is measured all the same."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own.py").write_text(REMOTE, encoding="utf-8")
    settings = {"model_type": "own-llama", "auto_map": REMOTE_NAMES, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    reason = "transformers has no class of its own for model_type 'own-llama'; the checkpoint brings one along"
    code, out, _ = run(str(tmp_path))
    assert code == 1 and reason in out and "AR parity" not in out and not (tmp_path / "modules").exists()
    code, out, _ = run(str(tmp_path), "--trust-remote-code")
    assert code == 1 and reason in out
    assert all(name in out for name in CHECKS) and "fails" not in out


# --- what is no number -----------------------------------------------------------------------------------------------------


def test_nan_passes_no_check():
    nan = float("nan")
    for error in (nan, float("inf")):
        assert not below("AR parity", error).passed
    assert not above("no leak", nan).passed
    for errors in ([nan, 0.0], [0.0, nan], [0.0, nan, 2.0]):
        assert math.isnan(largest(errors)) and math.isnan(smallest(errors))
    assert (largest([0.5, 2.0]), smallest([0.5, 2.0]), largest([])) == (2.0, 0.5, 0.0)
    found = Verdict("m", "m", "unknown", checks=(below("AR parity", 0.0), below("no leak", nan))).worst_error
    assert found is not None and math.isnan(found)


def test_a_model_that_gives_nan_is_not_supported(monkeypatch: pytest.MonkeyPatch):
    original = Qwen2ForCausalLM.forward

    @functools.wraps(original)
    def spoilt(self: Any, *arguments: Any, **named: Any) -> Any:
        output: Any = original(self, *arguments, **named)
        output.logits = output.logits + torch.where(torch.arange(output.logits.shape[-1]) == 3, float("nan"), 0.0)
        return output

    monkeypatch.setattr(Qwen2ForCausalLM, "forward", spoilt)
    verdict = verdict_on("qwen2")
    assert (verdict.answer, verdict.kind) == ("unknown", "no tiny copy")
    assert "gives logits that are no finite numbers" in verdict.reason
    assert {"AR parity", "no leak", "train = decode", "block sees itself"} <= failed(verdict)


# --- files of the checkpoint -----------------------------------------------------------------------------------------------


def test_a_configuration_alone_is_judged_and_the_lack_of_weights_is_told(source: Callable[[str], Path], tmp_path: Path):
    (tmp_path / "config.json").write_bytes((source("llama") / "config.json").read_bytes())
    verdict = examine(str(tmp_path))
    assert verdict.answer == "supported"
    assert verdict.reason == "there are no weights beside config.json: only the architecture was judged"


def test_files_that_do_not_fit_are_told_before_anything_is_probed(source: Callable[[str], Path], tmp_path: Path):
    model = broken(source("llama"), tmp_path / "model", config(vocab_size=300))
    verdict = examine(str(model))
    assert (verdict.answer, verdict.kind, verdict.checks) == ("not supported", "its files", ())
    assert verdict.reason.startswith(f"{model}/model.safetensors: model.embed_tokens.weight has the shape [268, 64]")
