"""Too many clients, slow ones, those that go away, and a model that fails: every place comes back, and everybody is told."""

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gated_models import gated_model
from live_server import JSON, image_chat, live, text_chat
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve import app, block_batch, service
from diffvl.serve.block_batch import BlockBatch
from diffvl.serve.draft_batch import DraftBatch
from diffvl.serve.limits import Limits
from diffvl.serve.service import OPENED, Service
from tools.serve_mistakes import PATH, data_url, png


@pytest.fixture(scope="module")
def decoder(loaded: Callable[[str], Loaded]) -> Decoder:
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    return Decoder(model, processor)


# --- many, slow and gone -----------------------------------------------------------------------------------------------------


class Held:
    """Holds the model in front of every block until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._free = threading.Event()
        decode_block = BlockBatch.decode_block

        def held(batch: BlockBatch) -> Any:
            assert self._free.wait(30)
            return decode_block(batch)

        monkeypatch.setattr(BlockBatch, "decode_block", held)

    def let_go(self) -> None:
        self._free.set()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    found = Held(monkeypatch)
    yield found
    found.let_go()


def test_more_than_there_are_places_for_is_refused_and_told_when_to_come(decoder: Decoder, held: Held):
    with live(decoder, Limits(samples=2, waiting=1)) as server, ThreadPoolExecutor(3) as clients:
        asked = [clients.submit(server.ask, text_chat("Hi", max_tokens=4)) for _ in range(3)]
        server.wait_until(lambda: server.service.inside == 3)
        for _ in range(5):
            reply = server.ask(text_chat("Hi", max_tokens=4))
            assert reply.status == 429 and reply.error["type"] == "rate_limit_error" and reply.error["code"] == "overloaded"
            assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert server.get("/health").status == 200
        held.let_go()
        assert [one.result().status for one in asked] == [200, 200, 200]
        server.wait_until(server.is_empty)
        assert b'diffvl_requests_total{status="429"} 5.0' in server.get("/metrics").body


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_frees_its_place(decoder: Decoder, streams: bool):
    with live(decoder, Limits(samples=1, waiting=4, answer_tokens=400)) as server:
        request = text_chat("Hi", max_tokens=400, stream=streams)
        connection = server.connect()
        connection.request("POST", PATH, json.dumps(request).encode(), JSON)
        if streams:
            connection.getresponse().read(10)
        server.wait_until(lambda: server.service.engine.counts.blocks > 1)
        running = server.service.engine.running[0].sample
        connection.sock.close() if connection.sock else None
        connection.close()
        server.wait_until(server.is_empty)
        assert len(running.answer) < 400 and running.ended is None
        assert server.ask(text_chat("Hi", max_tokens=4)).status == 200
        assert b'diffvl_requests_total{status="499"} 1.0' in server.get("/metrics").body


def test_a_client_that_goes_away_while_it_waits_is_forgotten(decoder: Decoder, held: Held):
    with live(decoder, Limits(samples=1, waiting=4)) as server, ThreadPoolExecutor(1) as clients:
        first = clients.submit(server.ask, text_chat("Hi", max_tokens=4))
        server.wait_until(lambda: len(server.service.engine.running) == 1)
        connection = server.connect()
        connection.request("POST", PATH, json.dumps(text_chat("Ho", max_tokens=4)).encode(), JSON)
        server.wait_until(lambda: server.service.inside == 2)
        connection.close()
        server.wait_until(lambda: server.service.inside == 1)
        held.let_go()
        assert first.result().status == 200
        server.wait_until(server.is_empty)


def test_who_waits_too_long_is_told(decoder: Decoder, held: Held):
    with live(decoder, Limits(samples=1, waiting=4, seconds=0.4)) as server:
        reply = server.ask(text_chat("Hi", max_tokens=4))
        assert reply.status == 504 and reply.error["code"] == "timeout" and "0.4 seconds" in reply.error["message"]
        held.let_go()
        server.wait_until(server.is_empty)


def test_a_stream_that_takes_too_long_ends_with_words(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    decode_block = BlockBatch.decode_block
    monkeypatch.setattr(BlockBatch, "decode_block", lambda batch: time.sleep(0.1) or decode_block(batch))
    with live(decoder, Limits(samples=1, seconds=0.5)) as server:
        with server.begun(text_chat("Hi", max_tokens=400, stream=True)) as response:
            events = response.read().decode().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        server.wait_until(server.is_empty)


async def ask_directly(service: Service, request: dict[str, Any], send: Any) -> None:
    """Asks the application without a connection: whoever gives `send` decides how the client reads."""
    received = iter([{"type": "http.request", "body": json.dumps(request).encode(), "more_body": False}])

    async def receive() -> Any:
        return next(received, None) or await asyncio.Event().wait()

    scope = {
        **{"type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode()},
        **{"headers": [(b"content-type", b"application/json")], "query_string": b"", "root_path": ""},
        **{"client": None, "server": ("127.0.0.1", 80)},
    }
    await app.make_app(service, ())(scope, receive, send)


def test_a_client_that_reads_no_more_holds_no_place(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    """What is sent to it waits for ever; its time runs out all the same."""
    monkeypatch.setattr(app, "LAST_WORDS", 0.1)

    async def asked() -> tuple[Service, list[str]]:
        service, sent = Service(decoder, "tiny", Limits(seconds=1.0)), list[str]()
        service.start()

        async def send(message: Any) -> None:
            sent.append(message["type"])
            if len(sent) > 3:
                await asyncio.Event().wait()

        await asyncio.wait_for(ask_directly(service, text_chat("Hi", max_tokens=40, stream=True), send), 20)
        await service.close()
        return service, sent

    service, sent = asyncio.run(asked())
    assert service.inside == 0 and not service.engine.running and len(sent) == 5


@pytest.mark.parametrize("streams", [True, False])
def test_who_is_still_there_when_the_server_ends_is_told(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, streams: bool):
    """It cancels what takes too long then."""
    decode_block = BlockBatch.decode_block
    monkeypatch.setattr(BlockBatch, "decode_block", lambda batch: time.sleep(0.02) or decode_block(batch))

    async def asked() -> tuple[Service, list[Any]]:
        service, sent = Service(decoder, "tiny", Limits()), list[Any]()
        service.start()

        async def send(message: Any) -> None:
            sent.append(message)

        task = asyncio.create_task(ask_directly(service, text_chat("Hi", max_tokens=400, stream=streams), send))
        while len(sent) < 3 if streams else not service.engine.running:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait_for(task, 20)
        await service.close()
        return service, sent

    service, sent = asyncio.run(asked())
    assert service.inside == 0 and sent[0]["status"] == (200 if streams else 503)
    told = json.loads(sent[-1]["body"].removeprefix(b"data: "))
    assert told["error"]["code"] == "shutting_down" and not sent[-1].get("more_body")
    assert b'diffvl_requests_total{status="503"} 1.0' in service.figures.text()


# --- faults ------------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_the_model_fails_at_fails_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, held: Held):
    """Those that came with it, and those in the batch, go on; and nothing of the failure stands in their way in memory."""
    take_in, limit, tensors, freed = BlockBatch.take_in, 40, list[Any](), list[bool]()

    def failing(batch: BlockBatch, samples: Any) -> Any:
        freed.append(all(tensor() is None for tensor in tensors))
        if any(sample.prompt_tokens > limit for sample in samples):
            much = torch.zeros(1)
            tensors.append(weakref.ref(much))
            raise torch.OutOfMemoryError("no room")
        return take_in(batch, samples)

    monkeypatch.setattr(BlockBatch, "take_in", failing)
    with live(decoder, Limits(samples=8)) as server, ThreadPoolExecutor(4) as clients:
        first = clients.submit(server.ask, text_chat("Hi", max_tokens=4))
        server.wait_until(lambda: len(server.service.engine.running) == 1)
        others = [clients.submit(server.ask, text_chat(text, max_tokens=4)) for text in ("Ho", "x" * limit, "Ha")]
        server.wait_until(lambda: len(server.service.engine.waiting) == 3)
        held.let_go()
        assert first.result().status == 200
        assert sorted(one.result().status for one in others) == [200, 200, 503]
        refused = next(one.result() for one in others if one.result().status == 503)
        assert refused.error["type"] == "server_error" and refused.error["code"] == "out_of_memory"
        server.wait_until(server.is_empty)
    assert len(tensors) == 2 and all(freed)


def test_a_sample_that_cannot_be_drawn_fails_alone(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, held: Held):
    """A setting that nobody had thought of does not end the answers of others."""
    picker = block_batch.picker

    def failing(sampling: Any, settings: DecodeSettings) -> Any:
        if settings.temperature == 0.5:
            raise ValueError("no such temperature")
        return picker(sampling, settings)

    monkeypatch.setattr(block_batch, "picker", failing)
    with live(decoder) as server, ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.ask, text_chat("Hi", max_tokens=8))
        server.wait_until(lambda: len(server.service.engine.running) == 1)
        second = clients.submit(server.ask, text_chat("Hi", max_tokens=8, temperature=0.5))
        server.wait_until(lambda: len(server.service.engine.waiting) == 1)
        held.let_go()
        assert (first.result().status, second.result().status) == (200, 500)


def test_a_block_that_fails_ends_its_answers_and_nothing_else(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    decode_block, faults = BlockBatch.decode_block, [RuntimeError("a kernel failed")]

    def failing(batch: BlockBatch) -> Any:
        if faults:
            raise faults.pop()
        return decode_block(batch)

    monkeypatch.setattr(BlockBatch, "decode_block", failing)
    with live(decoder) as server:
        reply = server.ask(text_chat("Hi", max_tokens=4))
        assert reply.status == 500 and reply.error["code"] == "internal_error" and "kernel" not in reply.error["message"]
        assert server.ask(text_chat("Hi", max_tokens=4)).status == 200
        assert b"diffvl_faults_total 1.0" in server.get("/metrics").body


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (RuntimeError("a kernel failed"), [500, 500, 500, 503]),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), [500, 503]),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), [500, 503]),
        (torch.OutOfMemoryError("CUDA out of memory"), [503] * 6),
        (torch.AcceleratorError("CUDA error: out of memory"), [503] * 6),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"), [503] * 6),
    ],
)
@pytest.mark.parametrize("call", ["take_in", "decode_block"])
def test_a_model_that_is_broken_ends_the_engine(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, fault: Exception, told: list[int], call: str
):
    """Whoever watches the server hears of it. Memory may be free again."""

    def failing(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(BlockBatch, call, failing)
    with live(decoder) as server:
        request, lasts = text_chat("Hi", max_tokens=4), told[-1] == 503 and told[0] == 500
        replies = []
        for _ in told:
            if len(replies) == len(told) - 1 and lasts:
                server.wait_until(lambda: not server.service.engine.is_alive)
            replies.append(server.ask(request))
        assert [one.status for one in replies] == told
        assert replies[-1].error["code"] == ("stopped" if lasts else "out_of_memory")
        health = server.get("/health")
        assert (health.status, health.json["status"]) == ((503, "stopped") if lasts else (200, "ok"))
        server.wait_until(server.is_empty)


@pytest.mark.parametrize("drafts", [False, True])
def test_requests_that_always_fail_end_no_server(
    decoder: Decoder, prepared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, drafts: bool
):
    """Asked again and again, as clients do by themselves, while nobody else asks."""
    kind = DraftBatch if drafts else BlockBatch
    take_in, tried = kind.take_in, list[int]()

    def failing(batch: Any, samples: Any) -> Any:
        tried.append(samples[0].prompt_tokens)
        if samples[0].prompt_tokens > 1:
            raise ValueError("no such prompt")
        return take_in(batch, samples)

    with live(Decoder(*gated_model(prepared("qwen2"))) if drafts else decoder) as server:
        wanted = server.ask(text_chat("Hi", max_tokens=4)).text
        with monkeypatch.context() as patch:
            patch.setattr(kind, "take_in", failing)
            assert [server.ask(text_chat("Hi", max_tokens=4)).status for _ in range(7)] == [500] * 7
            server.wait_until(lambda: server.service.engine.counts.faults_in_row == 1)
        assert tried.count(1) == 2 and server.get("/health").status == 200
        assert server.ask(text_chat("Hi", max_tokens=4)).text == wanted
        assert server.service.engine.counts.faults_in_row == 0


def test_a_server_that_ends_tells_those_that_wait(decoder: Decoder, held: Held):
    with ThreadPoolExecutor(1) as clients:
        with live(decoder, Limits(samples=1)) as server:
            asked = clients.submit(server.ask, text_chat("Hi", max_tokens=8))
            server.wait_until(lambda: len(server.service.engine.running) == 1)
            held.let_go()
        assert asked.result().status == 200  # what is under way may end


def test_who_is_joining_when_the_engine_stops_is_told(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    with live(decoder) as server:
        monkeypatch.setattr(server.service.engine.batch, "take_in", lambda _: 1 // 0)
        monkeypatch.setattr(server.service.engine, "_fault", lambda _: 1 // 0)
        assert server.ask(text_chat("Hi")).error["code"] == "stopped"
        server.wait_until(server.is_empty)


def test_images_wait_as_files_and_not_decoded(decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    """A small file may have as many pixels as a request may show; those that are open at once are few."""
    opening, encoding, opened, most = service.open_images, Service._encoded, [0], [0]

    def opens(*given: Any) -> Any:
        opened[0] += 1
        most[0] = max(most[0], opened[0])
        return opening(*given)

    def encodes(one: Service, asked: Any, images: dict[str, Any]) -> Any:
        time.sleep(0.05)
        opened[0] -= 1
        return encoding(one, asked, images)

    monkeypatch.setattr(service, "open_images", opens)
    monkeypatch.setattr(Service, "_encoded", encodes)
    shown = image_chat("What?", data_url(png()), max_tokens=4)
    with live(decoder) as server, ThreadPoolExecutor(12) as clients:
        assert [one.result().status for one in [clients.submit(server.ask, shown) for _ in range(12)]] == [200] * 12
        server.wait_until(server.is_empty)
    assert opened == [0] and 1 <= most[0] <= OPENED


def test_an_engine_that_stops_says_so(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, held: Held):
    """A fault of the engine itself, which should not be: nobody waits for ever, and whoever watches the server is told."""
    with live(decoder, Limits(samples=1)) as server, ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(server.ask, text_chat("Hi", max_tokens=40)) for _ in range(2)]
        server.wait_until(lambda: server.service.inside == 2 and server.service.engine.running)
        monkeypatch.setattr(server.service.engine, "_tell", lambda _: 1 // 0)
        held.let_go()
        assert [one.result().status for one in asked] == [503, 503]
        assert server.get("/health").status == 503 and server.ask(text_chat("Hi")).error["code"] == "stopped"
        assert b'diffvl_requests_total{status="503"} 3.0' in server.get("/metrics").body
        server.wait_until(server.is_empty)
