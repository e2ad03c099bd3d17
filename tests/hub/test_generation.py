"""Decoding with a model that says what a script tells it: which tokens settle, how many forwards it takes, where it ends.

Train = decode and batches of real models are in tests/gates/test_train_is_decode.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ORDINARY
from shared_fixtures import Loaded
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, GenerationConfig

from diffvl.hub.answers_diffvl import BlockGenerationOutput, settled
from diffvl.hub.cache_diffvl import ReadingCache
from diffvl.hub.generation_diffvl import BlockGeneration
from diffvl.hub.images_diffvl import ImageRows
from diffvl.hub.settings_diffvl import DecodeSettings

MASK, IMAGE, STOP, PAD, VOCABULARY, ROWS = 30, 31, 29, 28, 32, 36


class Scripted(BlockGeneration):
    """Predicts, for position p, the token `script[p]` with a logit of `height[p]`; and with a higher one, always, what may
    never be predicted: the mask token, the image token and a spare row of the table."""

    def __init__(self, script: list[int], height: list[float] | None = None, **settings: Any) -> None:
        common = {"mask_token_id": MASK, "image_token_id": IMAGE, "vocabulary_size": VOCABULARY, "placeholder_ids": []}
        common |= {
            "image_inputs": ["pixel_values"],
            "video_inputs": [],
            "video_token_id": None,
            "image_attention": "causal",
            "token_types": "images",
            "first_position": 0,
        }
        decoding = {"decoding": "blocks", "block_size": 4, "grid": "absolute", "context": "block", "target": "same"}
        self.config = SimpleNamespace(**common, stop_token_ids=[STOP], **{**decoding, **settings})
        self.generation_config = GenerationConfig(pad_token_id=PAD)
        self.config.text_config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=None)
        top = SimpleNamespace(get_text_config=lambda decoder: self.config.text_config)
        self.trunk = SimpleNamespace(config=top, _can_set_attn_implementation=lambda: False, modules=lambda: [])
        self.images = SimpleNamespace(
            encode=lambda pixels: ImageRows(torch.zeros(2 * len(pixels["pixel_values"]), 1), (2,) * len(pixels["pixel_values"])),
            has_axes=False,
            takes=lambda name: False,
        )
        self.script, self.height = torch.tensor(script), torch.tensor(height or [5.0] * len(script))
        self.calls: list[tuple[list[int], int]] = []  # what went in, and how much of it stays in the cache

    def pixels_of(self, given: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"pixel_values": given["pixel_values"]} if given["pixel_values"] is not None else {}

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, ids: torch.Tensor, **given: Any) -> Any:
        self.calls.append((ids[0].tolist(), int(given["past_key_values"].store)))
        logits = torch.zeros(*ids.shape, ROWS)
        position = given["position_ids"]
        position = torch.arange(ids.shape[1]).expand_as(ids) if position is None else position
        predicted = position + (self.config.target == "shift")
        predicted = predicted.clamp_max(len(self.script) - 1)
        logits.scatter_(2, self.script[predicted][..., None], self.height[predicted][..., None])
        logits[..., [MASK, IMAGE, VOCABULARY + 1]] = 40.0
        return SimpleNamespace(logits=logits.flatten(0, 1)[given["logits_rows"]])

    def answer(self, prompt: list[int], **settings: Any) -> list[int]:
        sequence = self.generate(torch.tensor([prompt]), **settings)
        assert isinstance(sequence, torch.Tensor) and sequence[0, : len(prompt)].tolist() == prompt
        return sequence[0, len(prompt) :].tolist()

    @property
    def denoising(self) -> list[list[int]]:
        """The open block in every forward that predicts one."""
        return [ids[stored:] for ids, stored in self.calls if stored < len(ids)]

    @property
    def committed(self) -> list[list[int]]:
        return [ids[:stored] for ids, stored in self.calls if stored]


def endless(**settings: Any) -> Scripted:
    """Position p holds token p, up to 27, and there is no stop."""
    return Scripted([position % 28 for position in range(200)], **settings)


# --- which tokens settle -------------------------------------------------------------------------------------------------------


def picked(confidence: list[float], masked: list[int], quota: int, threshold: float | None = None, **more: Any) -> list[int]:
    """`more`: remasking and what belongs to it; entropies are one minus the confidence."""
    remasking = "low_confidence_static" if threshold is None else "low_confidence_dynamic"
    settings = DecodeSettings(**{"remasking": remasking, "threshold": threshold, **more})
    score = torch.tensor([confidence])
    chosen = settled(settings, torch.tensor([quota]), torch.tensor([masked]).bool(), score, 1 - score)
    return chosen[0].nonzero()[:, 0].tolist()


def test_static_takes_the_most_confident():
    confidence = [0.1, 0.9, 0.5, 0.7]
    assert picked(confidence, [1, 1, 1, 1], 2) == [1, 3]
    assert picked(confidence, [1, 0, 1, 1], 2) == [2, 3], "a settled token is not chosen again"
    assert picked(confidence, [1, 0, 0, 0], 3) == [0], "no more than are masked"
    assert picked(confidence, [0, 0, 0, 0], 2) == []
    assert picked(confidence, [1, 1, 1, 1], 0) == []
    assert picked([0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], 2) == [0, 1], "the first of equals"
    assert picked([0.0, 0.0, 0.0, 0.0], [0, 0, 1, 1], 1) == [2], "even without any confidence"


def test_dynamic_takes_all_that_are_sure():
    confidence = [0.95, 0.2, 0.93, 0.99]
    assert picked(confidence, [1, 1, 1, 1], 1, 0.9) == [0, 2, 3], "all that are sure"
    assert picked(confidence, [1, 1, 1, 0], 1, 0.9) == [0, 2]
    assert picked(confidence, [0, 1, 0, 0], 1, 0.9) == [1], "the quota where none is sure"
    assert picked(confidence, [1, 1, 1, 1], 4, 0.9) == [0, 1, 2, 3], "the quota where too few are sure"
    assert picked(confidence, [0, 1, 0, 0], 3, 0.9) == [1], "clamped to the masks that are left"
    assert picked([0.9, 0.1, 0.1, 0.1], [1, 1, 1, 1], 0, 0.9) == [], "more than the threshold, not as much"


def test_sequential_goes_from_the_left():
    assert picked([0.1, 0.9, 0.5, 0.7], [1, 1, 1, 1], 2, remasking="sequential") == [0, 1]
    assert picked([0.1, 0.9, 0.5, 0.7], [0, 0, 1, 1], 1, remasking="sequential") == [2]


def test_entropy_spends_its_budget_on_the_least_uncertain():
    """Entropies 0.9, 0.1, 0.5, 0.3."""
    confidence = [0.1, 0.9, 0.5, 0.7]
    for budget, expected in ((0.0, [1]), (0.1, [1]), (0.41, [1, 3]), (0.91, [1, 2, 3]), (5.0, [0, 1, 2, 3])):
        assert picked(confidence, [1, 1, 1, 1], 1, remasking="entropy", entropy_budget=budget) == expected
    assert picked(confidence, [1, 1, 1, 1], 3, remasking="entropy", entropy_budget=0.0) == [1, 2, 3], "the quota at least"
    assert picked(confidence, [1, 0, 1, 0], 0, remasking="entropy", entropy_budget=0.6) == [2]
    assert picked(confidence, [0, 0, 0, 0], 0, remasking="entropy", entropy_budget=9.0) == []


def test_rows_settle_apart():
    confidence = torch.tensor([[0.9, 0.1, 0.8], [0.1, 0.95, 0.2]])
    masked = torch.tensor([[True, True, True], [True, False, True]])
    chosen = settled(DecodeSettings(), torch.tensor([1, 2]), masked, confidence, confidence)
    assert chosen.tolist() == [[True, False, False], [True, False, True]]


# --- how a block is filled -----------------------------------------------------------------------------------------------------


def test_static_settles_the_most_confident_first():
    model = Scripted([0, 1, 2, 3, 4, 5, 6, 7], height=[1.0, 1.0, 1.0, 1.0, 2.0, 9.0, 4.0, 7.0])
    assert model.answer([0, 1, 2, 3], max_new_tokens=4) == [4, 5, 6, 7]
    assert model.denoising == [[MASK] * 4, [MASK, 5, MASK, MASK], [MASK, 5, MASK, 7], [MASK, 5, 6, 7]]


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize(("steps", "sizes"), [(1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (4, [1, 1, 1, 1])])
def test_steps_are_the_forwards_of_a_block(steps: int, sizes: list[int], context: str):
    """Three whole blocks: `steps` forwards each, the first of which commits what was finished before; the remainder of masks
    goes to the first steps. A causal prompt has a forward of its own, which needs no mask."""
    model = endless(context=context)
    output = model.generate(torch.arange(8)[None], max_new_tokens=12, denoising_steps=steps, return_dict_in_generate=True)
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None
    assert output.sequences[0].tolist() == list(range(20))
    prefill = int(context == "causal")
    assert (output.forwards, output.tokens, len(model.calls)) == (prefill + 3 * steps, 12, prefill + 3 * steps)
    assert output.tokens_per_forward == 12 / (prefill + 3 * steps)
    open_masks = [ids.count(MASK) for ids in model.denoising]
    left = [before - after for before, after in zip(open_masks, [*open_masks[1:], 0], strict=True)]
    assert left[: len(sizes) - 1] == sizes[:-1]
    rest = [0] * (steps - 1)
    first = [8, 0, *rest] if prefill else [8, *rest]
    assert [stored for _, stored in model.calls] == [*first, 4, *rest, 4, *rest]
    # When each token settled: four a block, the earliest steps with the remainder, counted on from block to block.
    per_block = [step for step, size in enumerate(sizes) for _ in range(size)]
    assert output.settling == [[step + block * steps for block in range(3) for step in per_block]]


def test_what_is_committed_is_what_was_settled():
    model = endless()
    model.answer([0, 1, 2, 3, 4, 5], max_new_tokens=8, denoising_steps=2)
    assert model.committed == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert model.denoising[0] == [4, 5, MASK, MASK], "the prompt's tail stands in the first block"


def test_a_first_block_with_few_masks_takes_no_more_forwards_than_masks():
    model = endless()
    model.answer([0, 1, 2, 3, 4, 5, 6], max_new_tokens=5, denoising_steps=4)
    assert len(model.denoising) == 1 + 4


def test_dynamic_needs_fewer_forwards_where_the_model_is_sure():
    sure, unsure = endless(), endless()
    unsure.height = torch.full_like(unsure.height, 1.0)
    arguments = {"max_new_tokens": 8, "remasking": "low_confidence_dynamic"}
    assert sure.answer([0, 1, 2, 3], threshold=0.5, **arguments) == list(range(4, 12)) and len(sure.denoising) == 2
    assert unsure.answer([0, 1, 2, 3], threshold=0.5, **arguments) == list(range(4, 12)) and len(unsure.denoising) == 8
    # 0.9 by default: a logit of 5 among 30 tokens has a probability of about 0.84.
    default = endless()
    assert default.answer([0, 1, 2, 3], **arguments) == list(range(4, 12)) and len(default.denoising) == 8


@pytest.mark.parametrize("target", ["same", "shift"])
@pytest.mark.parametrize("grid", ["absolute", "response"])
@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_every_grid_and_target_give_the_script(size: int, grid: str, target: str):
    for length in (1, 3, 4, 5, 9):
        model = endless(block_size=size, grid=grid, target=target, context="causal")
        assert model.answer(list(range(length)), max_new_tokens=10) == list(range(length, length + 10))


# --- where an answer ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7, 8, 9])
def test_max_new_tokens_is_exact(limit: int):
    assert endless().answer([0, 1, 2, 3, 4], max_new_tokens=limit) == list(range(5, 5 + limit))


def test_max_new_tokens_by_default():
    assert len(endless().answer([0])) == 128
    model = endless()
    model.generation_config = GenerationConfig(max_new_tokens=6)
    assert len(model.answer([0])) == 6
    assert len(model.answer([0], max_new_tokens=3)) == 3
    assert len(model.answer([0], generation_config=GenerationConfig(max_new_tokens=5))) == 5


def test_nothing_follows_the_stop():
    """Not even in the block of the stop, where the script goes on; a stop at the limit counts as one."""
    script = [*range(10), STOP, 11, 12, STOP, *range(14, 28)]
    assert Scripted(script).answer([0, 1, 2, 3, 4], max_new_tokens=20) == [5, 6, 7, 8, 9, STOP]
    assert Scripted(script).answer([0, 1, 2, 3, 4], max_new_tokens=6) == [5, 6, 7, 8, 9, STOP]
    assert Scripted(script).answer([0, 1, 2, 3, 4], max_new_tokens=5) == [5, 6, 7, 8, 9]
    model = Scripted(script)
    model.answer([0, 1, 2, 3, 4], max_new_tokens=20)
    assert len(model.calls) == 3 + 4, "no forward after the block of the stop"


def test_a_finished_row_waits_padded():
    """Rows of one batch end apart: the first at once, the second at the limit."""
    model = Scripted([*range(6), STOP, *range(7, 28)])
    prompts = torch.tensor([[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]])
    mask = torch.ones_like(prompts)
    output = model.generate(prompts, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None
    assert output.sequences[:, 6:].tolist() == [[STOP], [STOP]] and output.tokens == 2
    late = prompts[:, :4].clone()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])  # the second row is two tokens behind
    output = model.generate(late, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None
    assert output.sequences[:, 4:].tolist() == [[4, 5, STOP, PAD], [2, 3, 4, 5]] and output.tokens == 7


def test_what_may_never_be_predicted_is_not():
    """The script's tokens have a lower logit than the mask token, the image token and a spare row; sampled, too."""
    model = endless()
    greedy = model.answer([0, 1], max_new_tokens=40)
    sampled = model.answer([0, 1], max_new_tokens=40, temperature=3.0)
    assert greedy == [position % 28 for position in range(2, 42)]
    assert sampled != greedy
    for answer in (greedy, sampled):
        assert not {MASK, IMAGE, *range(VOCABULARY, ROWS)} & set(answer)


def test_sampling_repeats_by_seed():
    def draw(seed: int, **settings: Any) -> list[int]:
        return endless().answer([0], max_new_tokens=24, temperature=3.0, seed=seed, **settings)

    before = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_k=1) == endless().answer([0], max_new_tokens=24)
    assert draw(1, top_p=1e-6) == draw(1, top_k=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_arguments_of_transformers_mean_what_they_mean_there():
    def draw(**settings: Any) -> list[int]:
        return endless().answer([0], max_new_tokens=24, seed=1, **settings)

    hot = GenerationConfig(do_sample=True, temperature=3.0)
    assert draw(generation_config=hot) == draw(temperature=3.0) == draw(do_sample=True, temperature=3.0) != draw()
    assert draw(generation_config=hot, do_sample=False) == draw(use_cache=True, num_beams=1) == draw()
    stop = draw()[2]
    assert draw(generation_config=GenerationConfig(eos_token_id=stop)) == draw(eos_token_id=stop)
    assert draw(eos_token_id=stop) == draw(eos_token_id=[stop]) == draw()[: draw().index(stop) + 1]


def test_arguments_are_taken_from_the_nearest_that_says_them():
    model = endless()
    model.generation_config = GenerationConfig(eos_token_id=9, pad_token_id=PAD, max_length=30, denoising_steps=2)
    prompt = [0, 1, 2, 3]
    assert model.answer(prompt) == [4, 5, 6, 7, 8, 9] and len(model.denoising) == 4
    assert model.answer(prompt, generation_config=GenerationConfig(eos_token_id=6)) == [4, 5, 6]
    assert model.answer(prompt, generation_config=GenerationConfig(eos_token_id=6), eos_token_id=7) == [4, 5, 6, 7]
    assert len(model.answer(prompt, eos_token_id=-1)) == 26, "max_length counts the prompt"
    assert len(model.answer(prompt, eos_token_id=-1, max_new_tokens=5)) == 5
    whole = model.generate(torch.tensor([prompt]), generation_config=GenerationConfig(return_dict_in_generate=True))
    assert isinstance(whole, BlockGenerationOutput)
    assert len(model.answer(prompt, eos_token_id=-1, max_length=8, generation_config=GenerationConfig(max_new_tokens=9))) == 4
    model.generation_config = GenerationConfig(cache_implementation="static", disable_compile=True)
    model.answer(prompt, eos_token_id=-1, max_new_tokens=3, cache_implementation="dynamic")
    model.answer(prompt, eos_token_id=-1, max_new_tokens=3, cache_implementation="dynamic", disable_compile=False)
    model.generation_config = GenerationConfig(repetition_penalty=1.1)
    with pytest.raises(ValueError, match=r"block decoding knows no repetition_penalty=1.1 \(in generation_config\)"):
        model.answer(prompt)


def test_arguments_that_say_what_happens_anyway_are_taken():
    neutral = {"logits_processor": None, "stopping_criteria": [], "num_return_sequences": 1, "repetition_penalty": 1.0}
    neutral |= {"synced_gpus": False, "output_scores": False, "top_p": 1.0, "top_k": 0, "temperature": 1.0, "do_sample": False}
    assert endless().answer([0, 1], max_new_tokens=9, **neutral) == endless().answer([0, 1], max_new_tokens=9)
    with pytest.raises(ValueError, match="no prompts: input_ids has no rows"):
        endless().generate(torch.zeros(0, 3, dtype=torch.long))


# --- settings that do not fit --------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"denoising_steps": 0}, "denoising_steps is 0, expected 1 to the block size, 4"),
    ({"denoising_steps": 5}, "denoising_steps is 5, expected 1 to the block size, 4"),
    ({"remasking": "random"}, "remasking is 'random', expected one of low_confidence_static, low_confidence_dynamic, sequential"),
    (
        {"threshold": 0.5},
        "threshold=0.5 has no effect with remasking='low_confidence_static': add remasking='low_confidence_dynamic', or",
    ),
    ({"threshold": 1.5, "remasking": "low_confidence_dynamic"}, "threshold is 1.5, expected 0 to 1"),
    ({"temperature": -1.0}, "temperature is -1.0, expected 0 (the likeliest token) or 0.0001 to 10000"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
    ({"top_k": 5}, "top_k has no effect with temperature 0, which takes the likeliest token: add temperature"),
    ({"do_sample": False, "temperature": 0.7}, "temperature=0.7 has no effect with do_sample=False: leave one of them out"),
    ({"do_sample": True, "temperature": 0.0}, "do_sample=True needs a temperature above 0"),
    ({"num_beams": 4}, "block decoding knows no num_beams=4"),
    ({"use_cache": False, "penalty_alpha": 1.0}, "block decoding knows no penalty_alpha=1.0, use_cache=False"),
    (
        {"entropy_budget": 0.5},
        "entropy_budget=0.5 has no effect with remasking='low_confidence_static': add remasking='entropy', or leave",
    ),
    ({"entropy_budget": -0.5, "remasking": "entropy"}, "entropy_budget is -0.5, expected 0 or more"),
    ({"mode": "fast"}, "mode is 'fast', expected one of blocks, speculative, ar"),
    ({"mode": "speculative"}, "mode='speculative' needs a checkpoint trained with context: causal"),
    ({"mode": "ar", "denoising_steps": 2}, "denoising_steps has no effect with mode='ar'"),
    ({"mode": "ar", "on_step": print}, "on_step has no effect with mode='ar': it watches blocks"),
    ({"stop_strings": "x"}, "stop_strings needs the tokenizer"),
    ({"mode": "ar", "remasking": "sequential"}, "remasking has no effect with mode='ar', which decodes token by token"),
    ({"generation_config": GenerationConfig(num_beams=4)}, "block decoding knows no num_beams=4 (in generation_config)"),
    ({"generation_config": GenerationConfig(repetition_penalty=2.0)}, "block decoding knows no repetition_penalty"),
    ({"block_size": 7, "_from": 3}, "block decoding knows no _from=3, block_size=7"),
    (
        {"generation_config": GenerationConfig(temperature=0.7)},
        "temperature 0.7 (in generation_config) has no effect without do_sample=True there",
    ),
    (
        {"generation_config": GenerationConfig(compile_config=CompileConfig())},
        "compile_config and disable_compile have no effect without cache_implementation='static'",
    ),
    ({"generation_config": GenerationConfig(min_p=0.1)}, "block decoding knows no min_p=0.1 (in generation_config)"),
    ({"generation_config": GenerationConfig(use_cache=False)}, "block decoding knows no use_cache=False (in generation_config)"),
    ({"suppress_tokens": [3], "max_time": 2.0}, "block decoding knows no max_time=2.0, suppress_tokens=[3]"),
    ({"denoising_step": 2}, "block decoding knows no denoising_step=2"),
    ({"max_length": 3}, "max_length is 3, and the prompt has 3 tokens already: raise it"),
    ({"temperature": float("inf")}, "temperature is inf, expected 0 (the likeliest token) or 0.0001 to 10000"),
    ({"temperature": 1e-40}, "temperature is 1e-40, expected"),
    ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5, expected 0 to 1"),
    ({"temperature": 1.0, "top_k": -1}, "top_k is -1, expected 0 or more"),
    ({"stop_strings": ["a", ""], "tokenizer": object()}, "stop_strings='' is in every text: name a text that ends the answer"),
    ({"cache_implementation": "hybrid"}, "cache_implementation is 'hybrid', expected one of dynamic, static"),
    ({"disable_compile": True}, "compile_config and disable_compile have no effect without cache_implementation='static'"),
    (
        {"cache_implementation": "static", "disable_compile": True, "compile_config": CompileConfig()},
        "compile_config has no effect with disable_compile=True",
    ),
    ({"repetition_stop": 1}, "repetition_stop is 1, expected 2 or more"),
    ({"image_sizes": torch.ones(1, 2)}, "1 image_sizes, but another number of images"),
    ({"pixel_values": torch.ones(1, 3, 8, 8)}, "1 images give 2 image tokens, the text has 0"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_settings_that_do_not_fit(settings: dict[str, Any], words: str):
    model = endless()
    with pytest.raises(ValueError, match=re.escape(words)):
        model.answer([0, 1, 2], **settings)
    assert model.calls == []


def test_images_and_placeholders_must_match():
    with pytest.raises(ValueError, match="0 images give 0 image tokens, the text has 2"):
        endless().answer([0, IMAGE, IMAGE])
    with pytest.raises(ValueError, match="target 'shift' predicts a token from the one before it, but the prompt is empty"):
        endless(target="shift").generate(torch.tensor([[0]]), attention_mask=torch.tensor([[0]]))


def test_what_a_checkpoint_fills_in():
    config = endless(block_size=8).config

    def filled(**settings: Any) -> DecodeSettings:
        return DecodeSettings(**settings).for_checkpoint(config)

    greedy: dict[str, Any] = {"mode": "blocks", "do_sample": False, "eos_token_id": frozenset({STOP}), "pad_token_id": STOP}
    assert filled() == DecodeSettings(denoising_steps=8, **greedy)
    dynamic: dict[str, Any] = {"denoising_steps": 2, "remasking": "low_confidence_dynamic"}
    assert filled(**dynamic) == DecodeSettings(**dynamic, threshold=0.9, **greedy)
    assert filled(remasking="low_confidence_dynamic", threshold=0.0).threshold == 0.0
    assert filled(remasking="entropy").entropy_budget == 0.35
    assert filled(mode="ar").denoising_steps is None and filled(temperature=0.5).do_sample
    for settings in (filled(), filled(**dynamic), filled(mode="ar"), filled(remasking="entropy", temperature=0.5)):
        settings.check()
        assert settings.for_checkpoint(config) == settings, "what was filled in needs nothing more"


def test_settings_are_told_in_the_words_of_whoever_asks():
    def spell(name: str, value: Any = None) -> str:
        return f"<{name}>" if value is None else f"<{name} {value}>"

    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({"threshold": 0.5}, (), "<threshold 0.5> has no effect with <remasking low_confidence_static>: add <remasking low_conf"),
        ({"max_new_tokens": 0}, (), "<max_new_tokens> is 0, expected 1 or more"),
        ({"mode": "ar"}, ("remasking",), "<remasking> has no effect with <mode ar>"),
        ({}, ("seed",), "<seed> has no effect with temperature 0"),
        ({"mode": "blocks"}, ("draft_length",), "<draft_length> has no effect with <mode blocks>, which checks no drafts"),
    ]
    for settings, given, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            DecodeSettings(**settings).check(given, spell)  # type: ignore[arg-type]
    DecodeSettings(seed=3).check()


# --- the cache, and the AR decoder ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_can_be_read_without_being_written(loaded: Callable[[str], Loaded]):
    """Also an empty one, as SDAR-VL's sequence has it for prompts shorter than a block."""
    model, _ = loaded("llama")
    ids = torch.randint(0, ORDINARY, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    cache = DynamicCache()
    first = model(ids[:, :4], past_key_values=cache, use_cache=True, store_kv=False).logits
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(first, whole[:, :4], rtol=1e-5, atol=2e-5)
    model(ids[:, :8], past_key_values=cache, use_cache=True)
    for _ in range(2):
        rest = model(ids[:, 8:], past_key_values=cache, use_cache=True, store_kv=False).logits
        assert cache.get_seq_length() == 8
        torch.testing.assert_close(rest, whole[:, 8:], rtol=1e-5, atol=2e-5)


def test_a_cache_that_forgets_is_refused(loaded: Callable[[str], Loaded]):
    """A sliding cache drops keys that a window in the mask still counts."""
    model, _ = loaded("mistral")
    sliding = DynamicCache(config=model.config.text_config)
    with pytest.raises(ValueError, match=r"store_kv=False needs a cache of plain layers: build it as DynamicCache\(\)"):
        ReadingCache(sliding)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_an_aligned_model_decodes_as_the_ar_model_does(
    model_type: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded]
):
    """Blocks of one token, causal, shifted: greedy decoding of the source checkpoint, token for token."""
    model, _ = loaded(model_type)
    model.config.set_decoding("ar", block_size=1, context="causal", grid="response", target="shift")
    stock = AutoModelForCausalLM.from_pretrained(source(model_type)).eval()
    ids = torch.randint(0, ORDINARY, (1, 15), generator=torch.Generator().manual_seed(3))
    given = model.generate(ids, max_new_tokens=12)
    assert isinstance(given, torch.Tensor)
    expected = ids
    for _ in range(given.shape[1] - 15):
        expected = torch.cat([expected, stock(input_ids=expected).logits[:, -1:].argmax(-1)], 1)
    assert given.tolist() == expected.tolist()
