"""Train = decode: what training computes for a block is what decoding computes, and a batch changes nothing.

Training's logits are taken from `block_diffusion` itself, through a spy in the place of the model; decoding's from
`BlockDecoder`, with its cache, on the prompt as the processor renders it for decoding.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, GRIDS, TARGETS, crossed, pairwise, trunks
from shared_fixtures import Loaded
from train_and_decode import CHAT, OTHER, compare

from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.processing_diffvl import pixels_in


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), crossed(CONTEXTS, GRIDS, TARGETS))
def test_training_logits_are_decoding_logits(
    model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]
):
    compare(loaded(model_type), 4, context, grid, target)


@pytest.mark.parametrize(("context", "grid", "target", "trained"), pairwise(CONTEXTS, GRIDS, TARGETS, [(1,), (2,)]))
def test_and_where_one_answer_is_not_trained_on(
    context: str, grid: str, target: str, trained: tuple[int, ...], loaded: Callable[[str], Loaded]
):
    """Nothing but the trained answer is predicted, and its logits are decoding's, for which the other is an earlier answer."""
    compare(loaded("llama"), 4, context, grid, target, trained)


@pytest.mark.parametrize(("model_type", "context", "target", "block_size"), crossed(CONTEXTS, TARGETS, [24, 48]))
def test_and_with_an_image_inside_the_first_block(
    model_type: str, context: str, target: str, block_size: int, loaded: Callable[[str], Loaded]
):
    """24: an image cut by the start of the block in which the answer begins. 48: that block is the first of all, nothing is
    in the cache. Both turns share grid cells."""
    assert compare(loaded(model_type), block_size, context, "absolute", target) == [True, False]


# --- a batch of prompts ------------------------------------------------------------------------------------------------------

PROMPTS = [
    [CHAT[0]],
    [*OTHER, {"role": "user", "content": "Sure?"}],
    CHAT[:3],
    [{"role": "user", "content": "Hi"}],
]


def run_blocks(loaded: Loaded, prompts: list[list[dict[str, Any]]], fill: torch.Tensor) -> list[torch.Tensor]:
    """Logits of three blocks, each committed with the tokens `fill` (one row a prompt) before the next."""
    model, processor = loaded
    inputs = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True)
    decoder = BlockDecoder(model, inputs["input_ids"], inputs["attention_mask"].bool(), inputs["answer_index"], pixels_in(inputs))
    decoder.prefill()
    logits = []
    for _ in range(3):
        opened = decoder.block
        logits.append(decoder.block_logits().masked_fill(~opened.open_BD[..., None], 0.0))
        decoder.block = replace(opened, ids_BD=torch.where(opened.open_BD, fill[:, None], opened.ids_BD))
        decoder.commit()
    return logits


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), crossed(CONTEXTS, GRIDS, TARGETS))
@torch.no_grad()
def test_a_batch_is_each_prompt_alone(model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]):
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, grid, target)
    fill = torch.arange(40, 40 + len(PROMPTS))
    together = run_blocks((model, processor), PROMPTS, fill)
    for row, prompt in enumerate(PROMPTS):
        alone = run_blocks((model, processor), [prompt], fill[row : row + 1])
        for one, several in zip(alone, together, strict=True):
            torch.testing.assert_close(several[row], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", trunks())
def test_generated_tokens_do_not_depend_on_the_batch(model_type: str, loaded: Callable[[str], Loaded]):
    """Padded left or right, in a batch or alone, with and without stops inside: the same answers."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    length = 10
    inputs = processor.apply_chat_template(PROMPTS, tokenize=True, add_generation_prompt=True)
    sequences = model.generate(**inputs, max_new_tokens=length, denoising_steps=2)
    assert isinstance(sequences, torch.Tensor)
    answers = sequences[:, inputs["input_ids"].shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        one = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
        alone = model.generate(**one, max_new_tokens=length, denoising_steps=2)
        assert isinstance(alone, torch.Tensor)
        given = alone[0, one["input_ids"].shape[1] :].tolist()
        assert answers[row, : len(given)].tolist() == given
    order = torch.argsort(1 - inputs["attention_mask"], dim=1, stable=True)
    right = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask", "answer_index")}
    padded_right = model.generate(**right, pixel_values=inputs["pixel_values"], max_new_tokens=length, denoising_steps=2)
    assert isinstance(padded_right, torch.Tensor)
    assert torch.equal(padded_right[:, inputs["input_ids"].shape[1] :], answers)


@torch.no_grad()
def test_marks_of_earlier_answers_matter(loaded: Callable[[str], Loaded]):
    """Without `answer_index` the blocks of a prompt with earlier answers would be others than in training."""
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    inputs = processor.apply_chat_template(PROMPTS, tokenize=True, add_generation_prompt=True)
    assert inputs["answer_index"].amax(1).tolist() == [0, 1, 1, 0]
    unmarked = {**inputs, "answer_index": torch.zeros_like(inputs["answer_index"])}
    logits = []
    for given in (inputs, unmarked):
        arguments = (given["input_ids"], given["attention_mask"].bool(), given["answer_index"], pixels_in(given))
        decoder = BlockDecoder(model, *arguments)
        decoder.prefill()
        logits.append(decoder.block_logits().masked_fill(~decoder.block.open_BD[..., None], 0.0))
    assert ((logits[0] - logits[1]).abs().amax((1, 2)) > 1e-4).tolist() == [False, True, True, False]
