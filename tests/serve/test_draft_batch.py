"""A lossless checkpoint behind a server: answers are its parent's, or drawn from its parent, whoever is decoded beside them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_refs import freed_at_once
from gated_models import LONGEST, gated_model, guess_well
from live_server import image_chat, live, text_chat
from served import CHATS, IMAGE, alone, arrivals_of, sample, url_of
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder, answer_chats, user_message
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve import joining
from diffvl.serve.asked import NOT_DRAFTED
from diffvl.serve.coupling import PositionDraws
from diffvl.serve.draft_batch import DraftBatch
from diffvl.serve.sample import Sample
from tools.serve_mistakes import mistakes

GREEDY = [DecodeSettings(max_new_tokens=limit) for limit in (9, 17, 14, 6, 13, 1)]
DRAWN = [DecodeSettings(max_new_tokens=12, temperature=1.0, seed=seed, top_k=20) for seed in range(3)]


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("gemma2", "gemma3", "qwen3_vl")]


@pytest.fixture(params=["qwen2", "llava", *SLOW])
def gated(request: pytest.FixtureRequest, prepared: Callable[[str], Path]) -> Loaded:
    return gated_model(prepared(request.param))


@pytest.fixture
def qwen2(prepared: Callable[[str], Path]) -> Loaded:
    return gated_model(prepared("qwen2"))


def batch_of(loaded: Loaded) -> DraftBatch:
    return DraftBatch(loaded[0], loaded[1].pad_token_id, most=8)


def in_turn(batch: DraftBatch, length: int | None) -> None:
    """Lets the batch draft in every way, one after the other, whatever pays here; or always as many tokens."""
    plan, rounds = batch.plan, iter(range(10**6))

    def masks(checking: bool, count: int) -> int:
        if checking and not plan.is_fused:
            return 0
        turn = next(rounds)
        plan.is_fused, plan.length = turn % 3 > 0, turn % (LONGEST + 1) if length is None else length
        return plan.length

    plan.masks = masks  # type: ignore[method-assign]


def staggered(batch: DraftBatch, arrivals: list[list[Sample]], gone: Sample | None = None) -> None:
    """Decodes samples that come in groups, one group between two rounds; `gone` leaves at the third."""
    waiting, border = list(arrivals), 0
    while batch.samples or waiting:
        border += 1
        if border == 3 and gone is not None:
            batch.drop([gone])
        if waiting:
            batch.add(*batch.take_in(waiting.pop(0)))
        if batch.samples:
            ended = batch.decode_block()
            assert all(one.ended for one in ended) and not any(one.ended for one in batch.samples)


def chosen_one_by_one(loaded: Loaded, chat: list[dict[str, Any]], settings: DecodeSettings) -> list[int]:
    """The parent's own answer: one token a forward of the whole text, each drawn with the noise of its position."""
    model, processor = loaded
    inputs = processor.apply_chat_template([chat], tokenize=True, add_generation_prompt=True)
    settings = settings.for_checkpoint(model.config)
    draws = PositionDraws(settings, model.device, model.config)
    ids: Any = inputs["input_ids"]
    answer: list[int] = []
    while len(answer) < settings.max_new_tokens and not (answer and answer[-1] in (settings.eos_token_id or ())):
        logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), "answer_index": None}).logits
        answer.append(int(draws.tokens(logits[0, -1:].float(), ids.shape[1])))
        ids = torch.cat([ids, torch.tensor([answer[-1:]])], 1)
    return answer


def test_samples_that_come_and_go_answer_as_alone(gated: Loaded, monkeypatch: pytest.MonkeyPatch):
    """Every draft length and both ways to draft, with drafts that are mostly right."""
    asked = [(CHATS[number % len(CHATS)], settings) for number, settings in enumerate(GREEDY)]
    wanted = [alone(gated, *one) for one in asked]
    samples = [sample(gated, *one) for one in asked]
    guess_well(monkeypatch, wanted, numbers={one: number for number, one in enumerate(samples)})
    batch = batch_of(gated)
    in_turn(batch, None)
    staggered(batch, arrivals_of(samples))
    assert [one.answer for one in samples] == wanted and len({tuple(answer) for answer in wanted}) > 3
    assert 0 < batch.accepted < batch.drafted == sum(one.drafted for one in samples)
    assert batch.forwards < sum(map(len, wanted))


@pytest.mark.parametrize("length", [None, 0, 3])
def test_what_is_drawn_depends_on_the_seed_alone(length: int | None, qwen2: Loaded):
    """On no neighbour, and on no draft: it is what the parent draws token by token with the noise of each position."""
    asked = [(CHATS[number % len(CHATS)], settings) for number, settings in enumerate([*DRAWN, *GREEDY[:2]])]
    wanted = [chosen_one_by_one(qwen2, *one) for one in asked[: len(DRAWN)]]
    samples = [sample(qwen2, *one) for one in asked]
    batch = batch_of(qwen2)
    in_turn(batch, length)
    staggered(batch, arrivals_of(samples))
    assert [one.answer for one in samples[: len(DRAWN)]] == wanted and len({tuple(answer) for answer in wanted}) == len(DRAWN)
    assert samples[-1].answer == alone(qwen2, *asked[-1])
    assert all(one.coupling is None for one in samples)  # the noise of who has ended is let go
    assert bool(batch.drafted) == (length != 0)


def test_draws_are_from_the_distribution(qwen2: Loaded):
    """Over many positions each token is drawn as often as its probability says: within five standard deviations."""
    config, many = qwen2[0].config, 4000
    settings = DecodeSettings(temperature=1.0, seed=3).for_checkpoint(config)
    logits = torch.full((config.vocabulary_size,), float("-inf"))
    logits[:6] = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    drawn = PositionDraws(settings, torch.device("cpu"), config).tokens(logits.expand(many, -1), 0)
    chance = logits.softmax(-1)
    share = torch.bincount(drawn, minlength=len(logits)) / many
    assert ((share - chance).abs() <= 5 * (chance * (1 - chance) / many).sqrt()).all()
    again = PositionDraws(settings, torch.device("cpu"), config).tokens(logits.expand(5, -1), 7)
    assert again.tolist() == drawn[7:12].tolist()  # a position draws the same whenever it is asked


def test_who_leaves_early_changes_nothing(qwen2: Loaded):
    asked = list(zip(CHATS[:3], GREEDY[1:4], strict=True))
    wanted = [alone(qwen2, *one) for one in asked]
    samples = [sample(qwen2, *one) for one in asked]
    batch = batch_of(qwen2)
    in_turn(batch, None)
    staggered(batch, arrivals_of(samples), gone=samples[0])
    assert [one.answer for one in samples[1:]] == wanted[1:]
    assert len(samples[0].answer) < len(wanted[0]) and samples[0].ended is None


def test_padding_that_is_seen_is_noticed(qwen2: Loaded, monkeypatch: pytest.MonkeyPatch):
    """The bug that the tests above are there for."""
    asked = list(zip(CHATS[:3], GREEDY[:3], strict=True))
    wanted = [alone(qwen2, *one) for one in asked]
    joined = joining._layouts

    def seen(*both: Any) -> Any:
        layout = joined(*both)
        return layout.with_rows({**layout.rows, "valid": torch.ones_like(layout.valid)})

    monkeypatch.setattr(joining, "_layouts", seen)
    samples = [sample(qwen2, *one) for one in asked]
    staggered(batch_of(qwen2), arrivals_of(samples))
    assert [one.answer for one in samples] != wanted


def test_a_batch_that_is_never_empty_does_not_grow(qwen2: Loaded):
    batch, widths = batch_of(qwen2), []
    in_turn(batch, 2)
    for number in range(40):
        batch.add(*batch.take_in([sample(qwen2, CHATS[0], DecodeSettings(max_new_tokens=6 + number % 5))]))
        batch.decode_block()
        assert batch._drafter is not None
        widths.append(batch._drafter.decoder.committed.length)
    assert max(widths[20:]) <= max(widths[:20])


def test_who_joins_drafts_as_the_batch_does(qwen2: Loaded):
    """By a choice of its own a newcomer would widen the next round of everybody, or make it one in which nobody else drafts."""
    batch, widths = batch_of(qwen2), list[int]()
    for length in (0, 3):
        batch.clear()
        batch.plan.is_fused = False
        batch.plan.masks = lambda checking, count, most=length: 0 if checking else most if count > 1 else 4  # type: ignore[method-assign]
        endless = [DecodeSettings(max_new_tokens=16, temperature=1.0, seed=seed, eos_token_id=frozenset()) for seed in (1, 2)]
        old = [sample(qwen2, CHATS[0], settings) for settings in endless]
        batch.add(*batch.take_in(old))
        while batch.samples and not any(one.ended for one in old):
            batch.add(*batch.take_in([sample(qwen2, CHATS[0], DecodeSettings(max_new_tokens=16))]))
            assert batch._drafter is not None
            widths.append(batch._drafter.drafts.ids.shape[1])
            batch.decode_block()
        rounds = old[0].blocks
        assert rounds > 6 and all(one.drafted >= length * (rounds // 2 - 1) for one in old)
    assert set(widths) == {0, 3}


def test_a_fault_is_told_to_whom_it_happened(qwen2: Loaded, monkeypatch: pytest.MonkeyPatch):
    """A prompt that there is no room for fails alone; a round that fails ends its answers; then all is as before."""
    go_on, faults = DraftBatch._go_on, list[Exception]()

    def failing(batch: DraftBatch, drafter: Any) -> None:
        if drafter.fresh and max(drafter.filled) > 200:
            raise torch.OutOfMemoryError("no room")
        if not drafter.fresh and faults:
            raise faults.pop()
        go_on(batch, drafter)

    monkeypatch.setattr(DraftBatch, "_go_on", failing)
    with live(Decoder(*qwen2)) as server, ThreadPoolExecutor(4) as clients:
        wanted = server.ask(text_chat("Hi", max_tokens=12)).text
        asked = [clients.submit(server.ask, text_chat(text, max_tokens=12)) for text in ("Hi", "x" * 250, "Ho", "Hi")]
        assert [one.result().status for one in asked] == [200, 503, 200, 200]
        assert asked[0].result().text == asked[3].result().text == wanted
        faults.append(RuntimeError("a kernel failed"))
        assert server.ask(text_chat("Hi", max_tokens=12)).status == 500
        assert server.ask(text_chat("Hi", max_tokens=12)).text == wanted
        server.wait_until(server.is_empty)


def test_over_http(prepared: Callable[[str], Path]):
    """A picture, a stream and draws, asked at once; what an answer has cost; what a request cannot ask for."""
    model, processor = gated_model(prepared("qwen2"))
    decoder = Decoder(model, processor)
    wanted = answer_chats(decoder, [[user_message("What is it?", [IMAGE])]], DecodeSettings(max_new_tokens=8))[0].text
    with live(decoder) as server:
        picture = image_chat("What is it?", url_of(IMAGE), max_tokens=8)
        whole = server.ask(picture)
        assert whole.text == wanted and set(whole.json["diffvl"]) >= {"drafted", "accepted", "forwards"}
        pieces = [one["choices"][0]["delta"].get("content", "") for one in server.stream(picture)]
        assert "".join(pieces) == wanted
        drawn = {server.ask({**picture, "temperature": 1, "seed": 5}).text for _ in range(2)}
        assert len(drawn) == 1
        assert server.get("/v1/models").json["data"][0]["diffvl"]["drafts"] is True
        metrics = server.get("/metrics").body.decode()
        assert "diffvl_drafted_tokens_total" in metrics and "diffvl_blocks_total" not in metrics
        for key, value in {"denoising_steps": 2, "remasking": "sequential", "threshold": 0.5, "mode": "blocks"}.items():
            refused = server.ask({**picture, key: value})
            assert refused.status == 400 and refused.error["param"] == key and "draft" in refused.error["message"]
        assert server.ask({**picture, "stream": True, "show_steps": True}).error["param"] == "show_steps"
        wrong = [one for one in mistakes() if one.named in NOT_DRAFTED]
        assert wrong and all(one.named in server.ask(one.body).error["message"] for one in wrong)
        assert server.ask({**picture, "mode": "speculative", "denoising_steps": 1}).text == wanted


def test_the_cache_of_an_empty_batch_is_free(qwen2: Loaded, monkeypatch: pytest.MonkeyPatch):
    """Greedy and drawn, whether the last sample ends or leaves."""
    batch = batch_of(qwen2)
    in_turn(batch, None)
    samples = [sample(qwen2, chat, settings) for chat, settings in zip(CHATS[:1] * 4, (*GREEDY[:2], *DRAWN[:2]), strict=True)]
    with freed_at_once(monkeypatch):
        staggered(batch, arrivals_of(samples))
    assert all(one.ended for one in samples)
    left = sample(qwen2, CHATS[0], GREEDY[1])
    with freed_at_once(monkeypatch):
        staggered(batch, [[left]], gone=left)
    assert left.ended is None and left.answer
