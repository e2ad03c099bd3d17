"""A server that listens, in a thread of this process, and short ways to ask it: what a client sees."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from diffvl.decode.answer import Decoder
from diffvl.serve.app import make_app
from diffvl.serve.limits import Limits
from diffvl.serve.service import FETCHING, OPENED, Service

COMPLETIONS = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}
USUAL = Limits()


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The mistake that was told; exactly in OpenAI's form."""
        found = self.json
        assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
        return found["error"]

    @property
    def text(self) -> str:
        """The answer."""
        assert self.status == 200, self.body
        return self.json["choices"][0]["message"]["content"]


@dataclass
class Live:
    """A server that listens on a port of this machine."""

    service: Service
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=headers)

    def ask(self, request: Any, **headers: str) -> Reply:
        body = request if isinstance(request, bytes) else json.dumps(request).encode()
        return self.send("POST", COMPLETIONS, body, {**JSON, **headers})

    @contextmanager
    def begun(self, request: Any) -> Iterator[http.client.HTTPResponse]:
        """A response whose body is not read yet."""
        connection = self.connect()
        connection.request("POST", COMPLETIONS, json.dumps(request).encode(), JSON)
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def stream(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end as one does."""
        with self.begun({**request, "stream": True}) as response:
            assert response.status == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
            *events, done, nothing = response.read().decode().split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "") and all(one.startswith("data: ") for one in events)
        return [json.loads(one.removeprefix("data: ")) for one in events]

    def wait_until(self, condition: Any, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    def is_empty(self) -> bool:
        """Whether every place has been given back."""
        engine, service = self.service.engine, self.service
        held = service.inside + len(engine.running) + len(engine.joining) + len(engine.waiting) + len(engine.batch.samples)
        free = service._ahead._value, service._fetching._value, service._opened._value
        return held == 0 and free == (service.limits.samples, FETCHING, OPENED)


@contextmanager
def live(
    decoder: Decoder, limits: Limits = USUAL, keys: Sequence[str] = (), name: str = "tiny", hosts: Collection[str] = ()
) -> Iterator[Live]:
    """A server in the block; when it has ended nothing is left of it."""
    service = Service(decoder, name, limits)
    config = uvicorn.Config(make_app(service, keys, hosts), log_config=None, access_log=False, ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.005)
            yield Live(service, taken.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def text_chat(text: str, **more: Any) -> dict[str, Any]:
    """A request."""
    return {"messages": [{"role": "user", "content": text}], **more}


def image_chat(text: str, *urls: str, **more: Any) -> dict[str, Any]:
    """A request with images in front of the text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **more}
