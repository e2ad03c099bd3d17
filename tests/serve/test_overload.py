"""Too many clients, slow ones, those that go away, and a model that fails: every place comes back, and everybody is told."""

import asyncio
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from live_server import JSON, image_chat, live, text_chat
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve import app, block_batch
from diffvl.serve.block_batch import BlockBatch
from diffvl.serve.errand import Errand
from diffvl.serve.limits import Limits
from diffvl.serve.remote import RemoteImages
from diffvl.serve.service import FETCHING, Service
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


def test_a_slow_host_holds_up_only_those_who_ask_for_images_of_the_net(decoder: Decoder):
    """More of them than are fetched for, and prepared, at once; who brings a picture along is answered meanwhile."""
    came, limits = threading.Event(), Limits(samples=2, fetches_images=True)

    def slow(url: str, most_bytes: int, _: Errand) -> bytes:
        assert url == "http://slow/a.png" and most_bytes == limits.body_bytes and came.wait(30)
        return png()

    with live(decoder, limits) as server, ThreadPoolExecutor(FETCHING + 2) as clients:
        server.service._fetch = slow
        request = image_chat("What?", "http://slow/a.png", max_tokens=4)
        asked = [clients.submit(server.ask, request) for _ in range(FETCHING + 2)]
        server.wait_until(lambda: server.service.inside == FETCHING + 2 and server.service._fetching.locked())
        shown = server.ask(image_chat("What?", data_url(png()), max_tokens=4))
        assert not any(one.done() for one in asked)
        came.set()
        assert {one.result().text for one in asked} == {shown.text}
        server.wait_until(server.is_empty)


def test_images_are_not_fetched_for_a_client_that_has_gone_away(decoder: Decoder):
    """The host says nothing for twenty seconds; its thread, and its place, are free long before."""
    with socket.create_server(("127.0.0.1", 0)) as host, live(decoder, Limits(fetches_images=True)) as server:
        server.service._fetch = RemoteImages(20.0, is_allowed=lambda _: True)
        connection = server.connect()
        request = image_chat("What?", f"http://127.0.0.1:{host.getsockname()[1]}/a.png")
        connection.request("POST", PATH, json.dumps(request).encode(), JSON)
        taken = host.accept()[0]
        fetching = [one for one in threading.enumerate() if one.name == "fetch"]
        assert len(fetching) == 1 and not server.is_empty()
        connection.close()
        server.wait_until(server.is_empty, seconds=5)
        fetching[0].join(5)
        assert not fetching[0].is_alive()
        taken.close()


def test_the_end_of_the_server_waits_for_no_host(decoder: Decoder):
    """Whoever waits is told; a thread that nothing reaches, as in the look-up of a name, is left behind, and then done with."""
    looked_up = threading.Event()

    async def asked() -> tuple[Service, Any]:
        service = Service(decoder, "tiny", Limits(fetches_images=True))
        service._fetch = RemoteImages(20.0, look_up=lambda *_: [] if looked_up.wait(20) else [])
        service.start()
        chat = service.read(json.dumps(image_chat("What?", "http://slow/a.png")).encode())

        async def fetched() -> None:
            async with service.fetched(chat):
                pass

        task = asyncio.create_task(fetched())
        while not service._errands:
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        assert not service._errands and service._fetching._value == FETCHING - 1, "its thread is not done"
        await asyncio.wait_for(service.close(), 5)
        return service, [one for one in threading.enumerate() if one.name == "fetch"]

    service, left = asyncio.run(asked())
    assert len(left) == 1 and left[0].daemon and left[0].is_alive()
    looked_up.set()
    left[0].join(5)
    assert not left[0].is_alive() and not service.engine.is_alive


def test_a_server_that_ends_ends_its_fetches(decoder: Decoder):
    async def asked() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as host:
            service = Service(decoder, "tiny", Limits(fetches_images=True))
            service._fetch = RemoteImages(20.0, is_allowed=lambda _: True)
            service.start()
            url = f"http://127.0.0.1:{host.getsockname()[1]}/a.png"
            chat = service.read(json.dumps(image_chat("What?", url)).encode())
            waiting = asyncio.create_task(service.fetched(chat).__aenter__())
            while not service._errands:
                await asyncio.sleep(0.005)
            await service.close()
            return (await asyncio.wait_for(asyncio.gather(waiting, return_exceptions=True), 5))[0]

    assert "nobody waits for it" in str(asyncio.run(asked()))


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


def test_a_server_that_ends_tells_those_that_wait(decoder: Decoder, held: Held):
    with ThreadPoolExecutor(1) as clients:
        with live(decoder, Limits(samples=1)) as server:
            asked = clients.submit(server.ask, text_chat("Hi", max_tokens=8))
            server.wait_until(lambda: len(server.service.engine.running) == 1)
            held.let_go()
        assert asked.result().status == 200  # what is under way may end


def test_an_engine_that_stops_says_so(decoder: Decoder, monkeypatch: pytest.MonkeyPatch, held: Held):
    """A fault of the engine itself, which should not be: nobody waits for ever, and whoever watches the server is told."""
    with live(decoder, Limits(samples=1)) as server, ThreadPoolExecutor(2) as clients:
        asked = [clients.submit(server.ask, text_chat("Hi", max_tokens=40)) for _ in range(2)]
        server.wait_until(lambda: server.service.inside == 2 and server.service.engine.running)
        monkeypatch.setattr(server.service.engine, "_tell", lambda _: 1 // 0)
        held.let_go()
        assert [one.result().status for one in asked] == [503, 503]
        assert server.get("/health").status == 503 and server.ask(text_chat("Hi")).error["code"] == "stopped"
        server.wait_until(server.is_empty)
