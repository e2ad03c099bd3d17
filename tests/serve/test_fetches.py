"""Images of the net, behind a server: who waits for them, and what ends with whom."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from live_server import JSON, image_chat, live
from shared_fixtures import Loaded

from diffvl.decode.answer import Decoder
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
