"""What a sample answers does not depend on its neighbours: who they are, when they come and go, and how they choose."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_refs import freed_at_once
from helpers import random_image
from live_server import image_chat, live
from served import CHATS, alone, arrivals_of, sample, url_of
from shared_fixtures import TILED, Loaded

from diffvl.decode.answer import Decoder, answer_chats, user_message
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve import joining
from diffvl.serve.block_batch import BlockBatch
from diffvl.serve.sample import Sample

SETTINGS = [
    DecodeSettings(max_new_tokens=9, denoising_steps=2),
    DecodeSettings(max_new_tokens=17),
    DecodeSettings(max_new_tokens=14, remasking="low_confidence_dynamic", threshold=0.02),
    DecodeSettings(max_new_tokens=11, temperature=1.0, seed=7, top_k=20),
    DecodeSettings(max_new_tokens=13, denoising_steps=3, remasking="sequential"),
    DecodeSettings(max_new_tokens=10, remasking="entropy", entropy_budget=6.0),
]


def staggered(loaded: Loaded, arrivals: list[list[Sample]], gone: Sample | None = None) -> None:
    """Decodes samples that come in groups, one group at each block border; `gone` leaves at the third."""
    model, processor = loaded
    batch, waiting, border = BlockBatch(model, processor.pad_token_id), list(arrivals), 0
    while batch.samples or waiting:
        border += 1
        if border == 3 and gone is not None:
            batch.drop([gone])
        if waiting:
            decoder, going_on = batch.take_in(waiting.pop(0))
            batch.add(decoder, going_on)
        if batch.samples:
            ended = batch.decode_block()
            assert all(one.ended for one in ended) and not any(one.ended for one in batch.samples)


@pytest.mark.parametrize(
    ("model_type", "size", "context", "grid", "target"),
    [
        ("llama", 4, "block", "absolute", "same"),
        ("llama", 4, "causal", "response", "shift"),
        pytest.param("llama", 24, "block", "absolute", "shift", marks=pytest.mark.slow),
        pytest.param("gemma2", 8, "causal", "absolute", "same", marks=pytest.mark.slow),
        pytest.param(TILED, 8, "block", "absolute", "same", marks=pytest.mark.slow),
        ("qwen2_5_vl", 4, "block", "absolute", "same"),
        ("gemma3", 24, "causal", "absolute", "same"),
    ],
)
def test_samples_that_come_and_go_answer_as_alone(
    model_type: str, size: int, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]
):
    both = loaded(model_type)
    both[0].config.set_decoding("blocks", size, context, grid, target)
    asked = [(chat, settings) for number, settings in enumerate(SETTINGS) for chat in (CHATS[number % len(CHATS)],)]
    wanted = [alone(both, *one) for one in asked]
    samples = [sample(both, *one) for one in asked]
    staggered(both, arrivals_of(samples))
    assert [one.answer for one in samples] == wanted
    assert len({tuple(answer) for answer in wanted}) > 3


@pytest.fixture
def llama(loaded: Callable[[str], Loaded]) -> Loaded:
    both = loaded("llama")
    both[0].config.set_decoding("blocks", 4, "block", "absolute", "same")
    return both


def test_an_image_in_the_first_open_block_is_decoded_before_its_sample_joins(llama: Loaded):
    """The case is there: the first block shows an image. Its sample may also have ended by then."""
    llama[0].config.set_decoding("blocks", 24, "block", "absolute", "same")
    one, short = (sample(llama, CHATS[3], replace(SETTINGS[0], max_new_tokens=limit)) for limit in (20, 1))
    decoder, going_on = BlockBatch(llama[0], llama[1].pad_token_id).take_in([one, short])
    assert going_on == [one] and one.answer and len(short.answer) == 1 and short.ended == "length"
    assert decoder.committed.rows is None and not decoder.block.shows_image


def test_a_whole_vision_language_model_is_served(loaded: Callable[[str], Loaded]):
    """Over HTTP, with images of two sizes at once; its own processor and position ids."""
    model, processor = loaded("qwen2_5_vl")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    decoder, settings = Decoder(model, processor), DecodeSettings(max_new_tokens=8)
    images = [random_image(1), random_image(2).resize((64, 90)), None]
    messages = [user_message("What is it?", [] if one is None else [one]) for one in images]
    wanted = [answer_chats(decoder, [[message]], settings)[0].text for message in messages]
    urls = [[] if one is None else [url_of(one)] for one in images]
    with live(decoder) as server, ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(server.ask, image_chat("What is it?", *one, max_tokens=8)) for one in urls]
        assert [one.result().text for one in asked] == wanted and len(set(wanted)) > 1


def test_a_checkpoint_that_was_not_trained_on_blocks_decodes_token_by_token(llama: Loaded):
    """Its blocks have one token: what `shift` predicts stands in the cache of who joins and of who was there."""
    llama[0].config.set_decoding("ar", 1, "causal", "absolute", "shift")
    asked = [(chat, DecodeSettings(max_new_tokens=limit)) for chat, limit in zip(CHATS, (9, 4, 7, 5), strict=True)]
    wanted = [alone(llama, *one) for one in asked]
    samples = [sample(llama, *one) for one in asked]
    staggered(llama, arrivals_of(samples))
    assert [one.answer for one in samples] == wanted


def test_who_leaves_early_changes_nothing(llama: Loaded):
    asked = list(zip(CHATS[:3], SETTINGS[1:4], strict=True))
    wanted = [alone(llama, *one) for one in asked]
    samples = [sample(llama, *one) for one in asked]
    staggered(llama, arrivals_of(samples), gone=samples[0])
    assert [one.answer for one in samples[1:]] == wanted[1:]
    assert len(samples[0].answer) < len(wanted[0]) and samples[0].ended is None


def test_padding_that_is_seen_is_noticed(llama: Loaded, monkeypatch: pytest.MonkeyPatch):
    """The bug that the tests above are there for."""
    asked = list(zip(CHATS[:3], SETTINGS[:3], strict=True))
    wanted = [alone(llama, *one) for one in asked]
    joined = joining._layouts

    def seen(*both: Any) -> Any:
        layout = joined(*both)
        return replace(layout, valid=torch.ones_like(layout.valid))

    monkeypatch.setattr(joining, "_layouts", seen)
    samples = [sample(llama, *one) for one in asked]
    staggered(llama, arrivals_of(samples))
    assert [one.answer for one in samples] != wanted


def test_a_batch_that_is_never_empty_does_not_grow(llama: Loaded):
    """Its cache is as long as the longest sample in it, whoever was there before."""
    model, processor = llama
    batch, widths = BlockBatch(model, processor.pad_token_id), []
    for number in range(40):
        decoder, going_on = batch.take_in(
            [sample(llama, CHATS[0], DecodeSettings(max_new_tokens=6 + number % 5, denoising_steps=1))]
        )
        batch.add(decoder, going_on)
        batch.decode_block()
        assert batch.samples and batch._decoder is not None
        widths.append(batch._decoder.committed.length)
    assert max(widths[20:]) <= max(widths[:20]) and len({one.keys.shape[2] for one in batch._decoder.committed.cache.layers}) == 1  # type: ignore[union-attr]


def test_the_cache_of_an_empty_batch_is_free(llama: Loaded, monkeypatch: pytest.MonkeyPatch):
    """Whether the last sample ends or leaves, and after others have joined and gone."""
    asked = list(zip(CHATS[:3], SETTINGS[:3], strict=True))
    samples = [sample(llama, *one) for one in asked]
    with freed_at_once(monkeypatch):
        staggered(llama, arrivals_of(samples))
    assert all(one.ended for one in samples)
    left = sample(llama, *asked[1])
    with freed_at_once(monkeypatch):
        staggered(llama, [[left]], gone=left)
    assert left.ended is None and left.answer


def test_why_an_answer_ended(llama: Loaded):
    model, processor = llama
    whole = alone(llama, CHATS[0], DecodeSettings(max_new_tokens=24))
    text = processor.tokenizer.decode(whole[:8])

    def reason(**settings: Any) -> tuple[str | None, int]:
        one = sample(llama, CHATS[0], DecodeSettings(**{"max_new_tokens": 24, **settings}))
        staggered(llama, [[one]])
        return one.ended, len(one.answer)

    assert reason() == ("length", 24)
    assert reason(max_new_tokens=7) == ("length", 7)
    assert reason(eos_token_id=frozenset({whole[5]}))[0] == "stop"
    assert reason(stop_strings=(text[-2:],))[0] == "stop"
    assert reason(max_new_tokens=4, eos_token_id=frozenset({whole[3]})) == ("stop", whole.index(whole[3]) + 1)
