"""The server as its clients see it, over real connections."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import pytest
from helpers import random_image
from live_server import JSON, Live, Reply, image_chat, live, text_chat
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder, answer_chats, user_message
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve import run
from diffvl.serve.limits import Limits
from tools.serve_mistakes import PATH, Mistake, data_url, mistakes

QUESTIONS = ("Hi", "What is it?", "Name every colour that you see, from left to right, and count the shapes.", "Why?")


def url_of(seed: int) -> str:
    out = BytesIO()
    random_image(seed).save(out, "PNG")
    return data_url(out.getvalue())


@pytest.fixture(scope="module")
def decoder(loaded: Callable[[str], Loaded]) -> Decoder:
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    return Decoder(model, processor)


@pytest.fixture(scope="module")
def server(decoder: Decoder) -> Iterator[Live]:
    with live(
        decoder, Limits(samples=32, waiting=8, images=2, prompt_tokens=600, answer_tokens=400, pixels=1_000_000)
    ) as started:
        yield started
        started.wait_until(started.is_empty)


def expected(decoder: Decoder, text: str, seed: int | None = None, **settings: Any) -> str:
    """What `diffvl generate` answers."""
    message = user_message(text, [] if seed is None else [random_image(seed)])
    return answer_chats(decoder, [[message]], DecodeSettings(**settings))[0].text


# --- answers -----------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_generate(server: Live, decoder: Decoder):
    reply = server.ask(text_chat(QUESTIONS[1], max_tokens=11, model="tiny"))
    assert reply.text == expected(decoder, QUESTIONS[1], max_new_tokens=11) and reply.text
    found = reply.json
    assert found["object"] == "chat.completion" and found["model"] == "tiny" and found["id"].startswith("chatcmpl-")
    assert found["choices"][0]["finish_reason"] == "length" and found["choices"][0]["message"]["role"] == "assistant"
    usage = found["usage"]
    assert usage["completion_tokens"] == 11 and usage["total_tokens"] == usage["prompt_tokens"] + 11
    seen = server.ask(image_chat(QUESTIONS[1], url_of(3), max_completion_tokens=9, denoising_steps=2))
    assert seen.text == expected(decoder, QUESTIONS[1], 3, max_new_tokens=9, denoising_steps=2)
    assert seen.json["usage"]["prompt_tokens"] > usage["prompt_tokens"]
    assert seen.json["diffvl"]["blocks"] >= 3 and seen.json["diffvl"]["forwards"] >= 6


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}, {"remasking": "sequential"}])
def test_a_stream_comes_block_by_block_and_says_the_same(server: Live, settings: dict[str, Any]):
    request = image_chat(QUESTIONS[0], url_of(1), max_tokens=14, **settings)
    whole = server.ask(request)
    chunks = server.stream(request)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole.text
    assert len(deltas) >= 2 + whole.json["diffvl"]["blocks"] - 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and all("usage" not in chunk for chunk in chunks)


def test_a_number_may_be_written_as_a_whole_one(server: Live):
    """As JavaScript writes 1.0. Neither answer is an error of the model, which would be one of all in its batch."""
    request = text_chat("Hi", max_tokens=8, seed=2**63 - 1, top_k=2**63 - 1)
    answers = [
        server.ask({**request, "temperature": warmth, "top_p": most}).text for warmth, most in ((1, 1), (1.0, 1.0), (9, 0))
    ]
    assert answers[0] == answers[1] and answers[0]


def test_without_a_seed_each_answer_is_another(server: Live):
    request = text_chat("Hi", max_tokens=12, temperature=1.0)
    assert len({server.ask(request).text for _ in range(4)}) > 1
    assert len({server.ask({**request, "seed": 1}).text for _ in range(3)}) == 1


def test_a_stream_with_usage_ends_with_it(server: Live):
    *chunks, last = server.stream(text_chat("Hi", max_tokens=6, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6


def test_steps_show_the_open_block_until_it_is_full(server: Live):
    chunks = server.stream(text_chat("Hi", max_tokens=8, show_steps=True, denoising_steps=2))
    shown = [chunk["diffvl"]["cells"] for chunk in chunks if "cells" in chunk.get("diffvl", {})]
    assert len(shown) >= 4 and any(None in cells for cells in shown)
    for cells in shown:
        settled = [cell for cell in cells if cell is not None and cell["settled"]]
        assert settled and all(0 <= cell["confidence"] <= 1 for cell in settled)


def test_32_at_once_answer_as_one_by_one(server: Live, decoder: Decoder):
    """With and without images, streamed and whole, with different limits: the same words, and never more than what fits."""
    requests = []
    for number in range(32):
        more = {"max_tokens": 4 + number % 5, "denoising_steps": 1 + number % 3}
        text = QUESTIONS[number % 4]
        requests.append(image_chat(text, url_of(number), **more) if number % 3 == 0 else text_chat(text, **more))
    one_by_one = [server.ask(request).text for request in requests]
    before = server.service.engine.forwards
    with ThreadPoolExecutor(32) as clients:
        together = list(clients.map(server.ask, requests))
    assert [reply.text for reply in together] == one_by_one and len(set(one_by_one)) > 10
    alone = sum(reply.json["diffvl"]["forwards"] for reply in together)
    assert server.service.engine.forwards - before < alone / 3, "they are decoded together"


def test_stop_texts_end_an_answer_and_are_not_in_it(server: Live, decoder: Decoder):
    whole = expected(decoder, QUESTIONS[2], max_new_tokens=40)
    place = next(place for place in range(6, len(whole) - 3) if whole[place : place + 3].strip() == whole[place : place + 3])
    stop = whole[place : place + 3]
    request = text_chat(QUESTIONS[2], max_tokens=40, stop=["never said", stop])
    reply = server.ask(request)
    assert reply.text == whole[: whole.index(stop)].strip() and reply.json["choices"][0]["finish_reason"] == "stop"
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in server.stream(request)]
    assert "".join(pieces) == reply.text


def test_what_openai_clients_send_unasked_is_taken(server: Live):
    neutral: dict[str, Any] = {
        **{"n": 1, "tools": [], "tool_choice": "auto", "logprobs": False, "top_logprobs": None, "logit_bias": {}, "top_p": 1},
        **{"frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}, "stop": None, "user": "me"},
        **{"temperature": 0, "seed": 5, "stream": False, "store": False, "modalities": ["text"], "parallel_tool_calls": True},
    }
    answered = {"role": "assistant", "content": "Ho.", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    talk = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}, answered]
    request = {"messages": [*talk, {"role": "user", "content": "And?"}], "max_tokens": 4, **neutral}
    assert server.ask(request).status == 200


# --- mistakes ----------------------------------------------------------------------------------------------------------------


def assert_told(mistake: Mistake, reply: Reply) -> None:
    assert reply.status in mistake.statuses, (mistake.about, reply.status, reply.body[:300])
    error = reply.error
    assert mistake.named in error["message"], (mistake.about, error)
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 1000
    if mistake.path == PATH and mistake.method == "POST" and error["param"]:
        assert error["param"].split(".")[0].split("[")[0] in error["message"] or "messages" in error["param"]


def test_every_mistake_is_told_in_words(server: Live):
    made = mistakes()
    assert len(made) >= 200 and len({mistake.body + mistake.path.encode() for mistake in made}) >= 200
    for mistake in made:
        assert_told(mistake, server.send(mistake.method, mistake.path, mistake.body, mistake.headers))
    server.wait_until(server.is_empty)
    assert server.ask(text_chat("Hi", max_tokens=4)).status == 200


def test_a_prompt_and_an_answer_must_fit(server: Live):
    long = server.ask(text_chat("word " * 200, max_tokens=4))
    assert long.status == 400 and long.error["code"] == "context_length_exceeded" and "at most" in long.error["message"]
    context = server.service.decoder.model.config.text_config.max_position_embeddings
    assert context < 600 + 400
    much = server.ask(text_chat("word " * 80, max_tokens=400))
    assert much.status == 400 and much.error["param"] == "max_tokens" and "room for" in much.error["message"]
    fitted = server.ask(text_chat("word " * 90, denoising_steps=1))
    used = fitted.json["usage"]["total_tokens"]
    assert fitted.json["choices"][0]["finish_reason"] in ("length", "stop") and used <= context


def test_a_body_that_is_too_large_is_refused_while_it_comes(decoder: Decoder):
    with live(decoder, Limits(body_bytes=1000)) as server:
        reply = server.ask(text_chat("x" * 3000))
        assert reply.status == 413 and "1000 bytes" in reply.error["message"]
        pieces = (b"[" * 500 for _ in range(6))
        connection = server.connect()
        connection.request("POST", PATH, pieces, JSON, encode_chunked=True)  # type: ignore[arg-type]
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask(text_chat("Hi", max_tokens=4)).status == 200


def test_a_key_is_asked_for_where_there_is_one(decoder: Decoder):
    with live(decoder, keys=("first-key", "second")) as server:
        request = text_chat("Hi", max_tokens=4)
        for given in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer first"}, {"Authorization": "first-key"}):
            reply = server.ask(request, **given)
            assert (
                reply.status == 401 and reply.error["code"] == "invalid_api_key" and reply.error["type"] == "authentication_error"
            )
            assert reply.headers["www-authenticate"] == "Bearer" and "first-key" not in reply.error["message"]
            assert server.get("/v1/models", **given).status == server.get("/metrics", **given).status == 401
        counted = server.get("/metrics", Authorization="Bearer second").body
        assert b'diffvl_requests_total{status="401"} 4.0' in counted  # of chat completions alone
        for key in ("first-key", "second"):
            assert server.ask(request, Authorization=f"Bearer {key}").status == 200
            assert server.get("/v1/models", Authorization=f"bearer {key}").status == 200
        assert server.get("/health").status == server.get("/").status == 200


def test_a_page_of_the_net_whose_name_leads_here_is_refused(decoder: Decoder):
    """A browser lets it read what it gets from its own name (DNS rebinding)."""
    with run._bound("127.0.0.1", 0) as taken, run._bound("0.0.0.0", 0) as others:
        own = run._own_names("localhost", taken)
        assert own == {"localhost", "127.0.0.1", "[::1]"} and run._own_names("0.0.0.0", others) == set()
    with live(decoder, hosts=own) as server:
        for host in ("evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "localhost@evil.example", ""):
            reply = server.ask(text_chat("Hi", max_tokens=4), Host=host)
            assert reply.status == 403 and reply.error["code"] == "host_not_allowed" and "--api-key" in reply.error["message"]
            assert server.get("/v1/models", Host=host).status == server.get("/metrics", Host=host).status == 403
        for host in ("LOCALHOST", "127.0.0.1:1", "[::1]:8000"):
            assert server.ask(text_chat("Hi", max_tokens=4), Host=host).status == 200
        assert server.get("/health", Host="evil.example").status == 200


# --- what stands beside ------------------------------------------------------------------------------------------------------


def test_models_health_and_metrics(server: Live):
    found = server.get("/v1/models").json
    assert found["object"] == "list" and [one["id"] for one in found["data"]] == ["tiny"]
    assert server.get("/v1/models/tiny").json == found["data"][0] and found["data"][0]["diffvl"]["block_size"] == 4
    assert server.get("/health").json["status"] == "ok"
    server.ask(text_chat("Hi", max_tokens=4))
    metrics = server.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in metrics.body.decode().splitlines() if not line.startswith("#"))
    assert float(lines["diffvl_answer_tokens_total"]) >= 4 and float(lines["diffvl_forwards_total"]) >= 4
    assert float(lines['diffvl_requests_total{status="200"}']) >= 1 and float(lines["diffvl_running"]) == 0
    assert float(lines["diffvl_request_seconds_count"]) >= 1 and float(lines["process_resident_memory_bytes"]) > 0


def test_the_page_loads_nothing_from_elsewhere(server: Live):
    reply = server.get("/")
    page, policy = reply.body.decode(), reply.headers["content-security-policy"]
    assert reply.headers["content-type"] == "text/html; charset=utf-8" and policy.startswith(
        "default-src 'none'; script-src 'sha256-"
    )
    assert not any(word in page for word in ("http:", "https:", "//cdn", "@import", "innerHTML", "eval(", " onclick=", " style="))
    assert "unsafe" not in policy and policy.count("sha256-") == 2
