"""A stream says what the whole answer says, and never what it has to take back."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from live_server import live, text_chat
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
from diffvl.serve.limits import Limits
from diffvl.serve.replies import AnswerText
from diffvl.serve.sample import Sample


@pytest.fixture
def with_blocks_of(loaded: Callable[[str], Loaded]) -> Callable[[int], Decoder]:
    model, processor = loaded("llama")

    def decoder(size: int) -> Decoder:
        model.config.set_decoding("blocks", size, "block", "absolute", "same")
        return Decoder(model, processor)

    return decoder


def say(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Whatever the model finds, every answer has these tokens, from its first on."""
    extend = Sample.extend

    def told(sample: Sample, tokens: list[int]) -> None:
        extend(sample, ids[len(sample.answer) :][: len(tokens)])

    monkeypatch.setattr(Sample, "extend", told)


@pytest.mark.parametrize("first", [1, 2])
def test_a_stream_that_fails_says_so(
    first: int, with_blocks_of: Callable[[int], Decoder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A fault of the server itself, at the first block or a later one: an event, no end as of a whole answer, and its count."""
    add, calls = AnswerText.add, list[int]()

    def failing(text: AnswerText, *given: Any) -> str:
        calls.append(len(given))
        if len(calls) == first:
            raise KeyError("nobody had thought of this")
        return add(text, *given)

    monkeypatch.setattr(AnswerText, "add", failing)
    with live(with_blocks_of(4)) as server:
        with server.begun(text_chat("Hi", max_tokens=12, stream=True)) as response:
            assert response.status == 200
            *events, nothing = response.read().decode().split("\n\n")
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (error["code"], error["type"], nothing) == ("internal_error", "server_error", "")
        assert "thought" not in error["message"] and "nobody had thought of this" in caplog.text
        server.wait_until(server.is_empty)
        counted = server.get("/metrics").body
        assert b'diffvl_requests_total{status="500"} 1.0' in counted and b'status="200"' not in counted
        assert server.stream(text_chat("Hi", max_tokens=4))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_loop_that_is_cut_is_in_no_stream(size: int, with_blocks_of: Callable[[int], Decoder], monkeypatch: pytest.MonkeyPatch):
    """The tokens of a loop have been told by the time it closes, which takes all but its first round away."""
    decoder, texts = with_blocks_of(size), list[AnswerText]()
    tokenizer: Any = decoder.processor.tokenizer
    ids = tokenizer("Well, ha! ha! ha! ha! ha! ha!", add_special_tokens=False)["input_ids"]
    say(monkeypatch, ids)
    add = AnswerText.add
    monkeypatch.setattr(AnswerText, "add", lambda text, *given: texts.append(text) or add(text, *given))
    with live(decoder, Limits(samples=2)) as server:
        request = text_chat("Hi", max_tokens=len(ids), repetition_stop=3)
        whole = server.ask(request)
        counts = server.service.engine.counts
        assert counts.answer_tokens == whole.json["usage"]["completion_tokens"] < len(ids) - 4
        assert whole.json["choices"][0]["finish_reason"] == "stop" and whole.text.count("ha!") == 1
        *chunks, last = server.stream({**request, "stream_options": {"include_usage": True}})
        assert counts.answer_tokens == 2 * whole.json["usage"]["completion_tokens"]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == whole.text and last["usage"] == whole.json["usage"]
    assert texts[-1].ids == ids[: len(texts[-1].ids)] and len(texts[-1].ids) == last["usage"]["completion_tokens"]
