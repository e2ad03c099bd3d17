"""Drafts of gated adapters: the answer is the parent's, whatever they are worth; each sample accepts its own number of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_chats import CHATS, answers, generated
from gated_models import LONGEST, gated_models, guess_well
from helpers import random_image
from shared_fixtures import Loaded

from diffvl.hub import costs_diffvl
from diffvl.hub.blocks_diffvl import Prefix
from diffvl.hub.cache_diffvl import StaticBlockCache
from diffvl.hub.costs_diffvl import Acceptance, Costs, DraftPlan, PayingPlan, measured
from diffvl.hub.decoder_diffvl import BlockDecoder

WAYS: list[dict[str, Any]] = [
    {"draft_length": 1},
    {"draft_length": 3},
    {"draft_length": 4, "drafting": "separate"},
    {"draft_length": 4, "drafting": "separate", "denoising_steps": 2},
    {"draft_length": 4, "draft_threshold": 0.2},
]
STATIC = {"cache_implementation": "static"}
IMAGE_CHATS = [
    [{"role": "user", "content": [{"type": "image", "image": random_image(n)}, {"type": "text", "text": text}]}]
    for n, text in enumerate(("What?", "And what is to be seen here, please?", "Go on"))
]


@pytest.fixture(scope="module")
def gated(prepared: Callable[[str], Path]) -> Callable[[str], Loaded]:
    return gated_models(prepared)


def name_of(way: dict[str, Any]) -> str:
    return ", ".join(str(value) for value in way.values())


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "gemma2", "paligemma")]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl", *SLOW])
def test_the_answer_is_the_parents(model_type: str, gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """In every way of drafting, with a cache that grows and one that does not; images, batches, stops at different times."""
    model, _ = gated(model_type)
    chats = IMAGE_CHATS if model_type == "paligemma" else CHATS  # which knows no conversations
    expected = answers(gated(model_type), chats, mode="ar", max_new_tokens=18)
    stop = expected[0][7]
    ended = [answer[: answer.index(stop) + 1] if stop in answer else answer for answer in expected]
    assert expected == answers(gated(model_type), chats, max_new_tokens=18, draft_length=2)  # of the adapters' own drafts
    guess_well(monkeypatch, expected)
    for way in (*WAYS, {**WAYS[1], **STATIC}, {**WAYS[3], **STATIC}):
        output = generated(gated(model_type), chats, max_new_tokens=18, eos_token_id=stop, pad_token_id=0, **way)
        assert output.sequences is not None and output.drafts is not None and output.drafts.rounds
        for row, answer in zip(output.sequences.tolist(), ended, strict=True):
            assert row[: len(answer)] == answer and not any(row[len(answer) :])
    assert model.gate is not None and model.gate.noisy is None


@pytest.mark.parametrize("model_type", ["qwen3_vl", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_batch_is_its_prompts(model_type: str, gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    expected = answers(gated(model_type), CHATS, mode="ar", max_new_tokens=18)
    for chat, answer in zip(CHATS, expected, strict=True):
        with monkeypatch.context() as patch:
            guess_well(patch, [answer])
            for way in (WAYS[1], WAYS[2], {**WAYS[1], **STATIC}):
                assert answers(gated(model_type), [chat], max_new_tokens=18, **way) == [answer]


@pytest.mark.parametrize(("rate", "forwards"), [(1.0, {"fused": 6, "separate": 8}), (0.0, {"fused": 20, "separate": 20})])
def test_forwards(rate: float, forwards: dict[str, int], gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """With right drafts of 3 a fused round gives 4 tokens and a separate one of two forwards 5; the first of either kind goes in
    with the prompt. With wrong ones every forward gives one token."""
    settings: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": -1, "draft_length": 3}
    truth = answers(gated("llama"), [CHATS[3]], mode="ar", max_new_tokens=20, eos_token_id=-1)
    guess_well(monkeypatch, truth, rate)
    for drafting, count in forwards.items():
        output = generated(gated("llama"), [CHATS[3]], drafting=drafting, **settings)
        assert output.sequences is not None and output.drafts is not None
        assert output.sequences.tolist() == truth and output.forwards == count
        assert output.drafts.accepted == (output.drafts.drafted if rate else 0)
        assert output.drafts.accepted_per_round == pytest.approx(3 if rate else 0, abs=0.5)
        assert output.drafts.agreed == ([*output.drafts.reached] if rate else [0])
        assert len(output.drafts.reached) == (3 if rate else 1)


def test_nothing_goes_in_behind_the_context(gated: Callable[[str], Loaded]):
    """Masks at the end of an answer have no place behind the last token that may be predicted."""
    model, processor = gated("gpt2")
    context = model.config.text_config.max_position_embeddings
    ids = torch.randint(0, 200, (2, context - 8), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": -1, "pad_token_id": 0}
    expected: Any = model.generate(ids, mode="ar", **settings)
    for way in WAYS:
        given: Any = model.generate(ids, **settings, **way)
        assert given.tolist() == expected.tolist()


def test_long_prompts_go_in_without_masks(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    truth = answers(gated("llama"), CHATS, mode="ar", max_new_tokens=9)
    monkeypatch.setattr(costs_diffvl, "LONGEST_FUSED", 10)
    for way in (WAYS[1], WAYS[2], {**WAYS[1], **STATIC}):
        assert answers(gated("llama"), CHATS, max_new_tokens=9, **way) == truth


def test_gaps_are_closed(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """Refused drafts leave gaps in a batch's cache; it does not grow with them, and a static one never runs out."""
    truth = answers(gated("llama"), CHATS, mode="ar", max_new_tokens=40, eos_token_id=-1)
    guess_well(monkeypatch, truth, 0.5)
    closed, close, moved, move = [], Prefix.close_gaps, [], StaticBlockCache.move_to
    monkeypatch.setattr(Prefix, "close_gaps", lambda self, longest: closed.append(self.length) or close(self, longest))
    monkeypatch.setattr(StaticBlockCache, "move_to", lambda self, count: moved.append(count) or move(self, count))
    for more in ({}, STATIC):
        closed.clear()
        assert answers(gated("llama"), CHATS, max_new_tokens=40, eos_token_id=-1, draft_length=4, **more) == truth
        assert bool(closed) != bool(more)
    assert 0 < max(moved) <= 512


def test_a_certain_draft_is_not_cut(gated: Callable[[str], Loaded]):
    """No distribution is less certain than 0, and none of these stand-ins' is as certain as 1."""
    free, loose, strict = (
        generated(gated("llama"), CHATS, max_new_tokens=9, draft_length=2, **more).drafts
        for more in ({}, {"draft_threshold": 0.0}, {"draft_threshold": 1.0})
    )
    assert free == loose and free is not None and free.drafted and strict is not None and not strict.drafted


# --- sampling -------------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_again(gated: Callable[[str], Loaded]):
    """Without a length too: it is fixed then, not a matter of the clock."""
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.8, "top_k": 20, "top_p": 0.9}
    for way in ({}, WAYS[3]):
        first, second, third = (answers(gated("llama"), CHATS, seed=seed, **settings, **way) for seed in (3, 3, 4))
        assert first == second != third


def test_the_parent_is_the_default_with_mode_ar(gated: Callable[[str], Loaded]):
    """A checkpoint with a gate drafts unless it is told otherwise; blocks it knows too."""
    for mode, has_drafts in ((None, True), ("speculative", True), ("ar", False), ("blocks", False)):
        output = generated(gated("llama"), CHATS[:1], max_new_tokens=5, mode=mode)
        assert (output.drafts is not None) == has_drafts
    model, _ = gated("llama")
    with pytest.raises(ValueError, match="remasking has no effect with mode='speculative'"):
        generated(gated("llama"), CHATS[:1], remasking="sequential")
    with pytest.raises(ValueError, match=f"draft_length is 5, expected 1 to {LONGEST}, the longest draft of this checkpoint"):
        generated(gated("llama"), CHATS[:1], draft_length=5)
    with pytest.raises(ValueError, match="denoising_steps has no effect with drafting='fused': use drafting='separate'"):
        generated(gated("llama"), CHATS[:1], denoising_steps=2, drafting="fused")
    with pytest.raises(ValueError, match="denoising_steps=3 has no effect with draft_length=2"):
        generated(gated("llama"), CHATS[:1], denoising_steps=3, draft_length=2, drafting="separate")
    with pytest.raises(ValueError, match="mode='speculative' goes on from a prompt, but one is empty"):
        model.generate(torch.full((2, 3), 40), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))  # type: ignore[arg-type]


def test_drafts_need_a_gate(loaded: Callable[[str], Loaded]):
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    for name, value in (("draft_length", 2), ("drafting", "fused"), ("draft_threshold", 0.5)):
        with pytest.raises(ValueError, match=f"{name} has no effect here: it needs a checkpoint with gated adapters"):
            generated(loaded("llama"), CHATS[:1], mode="speculative", **{name: value})
        with pytest.raises(ValueError, match=f"{name} has no effect with mode='blocks', which checks no drafts"):
            generated(loaded("llama"), CHATS[:1], mode="blocks", **{name: value})


# --- the choice of a length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "slope", "length"), [(1.0, 0.0, LONGEST), (0.0, 0.0, None), (1.0, 1.0, 0)])
def test_the_length_that_pays(
    rate: float, slope: float, length: int | None, gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    """Where tokens of a forward are free and drafts are right, they are as long as may be; where every token costs, there are
    none. The answer is the same."""
    sizes = (1, 256)
    seconds = (1.0, 1.0 + 255 * slope)
    monkeypatch.setattr("diffvl.hub.costs_diffvl.measured", lambda model, most: Costs(sizes, seconds, seconds))
    model, _ = gated("qwen2")
    for held in ("_costs", "_acceptance"):
        model.__dict__.pop(held, None)
    truth = answers(gated("qwen2"), CHATS, mode="ar", max_new_tokens=24, eos_token_id=-1)
    guess_well(monkeypatch, truth, rate)
    forward, widths = BlockDecoder.forward, []

    def seen(self: BlockDecoder, stored: Any, read: Any, *given: Any) -> Any:
        widths.append(0 if read is None else read.ids.shape[1] // stored.ids.shape[1])
        return forward(self, stored, read, *given)

    monkeypatch.setattr(BlockDecoder, "forward", seen)
    assert answers(gated("qwen2"), CHATS, max_new_tokens=24, eos_token_id=-1) == truth
    if length is not None:
        assert set(widths[1:]) == {length}


def test_drafts_behind_an_answers_end_count_for_nothing(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """They may be as right as they like: where answers are short, longer drafts do not pay."""
    settings: dict[str, Any] = {"max_new_tokens": 24, "draft_length": LONGEST, "drafting": "fused"}
    truth = answers(gated("qwen2"), CHATS[:1], mode="ar", max_new_tokens=24, eos_token_id=-1)
    end = next(place for place in range(1, LONGEST) if truth[0][place] not in truth[0][:place])
    guess_well(monkeypatch, truth, 1.0)
    noted: list[tuple[int, int]] = []
    monkeypatch.setattr(DraftPlan, "note", lambda self, count, accepted: noted.append((count, accepted)))
    output = generated(gated("qwen2"), CHATS[:1], eos_token_id=truth[0][end], **settings)
    assert output.tokens == end + 1 and output.drafts is not None and output.drafts.accepted == LONGEST
    assert noted == [(0, 0), (LONGEST, end)]


def test_a_draft_takes_a_forward_for_each_token_at_most(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """And the plan counts them: a short draft is not charged for steps that it does not take, nor a long one let off."""
    costs = Costs((1, 256), (1.0, 1.0), (1.0, 1.0))
    likely = Acceptance()
    speeds = [costs.tokens_per_second("separate", length, 1, likely, steps=4) for length in (1, 4)]
    assert speeds == [(2 + likely.expected(1)) / 2, (2 + likely.expected(4)) / 5]
    monkeypatch.setattr("diffvl.hub.costs_diffvl.PayingPlan.masks", lambda self, checking, batch: 0 if checking else 1)
    monkeypatch.setattr("diffvl.hub.costs_diffvl.measured", lambda model, most: costs)
    settings: dict[str, Any] = {"max_new_tokens": 9, "eos_token_id": -1, "drafting": "separate"}
    both: list[Any] = [generated(gated("llama"), CHATS[:1], denoising_steps=steps, **settings) for steps in (1, 4)]
    one, four = both
    assert one.forwards == four.forwards and torch.equal(one.sequences, four.sequences)


@pytest.mark.parametrize(
    ("costs", "tokens", "batch", "pays"),
    [
        (Costs((1, 256), (1.0, 1.0), (1.0, 1.0)), 1000, 1, True),  # tokens are free
        (Costs((1, 257), (0.03, 0.158), (0.045, 0.237)), 10, 1, True),  # each is paid for, and half as much again with adapters
        (Costs((1, 257), (0.03, 0.158), (0.045, 0.237)), 400, 1, False),
        (Costs((1, 257), (0.03, 0.158), (0.045, 0.237)), 10, 9, False),  # one of many, who pay for it
        (Costs((1, 256), (1.0, 1.0), (1.0, 1.0)), 1000, 9, True),
    ],
)
@pytest.mark.parametrize("drafting", ["separate", "fused"])
def test_masks_in_the_prompts_forward_where_that_pays(
    costs: Costs,
    tokens: int,
    batch: int,
    pays: bool,
    drafting: str,
    gated: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
):
    """There the whole prompt goes through the adapters, and all that it can save is a draft."""
    monkeypatch.setattr("diffvl.hub.costs_diffvl.measured", lambda model, most: costs)
    model, _ = gated("llama")
    for held in ("_costs", "_acceptance"):
        model.__dict__.pop(held, None)
    plan = PayingPlan(model, LONGEST, drafting, 1, 1)
    assert plan.pays_in_prompt(LONGEST, 1, tokens, batch) == pays and not plan.pays_in_prompt(0, 1, tokens, batch)
    if batch == 1:
        assert (plan.prompt_masks(1, tokens) > 0) == pays


def test_a_slow_model_is_not_timed_for_minutes(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """Nor again at the next call."""
    monkeypatch.setattr(costs_diffvl, "_seconds", lambda decoder, tokens, adapted: 0.2 * tokens)
    model, _ = gated("llama")
    model.__dict__.pop("_costs", None)
    plan = PayingPlan(model, LONGEST, None, 32, 1)
    assert plan.costs.tokens == (1, 2, 4, 8) and plan.costs.seconds(100, True) == pytest.approx(20)
    assert PayingPlan(model, LONGEST, None, 32, 1).costs is plan.costs
    model.__dict__.pop("_costs")  # no time of this machine


def test_forwards_are_timed_on_text(gated: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """The image token of some models is among the first of the vocabulary."""
    model, _ = gated("llama")
    monkeypatch.setattr(model.config, "image_token_id", 10)
    assert all(second > 0 for second in measured(model, 2).plain)
