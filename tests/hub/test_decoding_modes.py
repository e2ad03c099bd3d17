"""Decoding of real tiny models: what a mode, a neighbour or a stop may and may not change."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_chats import CHATS, answers, generated
from helpers import CONTEXTS, GRIDS, TARGETS, alternating, crossed, pairwise, random_image
from shared_fixtures import Loaded
from transformers import GenerationConfig, TextIteratorStreamer

from diffvl.config.families import ALL_LINEAR
from diffvl.config.recipe import Lora
from diffvl.hub import autoregressive_diffvl
from diffvl.hub.answers_diffvl import DenoisingStep, certain, cut
from diffvl.hub.blocks_diffvl import Places
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.settings_diffvl import STRATEGIES, DecodeSettings
from diffvl.train.parts import add_adapters

# --- a batch is its prompts -----------------------------------------------------------------------------------------------------

REMASKING: list[dict[str, Any]] = [
    {"denoising_steps": 2},
    {"remasking": "low_confidence_dynamic", "threshold": 0.3},
    {"remasking": "sequential", "denoising_steps": 3},
    {"remasking": "entropy", "entropy_budget": 3.0},
]


@pytest.mark.parametrize(("model_type", "rule"), alternating(("llama", "gemma2", "gpt2", "llama"), REMASKING))
def test_neighbours_change_nothing(model_type: str, rule: dict[str, Any], loaded: Callable[[str], Loaded]):
    """Every prompt alone and in a batch with images and earlier turns, ended by stops at different times."""
    model, _ = loaded(model_type)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    alone = [answers(loaded(model_type), [chat], max_new_tokens=14, **rule)[0] for chat in CHATS]
    # A token of the first answer as the stop: samples then end at different blocks and leave the batch.
    for stop in (model.config.stop_token_ids[0], alone[0][2], alone[3][5]):
        together = answers(loaded(model_type), CHATS, max_new_tokens=14, eos_token_id=stop, **rule)
        for one, several in zip(alone, together, strict=True):
            end = one.index(stop) + 1 if stop in one else len(one)
            assert several[:end] == one[:end]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("target", TARGETS)
def test_samples_leave_before_anything_is_committed(context: str, target: str, loaded: Callable[[str], Loaded]):
    """All prompts fit in their first block, and some answers end there."""
    model, _ = loaded("qwen2")
    longest = max(len(loaded("qwen2")[1].encode_chat(chat, add_generation_prompt=True).ids) for chat in CHATS)
    model.config.set_decoding("blocks", longest + 4, context, "absolute", target)
    settings: dict[str, Any] = {"max_new_tokens": longest, "denoising_steps": 3}
    alone = [answers(loaded("qwen2"), [chat], **settings)[0] for chat in CHATS]
    stop = alone[0][0]
    ends = [answer.index(stop) + 1 if stop in answer else len(answer) for answer in alone]
    assert min(ends) < 4
    together = answers(loaded("qwen2"), CHATS, eos_token_id=stop, **settings)
    for one, several, end in zip(alone, together, ends, strict=True):
        assert several[:end] == one[:end]


def test_ended_samples_stay_where_they_are(loaded: Callable[[str], Loaded]):
    """A long prompt that has ended takes no places behind the context while the short ones go on: too few end to leave."""
    model, processor = loaded("gpt2")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    context = model.config.text_config.max_position_embeddings
    lengths = [context - 8, *[context // 2] * 7]
    ids = torch.full((8, max(lengths)), processor.tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.randint(0, 250, (length,), generator=generator)
        mask[row, -length:] = 1
    first = model.generate(ids[:1], max_new_tokens=8, eos_token_id=-1)[0, -8:].tolist()
    stop = first[1]
    together = model.generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=stop, pad_token_id=0)
    assert isinstance(together, torch.Tensor)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, -length:], max_new_tokens=40, eos_token_id=stop, pad_token_id=0)
        given = alone[0, length:].tolist()
        assert together[row, max(lengths) :][: len(given)].tolist() == given


def test_finished_samples_leave_the_batch(loaded: Callable[[str], Loaded]):
    """The trunk sees fewer rows when some have ended."""
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    alone = [answers(loaded("llama"), [chat], max_new_tokens=24)[0] for chat in CHATS]
    stop = alone[0][1]
    rows: list[int] = []
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, given: rows.append(given["inputs_embeds"].shape[0]), with_kwargs=True
    )
    try:
        together = answers(loaded("llama"), CHATS, max_new_tokens=24, eos_token_id=stop)
    finally:
        hook.remove()
    assert rows[0] == 4 and rows[-1] < 4 and rows == sorted(rows, reverse=True)
    for one, several in zip(alone, together, strict=True):
        end = one.index(stop) + 1 if stop in one else len(one)
        assert several[:end] == one[:end]


# --- the fused commit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), crossed(CONTEXTS, GRIDS, TARGETS))
def test_a_fused_commit_decodes_what_a_commit_of_its_own_does(
    model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    """The unfused loop flushes what waits before every denoising step; same tokens, more forwards."""
    model, _ = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, grid, target)
    settings: dict[str, Any] = {"max_new_tokens": 12, "denoising_steps": 2, "eos_token_id": -1}
    fused = generated(loaded(model_type), CHATS, **settings)
    predict = BlockDecoder.predict

    def unfused(self: BlockDecoder, masked: Places) -> torch.Tensor:
        self.flush()
        return predict(self, masked)

    monkeypatch.setattr(BlockDecoder, "predict", unfused)
    plain = generated(loaded(model_type), CHATS, **settings)
    assert fused.sequences is not None and plain.sequences is not None and fused.forwards is not None
    assert fused.sequences.tolist() == plain.sequences.tolist()
    # A commit for each of the blocks but the last, and the prompt's where it is not taken in alone anyway.
    assert plain.forwards is not None and plain.forwards > fused.forwards
    assert fused.settling == plain.settling


# --- the prefix of a conversation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), pairwise(["llama", "gemma2"], CONTEXTS, GRIDS, TARGETS))
def test_a_conversation_goes_on_from_its_prefix(
    model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]
):
    """Three turns, two images: the same answers as from nothing, with fewer tokens through the trunk."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, grid, target)
    chat: list[dict[str, Any]] = []
    prefix, reused = None, []
    for number, turn in enumerate((CHATS[0][0], {"role": "user", "content": "And what else?"}, CHATS[2][2])):
        chat.append(turn)
        fresh = generated((model, processor), [chat], max_new_tokens=11)
        output = generated((model, processor), [chat], max_new_tokens=11, prefix=prefix)
        assert fresh.sequences is not None and output.sequences is not None
        assert output.sequences.tolist() == fresh.sequences.tolist() and fresh.reused == 0
        prefix = output.prefix
        reused.append(output.reused)
        chat.append({"role": "assistant", "content": f"My answer {number}."})
    assert reused[0] == 0 and 0 < reused[1] < reused[2]


@pytest.mark.parametrize(("context", "grid", "target"), pairwise(CONTEXTS, GRIDS, TARGETS))
def test_the_same_prompt_again(context: str, grid: str, target: str, loaded: Callable[[str], Loaded]):
    """A retry: everything of the prompt may be in the cache already."""
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, context, grid, target)
    for chat in CHATS:
        first = generated(loaded("llama"), [chat], max_new_tokens=7)
        again = generated(loaded("llama"), [chat], max_new_tokens=7, prefix=first.prefix)
        assert first.sequences is not None and again.sequences is not None
        assert again.sequences.tolist() == first.sequences.tolist() and again.reused is not None and again.reused > 0


def test_a_prefix_with_another_image_is_not_taken(loaded: Callable[[str], Loaded]):
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    prefix = generated(loaded("llama"), [CHATS[0]], max_new_tokens=6).prefix
    other = [{**CHATS[0][0], "content": [CHATS[0][0]["content"][0], {"type": "image", "image": random_image(7)}]}]
    output = generated(loaded("llama"), [other], max_new_tokens=6, prefix=prefix)
    fresh = generated(loaded("llama"), [other], max_new_tokens=6)
    assert output.sequences is not None and fresh.sequences is not None
    assert output.reused == 0 and output.sequences.tolist() == fresh.sequences.tolist()


def test_a_prefix_is_used_once(loaded: Callable[[str], Loaded]):
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    prefix = generated(loaded("llama"), [CHATS[3]], max_new_tokens=6).prefix
    generated(loaded("llama"), [CHATS[3]], max_new_tokens=6, prefix=prefix)
    with pytest.raises(ValueError, match="this prefix was used before"):
        generated(loaded("llama"), [CHATS[3]], max_new_tokens=6, prefix=prefix)


# --- speculation and the AR baseline --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "grid", "target", "steps"), crossed(GRIDS, TARGETS, [None, 2]))
def test_speculation_gives_the_ar_answer(
    model_type: str, grid: str, target: str, steps: int | None, loaded: Callable[[str], Loaded]
):
    """Token for token, that of transformers' own generate on the same weights; in a batch and alone."""
    model, _ = loaded(model_type)
    model.config.set_decoding("blocks", 4, "causal", grid, target)
    settings: dict[str, Any] = {"max_new_tokens": 13}
    expected = answers(loaded(model_type), CHATS, mode="ar", **settings)
    repetitive = ("llama", "qwen3")  # stand-ins that say one token for ever in a causal context
    assert model_type in repetitive or max(len(set(answer)) for answer in expected) > 3
    assert answers(loaded(model_type), CHATS, mode="speculative", denoising_steps=steps, **settings) == expected
    assert answers(loaded(model_type), [CHATS[2]], mode="speculative", **settings) == [expected[2]]


def test_ended_samples_wait_for_the_others(loaded: Callable[[str], Loaded]):
    """Samples that have ended take no more places: no position lies behind what the longest answer needs."""
    model, _ = loaded("gpt2")
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    alone = [answers(loaded("gpt2"), [chat], mode="ar", max_new_tokens=24)[0] for chat in CHATS]
    stop = alone[0][0]
    hook = model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(int(given["position_ids"].max())), with_kwargs=True
    )
    seen: list[int] = []
    try:
        together = answers(loaded("gpt2"), CHATS, mode="speculative", max_new_tokens=24, eos_token_id=stop)
    finally:
        hook.remove()
    for one, several in zip(alone, together, strict=True):
        end = one.index(stop) + 1 if stop in one else len(one)
        assert several[:end] == one[:end]
    _, processor = loaded("gpt2")
    inputs = processor.apply_chat_template(CHATS, tokenize=True, add_generation_prompt=True)
    furthest = int(inputs["attention_mask"].sum(1).max()) + 24 + 4
    assert max(seen) <= furthest


@pytest.mark.parametrize("mode", ["speculative", "ar"])
def test_modes_that_go_on_from_a_prompt_need_one(mode: str, loaded: Callable[[str], Loaded]):
    model, _ = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    ids, mask = torch.full((2, 3), 40), torch.tensor([[1, 1, 1], [0, 0, 0]])
    with pytest.raises(ValueError, match=f"mode='{mode}' goes on from a prompt, but one is empty"):
        model.generate(ids, attention_mask=mask, mode=mode)  # type: ignore[arg-type]


def test_agreeing_drafts_save_forwards(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """With drafts that are the AR answer itself a round keeps a whole block; with bad ones it gives two tokens."""
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    settings: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": -1}
    truth = answers(loaded("llama"), [CHATS[3]], mode="ar", **settings)[0]
    draft = autoregressive_diffvl._draft

    def forwards(right: bool) -> int:
        def told(decoder: BlockDecoder, known: Any, masked: torch.Tensor, *given: Any) -> Any:
            drafted = draft(decoder, known, masked, *given)
            place = (decoder.block.position_BD - decoder.prompt.length_B[:, None]).clamp(0, len(truth) - 1)
            other = torch.tensor(truth)[place]
            first = masked & (masked.long().cumsum(1) == 1)
            drafted.ids = torch.where(masked & ~first, other if right else (other + 1) % 200, drafted.ids)
            return drafted

        with monkeypatch.context() as patch:
            patch.setattr(autoregressive_diffvl, "_draft", told)
            output = generated(loaded("llama"), [CHATS[3]], mode="speculative", **settings)
        assert output.sequences is not None and output.sequences[0].tolist() == truth and output.forwards is not None
        return output.forwards

    # The prompt's forward, then two a round: a round of blocks of 4 gives 5, 4, 4 ... tokens if all agree, 2 if none does.
    assert forwards(right=True) == 1 + 2 * 5
    assert forwards(right=False) == 1 + 2 * 10


# --- stops, streams, statistics -------------------------------------------------------------------------------------------------


def test_stop_strings_and_repetitions(loaded: Callable[[str], Loaded]):
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    free = answers(loaded("llama"), [CHATS[1]], max_new_tokens=24, eos_token_id=-1)[0]
    tokenizer = processor.tokenizer
    text = tokenizer.decode(free[:11], skip_special_tokens=False)
    for length in (2, 5):
        string = text[-length:]
        first = next(end for end in range(1, 25) if string in tokenizer.decode(free[:end], skip_special_tokens=False))
        stopped = answers(
            loaded("llama"), [CHATS[1]], max_new_tokens=24, eos_token_id=-1, stop_strings=[string, "\x01"], tokenizer=tokenizer
        )
        assert stopped == [free[:first]] and first <= 11


@pytest.mark.parametrize(("answer", "repeats", "kept"), [
    ([1, 2, 3, 3, 3, 3], 4, [1, 2, 3]),
    ([1, 2, 1, 2, 1, 2], 3, [1, 2]),
    ([9, 1, 2, 1, 2, 1], 3, None),
    ([3, 3, 3], 4, None),
    ([7] + [5] * 16, 4, [7, 5]),
    ([1, 2, 1, 2, 1, 2, 8, 9], 3, [1, 2]),
])  # fmt: skip
def test_a_loop_is_cut_after_its_first_round(answer: list[int], repeats: int, kept: list[int] | None):
    grown = list(answer)
    settings = DecodeSettings(eos_token_id=frozenset({99}), max_new_tokens=50, repetition_stop=repeats)
    assert cut(grown, 0, settings) == (kept is not None)
    assert grown == (answer if kept is None else kept)


@pytest.mark.parametrize("portion", [1, 2, 3, 8])
def test_a_loop_behind_another_end_is_none(portion: int):
    """The limit at 5, then a stop token, a stop text: all before the loop closes, in whatever portions tokens come."""
    loop = [1, 2, 1, 2, 1, 2, 7, 7]

    class Digits:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(str, ids))

    def kept(answer: list[int], **changed: Any) -> list[int]:
        common: dict[str, Any] = {"eos_token_id": frozenset({99}), "max_new_tokens": 50, "repetition_stop": 3}
        settings, grown = DecodeSettings(**{**common, **changed}), list[int]()
        for start in range(0, len(answer), portion):
            seen = len(grown)
            grown += answer[start : start + portion]
            if cut(grown, seen, settings):
                break
        return grown

    assert kept(loop, max_new_tokens=5) == [1, 2, 1, 2, 1]
    assert kept([1, 2, 1, 2, 99, 1, 2]) == [1, 2, 1, 2, 99]
    assert kept(loop, stop_strings=("1212",), tokenizer=Digits()) == [1, 2, 1, 2]
    assert kept(loop) == [1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_a_loop_takes_nothing_away_that_was_certain(seed: int):
    """Random answers over two tokens, which run into loops all the time."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (60,), generator=generator).tolist()
    settings = DecodeSettings(eos_token_id=frozenset({99}), max_new_tokens=60, repetition_stop=3)
    grown: list[int] = []
    count, shown = 0, []
    for token in tokens:
        grown.append(token)
        if cut(grown, len(grown) - 1, settings):
            break
        assert certain(grown, settings) >= count
        count = certain(grown, settings)
        shown = grown[:count]
    assert len(grown) < 60 and grown[:count] == shown and count <= len(grown)


class Collected:
    """A streamer as transformers has them."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("mode", ["blocks", "speculative", "ar"])
def test_a_streamer_gets_final_tokens(mode: str, loaded: Callable[[str], Loaded]):
    model, processor = loaded("qwen3")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    streamer = Collected()
    answer = answers(loaded("qwen3"), [CHATS[1]], max_new_tokens=10, mode=mode, streamer=streamer)[0]
    prompt = processor.apply_chat_template([CHATS[1]], tokenize=True, add_generation_prompt=True)["input_ids"][0].tolist()
    assert streamer.pieces[0] == prompt and [token for piece in streamer.pieces[1:] for token in piece] == answer
    assert streamer.ended
    with pytest.raises(ValueError, match="a streamer takes one prompt, got 2"):
        answers(loaded("qwen3"), CHATS[:2], streamer=streamer)


@pytest.mark.parametrize("mode", ["blocks", "speculative", "ar"])
def test_a_streamer_gets_the_answer_where_a_loop_ends_it(mode: str, loaded: Callable[[str], Loaded]):
    """These weights say the same for ever: what is cut as a loop must not have been streamed."""
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    for repeats in (2, 3, 5):
        streamer = Collected()
        settings: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": -1, "mode": mode, "repetition_stop": repeats}
        (answer,) = answers(loaded("llama"), [CHATS[3]], streamer=streamer, **settings)
        assert [token for piece in streamer.pieces[1:] for token in piece] == answer and len(answer) < 24


def test_streamers_of_transformers(loaded: Callable[[str], Loaded]):
    model, processor = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    tokenizer: Any = processor.tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    (answer,) = answers(loaded("qwen2"), [CHATS[1]], max_new_tokens=10, eos_token_id=-1, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(answer)


@pytest.mark.parametrize("wrapped", [False, True])
def test_ar_answers_by_the_logits_alone(wrapped: bool, loaded: Callable[[str], Loaded]):
    """What a published checkpoint asks of `generate` besides, also in greedy decoding, would be in no other mode."""
    model, processor = copy.deepcopy(loaded("llama"))
    expected = answers((model, processor), CHATS, mode="ar", max_new_tokens=12)
    habits = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, max_length=20)
    model.trunk.generation_config = habits
    if wrapped:
        add_adapters(model, Lora(rank=2), ALL_LINEAR)
    assert answers((model, processor), CHATS, mode="ar", max_new_tokens=12) == expected
    assert model.trunk.generation_config is habits
    assert any(len(set(answer)) < len(answer) for answer in expected), "a penalty would have changed none"


def test_ar_follows_token_by_token(loaded: Callable[[str], Loaded]):
    """Tokens are streamed as they come, stops end the decoding and not only the answer, and prefill has its own time."""
    model, processor = both = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    calls: list[int] = []
    hook = model.language_model.register_forward_hook(lambda *_: calls.append(len(streamer.pieces)))
    try:
        streamer = Collected()
        whole = generated(both, [CHATS[1]], mode="ar", max_new_tokens=12, eos_token_id=-1, streamer=streamer)
        assert calls == list(range(1, 13)), "a token more each forward"
    finally:
        hook.remove()
    assert whole.sequences is not None and whole.prefill_seconds is not None and whole.decode_seconds is not None
    assert whole.prefill_seconds > 0 and whole.decode_seconds > 0 and whole.forwards == 12
    tokens = whole.sequences[0].tolist()
    text = processor.tokenizer.decode(tokens[:3], skip_special_tokens=False)
    ended = generated(
        both, [CHATS[1]], mode="ar", max_new_tokens=12, eos_token_id=-1, stop_strings=text, tokenizer=processor.tokenizer
    )
    assert ended.forwards == ended.tokens == 3
    batch = generated(both, CHATS, mode="ar", max_new_tokens=12, eos_token_id=-1, repetition_stop=2)
    assert batch.forwards is not None and batch.forwards <= 12


@pytest.mark.parametrize("mode", ["speculative", "ar"])
def test_the_mask_token_is_never_an_answer(mode: str, loaded: Callable[[str], Loaded]):
    """Its row, the image's and a spare one made the likeliest of all."""
    model, _ = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    bias = torch.zeros(model.config.text_config.vocab_size)
    never = {model.config.mask_token_id, model.config.image_token_id, *range(model.config.vocabulary_size, len(bias))}
    bias[list(never)] = 1e4
    hook = model.get_output_embeddings().register_forward_hook(lambda *given: given[2] + bias)
    try:
        found = answers(loaded("qwen2"), CHATS, mode=mode, max_new_tokens=9, eos_token_id=-1)
    finally:
        hook.remove()
    assert not never & {token for answer in found for token in answer}
    assert found == answers(loaded("qwen2"), CHATS, mode=mode, max_new_tokens=9, eos_token_id=-1)


def test_steps_can_be_watched(loaded: Callable[[str], Loaded]):
    """The order in which tokens settle, as it happens and in the output."""
    model, _ = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "response", "same")
    seen: list[DenoisingStep] = []
    output = generated(loaded("llama"), [CHATS[3]], max_new_tokens=8, denoising_steps=2, on_step=seen.append, eos_token_id=-1)
    assert [step.settled.sum().item() for step in seen] == [2, 2, 2, 2] and output.settling is not None
    assert [(step.ids == model.config.mask_token_id).sum().item() for step in seen] == [2, 0, 2, 0]
    assert all((step.confidence[step.settled] > 0).all() and step.samples == [0] for step in seen)
    order = [[0] * 4, [0] * 4]
    for number, step in enumerate(seen):
        for place in step.settled[0].nonzero()[:, 0].tolist():
            order[number // 2][place] = number
    assert output.settling == [[*order[0], *order[1]]]


def test_every_strategy_is_listed_and_its_statistics_add_up(loaded: Callable[[str], Loaded]):
    model, _ = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    for strategy in STRATEGIES:
        output = generated(loaded("qwen2"), CHATS, max_new_tokens=8, remasking=strategy, eos_token_id=-1)
        assert output.tokens == 32 and output.forwards and output.tokens_per_forward == 32 / output.forwards
        assert output.prefill_seconds is not None and output.prefill_seconds > 0
        assert output.decode_seconds is not None and output.decode_seconds > 0
