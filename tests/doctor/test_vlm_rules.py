"""The probe finds how image tokens see each other, and notices what is wrong with masks, positions, rows and frozen parts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from diffvl.doctor import vlm_checks
from diffvl.doctor.tiny_vlm import build_vlm
from diffvl.doctor.vlm_checks import find_rule, parity_error, run_vlm_checks
from diffvl.doctor.vlm_defaults import default_vlm_config
from diffvl.doctor.vlm_pixels import images_of
from diffvl.hub import images_diffvl, layout_diffvl, modeling_diffvl
from diffvl.hub.images_diffvl import ImageRows
from diffvl.hub.layout_diffvl import IMAGE_ATTENTION, NoisyStream, Rope
from diffvl.prepare.attention_proof import TOLERANCE


def copy_of(model_type: str) -> PreTrainedModel:
    if model_type == "gemma4 that looks both ways":
        settings: dict[str, Any] = {"vision_config": {"model_type": "gemma4_vision"}}
        settings["text_config"] = {"use_bidirectional_attention": "vision"}
        return build_vlm(CONFIG_MAPPING["gemma4"](**settings))
    if model_type == "paligemma 2":
        settings = {"text_config": {"model_type": "gemma2"}}
        return build_vlm(CONFIG_MAPPING["paligemma"](**settings))
    return build_vlm(default_vlm_config(model_type))


def failed(source: PreTrainedModel) -> set[str]:
    return {check.name for check in run_vlm_checks(source, images_of(source)).checks if not check.passed}


# --- the rule among image tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "rule"),
    [
        ("llava", "causal"),
        ("gemma3", "runs"),
        pytest.param("gemma4", "causal", marks=pytest.mark.slow),
        ("gemma4 that looks both ways", "runs_sliding"),
        ("gemma4_unified", "runs_beyond_window"),
        ("molmo2", "images"),
        ("paligemma", "prompt"),
        pytest.param("paligemma 2", "prompt", marks=pytest.mark.slow),
    ],
)
def test_the_rule_is_found_and_every_other_one_is_far_off(model_type: str, rule: str):
    """The images are longer than the window; with shorter ones a window inside the span and one outside it are the same."""
    source = copy_of(model_type)
    pixels = images_of(source)
    found, parity = find_rule(source, pixels)
    assert (found, parity.passed) == (rule, True) and parity.error is not None and parity.error < 1e-5
    errors = {other: parity_error(source, pixels, other) for other in IMAGE_ATTENTION if other != rule}
    if model_type == "paligemma":  # without a window, all rules of runs are one
        assert errors["runs"] == errors["runs_beyond_window"]
    same = {"runs_sliding"} if model_type in ("llava", "gemma4") else set()
    assert all(error > 100 * TOLERANCE for other, error in errors.items() if other not in same), errors


def test_a_model_under_no_rule_is_not_supported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vlm_checks, "IMAGE_ATTENTION", ("causal", "runs_beyond_window"))
    source = copy_of("gemma3")
    findings = run_vlm_checks(source, images_of(source))
    assert findings.rule == "" and [check.name for check in findings.checks] == ["own forward", "AR parity"]
    parity = findings.checks[-1]
    assert not parity.passed and parity.error is not None and parity.error > 100 * TOLERANCE


def test_a_rule_that_short_images_do_not_show_is_not_claimed():
    source: Any = copy_of("gemma3")
    source.config.get_text_config().sliding_window = 16
    rule, parity = find_rule(source, images_of(source))
    assert rule == "runs" and not parity.passed
    assert parity.fault == "images of 16 tokens are not longer than the window of 16: how they meet cannot be told"


# --- bugs that must be noticed ---------------------------------------------------------------------------------------------


def leaky_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """`<=` for `<`: a noisy token sees the clean copy of its own block."""
    original = layout_diffvl.attends

    def attends(q: dict, k: dict, *rest: Any, **named: Any) -> torch.Tensor:
        own_copy = q["noisy"].bool() & ~k["noisy"].bool() & (q["block"] == k["block"]) & k["valid"]
        return original(q, k, *rest, **named) | (own_copy & (q["document"] == k["document"]))

    monkeypatch.setattr(layout_diffvl, "attends", attends)


def spans_across_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that are not told apart by sample."""
    original = layout_diffvl.attends

    def attends(q: dict, k: dict, *rest: Any, **named: Any) -> torch.Tensor:
        allowed = original(q, k, *rest, **named)
        if "span" not in q:
            return allowed
        return allowed | ((q["span"] > 0) & (k["span"] > 0) & ~q["noisy"].bool() & ~k["noisy"].bool() & k["valid"])

    monkeypatch.setattr(layout_diffvl, "attends", attends)


def stops_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding stops that look their position up: at that index the table has the next turn, with its image."""

    def of_stream(self: Rope, stream: NoisyStream) -> torch.Tensor:
        return self.at(stream.position)

    monkeypatch.setattr(Rope, "of_stream", of_stream)


def plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with several rotary axes whose tokens are counted."""
    monkeypatch.setattr(images_diffvl.NativeImages, "rope", lambda *given: Rope())


def rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are taken from the first on, whatever the index says."""
    original = ImageRows.gathered
    monkeypatch.setattr(ImageRows, "gathered", lambda self, index: original(self, torch.arange(len(index)) % self.total))


def moving_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen parts that are put into training mode all the same."""
    monkeypatch.setattr(modeling_diffvl, "settle_frozen", lambda *given: None)


@pytest.mark.parametrize(
    ("bug", "model_type", "noticed"),
    [
        (leaky_masks, "gemma3", {"no leak", "direct forward", "train = decode"}),
        (spans_across_samples, "gemma3", {"AR parity"}),
        (stops_in_the_table, "qwen2_vl", {"direct forward"}),
        (plain_numbers, "qwen2_vl", {"AR parity"}),
        (rows_in_order, "llava", {"image cut in two"}),
        pytest.param(rows_in_order, "qwen3_vl", {"image cut in two"}, marks=pytest.mark.slow),
    ],
)
def test_a_bug_is_noticed(
    bug: Callable[[pytest.MonkeyPatch], None], model_type: str, noticed: set[str], monkeypatch: pytest.MonkeyPatch
):
    source = copy_of(model_type)
    bug(monkeypatch)
    found = failed(source)
    assert noticed <= found, found


@pytest.mark.slow
def test_a_frozen_tower_that_moves_is_noticed(monkeypatch: pytest.MonkeyPatch):
    source = copy_of("emu3")
    moving_statistics(monkeypatch)
    assert "gradients" in failed(source)
