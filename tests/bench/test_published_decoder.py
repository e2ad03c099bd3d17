"""The published block loop: the same tokens as ours on several families, and the calls that it makes."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_prompts import CPU, TINY, chat, prompts_of, tiny
from helpers import CONTEXTS, GRIDS, trunks
from shared_fixtures import TILED, Loaded
from transformers import DynamicCache

from diffvl.bench.decoders import NEVER, Prompts, blocks_and_steps, ours, published
from diffvl.bench.published_decoder import clean_mask, decode_published, quota, settle
from diffvl.errors import UsageError

# gemma2: sliding windows, shorter than these prompts
FAMILIES = [*trunks("mistral", "qwen3_moe", "gpt2"), pytest.param(TILED, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("context", "grid"), list(itertools.product(CONTEXTS, GRIDS)))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_published_loop_and_ours_give_the_same_tokens(
    model_type: str, context: str, grid: str, loaded: Callable[[str], Loaded]
):
    """With an image, prompts that end anywhere in a block, every number of steps, and an answer cut inside a block."""
    model, _ = both = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, grid, "same")
    seen: set[int] = set()
    for text, has_image in (("Is there a circle in it, or a star?", True), ("What?!", False)):
        prompts = prompts_of(both, [chat(text, has_image)], 10, frozenset({NEVER}))
        for steps in (4, 3, 2, 1):
            theirs, own = published(model, prompts, steps), ours(model, prompts, steps)
            assert own.answers == theirs.answers
            assert len(own.answers[0]) == 10
            blocks, due = blocks_and_steps(model.config, prompts.lengths, [10], steps)
            assert own.forwards - own.prefills == due
            assert theirs.forwards - theirs.prefills == due + blocks
            seen |= set(own.answers[0])
    assert len(seen) > 5, "an answer of one token would be the same under any rule"


def test_both_end_an_answer_at_its_stop(loaded: Callable[[str], Loaded]):
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    prompts = prompts_of(both, [chat("What is it?")], 16, frozenset({NEVER}))
    (whole,) = ours(model, prompts, 2).answers
    middle = next(place for place in range(5, 16) if whole[place] not in whole[:place])
    stopping = Prompts(prompts.ids, prompts.valid, {}, 16, frozenset({whole[middle]}))
    cut = whole[: middle + 1]
    assert published(model, stopping, 2).answers == ours(model, stopping, 2).answers == [cut]
    blocks, due = blocks_and_steps(model.config, prompts.lengths, [len(cut)], 2)
    assert (
        published(model, stopping, 2).forwards - 1 == due + blocks < blocks_and_steps(model.config, prompts.lengths, [16], 2)[1]
    )


def test_an_image_in_the_block_that_the_answer_shares_is_refused(loaded: Callable[[str], Loaded]):
    model, _ = both = loaded("llama")
    prompts = prompts_of(both, [chat("?", True)], 8)
    model.config.set_decoding("blocks", prompts.ids.shape[1] - 1, "block", "absolute", "same")
    published(model, prompts, 1)
    model.config.set_decoding("blocks", prompts.ids.shape[1] + 1, "block", "absolute", "same")
    with pytest.raises(UsageError, match="an image stands in the last .* tokens of the prompt"):
        published(model, prompts, 2)


def test_it_uses_the_public_call_contract_alone(monkeypatch: pytest.MonkeyPatch):
    """One prefill and one commit a block store; denoising does not; every mask is [1, q, kv]."""
    model, prompts = tiny()
    calls: list[tuple[int, int, bool]] = []
    forward = model.forward

    def watched(**given: Any) -> Any:
        assert isinstance(given["past_key_values"], DynamicCache)
        assert set(given) == {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "store_kv"}
        length = given["input_ids"].shape[1]
        past = given["past_key_values"].get_seq_length()
        assert given["attention_mask"].shape == (1, length, past + length)
        assert given["position_ids"][0].tolist() == list(range(past, past + length))
        output = forward(**given)
        assert output.logits.shape == (1, length, TINY.vocabulary)
        calls.append((length, past, given["store_kv"]))
        return output

    monkeypatch.setattr(model, "forward", watched)
    found = decode_published(model, prompts.ids, {}, 2, 16, prompts.stops)
    assert calls == [
        *((96, 0, True), (8, 96, False), (8, 96, False), (8, 96, True)),
        *((8, 104, False), (8, 104, False), (8, 104, True)),
    ]
    assert (found.denoising, found.commits, found.prefills) == (4, 2, 1)


def test_clean_masks_follow_grid_and_context():
    class Config:
        block_size, grid, context = 4, "absolute", "block"

    index = torch.arange(12)
    blocks = clean_mask(Config, 4, 12, CPU)[0].bool()
    assert torch.equal(blocks, index[None] // 4 <= index[:, None] // 4)
    # The response grid: the prompt's blocks from token 0, its last one cut at token 6, the answer's from there.
    numbered = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    assert torch.equal(clean_mask(Config, 6, 12, CPU)[0].bool(), numbered[None] <= numbered[:, None])
    Config.context = "causal"
    assert torch.equal(clean_mask(Config, 6, 12, CPU)[0].bool(), index[None] <= index[:, None])


def test_settling_takes_the_most_confident_masks_and_no_more_than_there_are():
    logits = torch.zeros(1, 4, 6)
    for place, (token, height) in enumerate([(1, 9.0), (2, 3.0), (3, 5.0), (4, 4.0)]):
        logits[0, place, token] = height
    block, masked = torch.tensor([[5, 0, 0, 0]]), torch.tensor([[False, True, True, True]])
    assert settle(logits, block.clone(), masked, 2).tolist() == [[5, 0, 3, 4]]
    assert settle(logits, block.clone(), masked, 4).tolist() == [[5, 2, 3, 4]]
    assert settle(torch.zeros(1, 4, 6), block.clone(), masked, 1).tolist() == [[5, 0, 0, 0]], "a tie goes to the left"
    assert [quota(8, 3, step) for step in range(4)] == [3, 3, 2, 2]
    assert [quota(3, 4, step) for step in range(4)] == [1, 1, 1, 0]
