"""Requests that are wrong, each in one way, with what the server's message must name: for the load program and the tests."""

import base64
import copy
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Mistake:
    """A wrong request. named: what its message must hold. statuses: one of which the answer must have."""

    about: str
    named: str
    body: bytes
    method: str = "POST"
    path: str = PATH
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    statuses: tuple[int, ...] = (400,)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 8, height: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(out, "PNG")
    return out.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few kilobytes that says it has billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def good() -> dict[str, Any]:
    """A request with nothing wrong: what the mistakes are made of."""
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": data_url(png())}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 4}


# Values of a kind that a key does not take, with what is wrong about them.
NO_NUMBER: tuple[Any, ...] = ("1", True, [], {}, [1])
NO_WHOLE: tuple[Any, ...] = ("1", True, 1.5, [], {})
NO_FLAG: tuple[Any, ...] = ("true", 1, 0, [], {})
NO_TEXT: tuple[Any, ...] = (1, True, [], {})
WRONG_VALUES: dict[str, tuple[Any, ...]] = {
    "temperature": (*NO_NUMBER, -1, -0.1, 1e9, 1e-9, 10**400),
    "top_p": (*NO_NUMBER, 0.5),  # without a temperature it has no effect
    "top_k": (*NO_WHOLE, -1, 5, 2**63),
    "seed": (*NO_WHOLE, -1, 2**63),
    "max_tokens": (*NO_WHOLE, 0, -1, 10**9),
    "max_completion_tokens": (*NO_WHOLE, 0, -5, 10**9),
    "denoising_steps": (*NO_WHOLE, 0, -1, 10**6, 10**1000),
    "remasking": (*NO_TEXT, "random", "low-confidence"),
    "threshold": (*NO_NUMBER, 0.5),  # without low_confidence_dynamic it has no effect
    "entropy_budget": (*NO_NUMBER, 0.5),
    "repetition_stop": (*NO_WHOLE, 0, 1),
    "stop": (1, True, {}, [1], ["a", None], [["a"]], "", [""], ["x"] * 40, "x" * 400),
    "stream": NO_FLAG,
    "show_steps": (*NO_FLAG, True),  # without a stream there is nothing to show them in
    "stream_options": (1, "x", [], {"include_usage": True}),
    "model": (*NO_TEXT, "gpt-4o", ""),
    "messages": (None, [], {}, "Hi", 1, [{"role": "user", "content": "Hi"}] * 300),
    "user": (1, [], {}),
}
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (2, 0, "1"),
    "tools": ([{"type": "function", "function": {"name": "f"}}], "x"),
    "tool_choice": ("required", {"type": "function"}),
    "functions": ([{"name": "f"}],),
    "function_call": ({"name": "f"},),
    "logprobs": (True,),
    "top_logprobs": (3,),
    "logit_bias": ({"50256": -100},),
    "frequency_penalty": (0.5,),
    "presence_penalty": (-1,),
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}),
    "modalities": (["audio"],),
    "audio": ({"voice": "alloy"},),
    "prediction": ({"type": "content", "content": "x"},),
    "reasoning_effort": ("high",),
    "verbosity": ("low",),
    "service_tier": ("flex",),
    "store": (True,),
    "metadata": ({"a": "b"},),
    "web_search_options": ({"search_context_size": "low"},),
    "mode": ("ar",),
    "max_token": (4,),
    "best_of": (2,),
    "prompt": ("Hi",),
}
WRONG_MESSAGES: tuple[tuple[str, Any], ...] = (
    ("messages[0]", 1),
    ("messages[0]", "Hi"),
    ("messages[0]", []),
    ("messages[0].role", {"content": "Hi"}),
    ("messages[0].role", {"role": "tool", "content": "Hi"}),
    ("messages[0].role", {"role": 1, "content": "Hi"}),
    ("messages[0].role", {"role": "assistant", "content": "Hi"}),
    ("messages[0].role", {"role": "system", "content": "Hi"}),
    ("messages[0].content", {"role": "user"}),
    ("messages[0].content", {"role": "user", "content": None}),
    ("messages[0].content", {"role": "user", "content": 1}),
    ("messages[0].content", {"role": "user", "content": []}),
    ("messages[0].content", {"role": "user", "content": "half \ud83d a pair"}),
    ("messages[0].name", {"role": "user", "content": "Hi", "name": "me"}),
    ("messages[0].tool_calls", {"role": "user", "content": "Hi", "tool_calls": [{"id": "x"}]}),
)
WRONG_PARTS: tuple[tuple[str, Any], ...] = (
    ("content[0]", 1),
    ("content[0]", "Hi"),
    ("content[0]", {"text": "Hi"}),
    ("content[0].type", {"type": "image", "image": "a.png"}),
    ("content[0].type", {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}),
    ("content[0].type", {"type": "file", "file": {"file_id": "x"}}),
    ("content[0].type", {"type": "video_url", "video_url": {"url": "x"}}),
    ("content[0].text", {"type": "text"}),
    ("content[0].text", {"type": "text", "text": 1}),
    ("content[0].text", {"type": "text", "text": None}),
    ("content[0].cache_control", {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}),
    ("image_url", {"type": "image_url"}),
    ("image_url", {"type": "image_url", "image_url": data_url(png())}),
    ("image_url.url", {"type": "image_url", "image_url": {}}),
    ("image_url.url", {"type": "image_url", "image_url": {"url": ""}}),
    ("image_url.url", {"type": "image_url", "image_url": {"url": 1}}),
    ("image_url.detail", {"type": "image_url", "image_url": {"url": data_url(png()), "detail": "high"}}),
    ("image_url.size", {"type": "image_url", "image_url": {"url": data_url(png()), "size": 1}}),
)
WRONG_URLS: tuple[str, ...] = (
    "/etc/passwd",
    "cat.png",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file://localhost/etc/hostname",
    "ftp://example.com/a.png",
    "gopher://example.com/",
    "javascript:alert(1)",
    "http://127.0.0.1/a.png",
    "http://localhost:22/",
    "https://[::1]/a.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/a.png",
    "http://0/a.png",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png,abc",
    "data:text/html;base64,PGI+",
    "data:,x",
    "data:image/png;base64,@@@@",
    "data:image/png;base64,abc",
    data_url(b"not an image at all"),
    data_url(png()[:40]),
    data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/eps"),
    data_url(b"%PDF-1.4\n", "image/pdf"),
    data_url(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "image/svg+xml"),
    data_url(b"II*\x00\x08\x00\x00\x00", "image/tiff"),
    data_url(bomb()),
    data_url(bomb(10_000, 10_000)),
    data_url(png(9000, 9000)),
)
WRONG_BODIES: tuple[tuple[str, bytes], ...] = (
    ("empty", b""),
    ("JSON", b"{"),
    ("JSON", b'{"messages": [}'),
    ("JSON", b"messages=Hi"),
    ("JSON", b"<xml/>"),
    ("JSON", b'{"messages": NaN}'),
    ("JSON", b'{"max_tokens": Infinity}'),
    ("JSON", b"{'messages': []}"),
    ("JSON", b'{"messages": [],}'),
    ("JSON", b'{"messages": []} {}'),
    ("JSON", b'{"max_tokens": ' + b"9" * 5000 + b"}"),
    ("messages", b'{"messages": [], "messages": []}'),
    ("nested", b"[" * 200_000),
    ("nested", b'{"a":' * 100_000),
    ("commas", b'{"messages": [' + b"[]," * 300_000 + b"[]]}"),
    ("UTF-8", b'{"messages": "\xff"}'),
    ("UTF-8", b"\x80\x81"),
    ("object", b"[]"),
    ("object", b"1"),
    ("object", b"null"),
    ("object", b'"messages"'),
    ("object", b"true"),
    ("messages", b"{}"),
    ("messages", b'{"messages": null}'),
)


def mistakes() -> list[Mistake]:
    """All of them."""
    return [
        *_of_keys(),
        *_of_messages(),
        *_of_images(),
        *(Mistake(f"body {body[:20]!r}", named, body) for named, body in WRONG_BODIES),
        *_of_http(),
    ]


def _changed(about: str, named: str, change: Callable[[dict[str, Any]], Any], statuses: tuple[int, ...] = (400,)) -> Mistake:
    request = copy.deepcopy(good())
    change(request)
    return Mistake(about, named, json.dumps(request).encode(), statuses=statuses)


def _of_keys() -> Iterator[Mistake]:
    for key, values in {**WRONG_VALUES, **NOT_SUPPORTED}.items():
        for value in values:
            statuses = (400, 404) if key == "model" else (400,)
            about = f"{key}: {json.dumps(value)[:40]}"
            yield _changed(about, key, lambda request, key=key, value=value: request.update({key: value}), statuses)
    both = {"max_tokens": 4, "max_completion_tokens": 5}
    yield _changed("two limits", "max_completion_tokens", lambda request: request.update(both))
    options = {"stream": True, "stream_options": {"include_everything": True}}
    yield _changed("stream_options", "include_everything", lambda request: request.update(options))
    sampled = {"temperature": 1, "top_p": 2}
    yield _changed("top_p: 2", "top_p", lambda request: request.update(sampled))
    dynamic = {"threshold": 2, "remasking": "low_confidence_dynamic"}  # a lossless checkpoint refuses the first of them
    yield _changed("threshold: 2", "threshold", lambda request: request.update(dynamic))


def _of_messages() -> Iterator[Mistake]:
    for named, message in WRONG_MESSAGES:
        about = f"message {json.dumps(message)[:40]}"
        yield _changed(about, named, lambda request, message=message: request.update(messages=[message]))
    for named, part in WRONG_PARTS:
        message = {"role": "user", "content": [part]}
        about = f"part {json.dumps(part)[:40]}"
        yield _changed(about, named, lambda request, message=message: request.update(messages=[message]))
    parts = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1000}]
    yield _changed("1000 parts", "messages[0].content", lambda request: request.update(messages=parts))
    yield _changed("a long key", "not known", lambda request: request.update({"k" * 1_000_000: 1}))
    many = {"role": "user", "content": good()["messages"][0]["content"] * 40}
    yield _changed("40 images", "images", lambda request: request.update(messages=[many]))
    long = {"role": "user", "content": "word " * 400_000}
    yield _changed("2 million letters", "letters", lambda request: request.update(messages=[long]))
    answer = {"role": "assistant", "content": good()["messages"][0]["content"]}
    after = [answer, {"role": "user", "content": "Hi"}]
    yield _changed("an image in an answer", "messages[0].content[1]", lambda request: request.update(messages=after))
    last = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    yield _changed("an answer last", "messages[1].role", lambda request: request.update(messages=last))


def _of_images() -> Iterator[Mistake]:
    for url in WRONG_URLS:

        def show(request: dict[str, Any], url: str = url) -> None:
            request["messages"][0]["content"][1]["image_url"]["url"] = url

        yield _changed(f"image {url[:40]}", "messages[0].content[1].image_url.url", show)


def _of_http() -> Iterator[Mistake]:
    body = json.dumps(good()).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""):
        yield Mistake(f"content type {kind!r}", "content type", body, headers={"Content-Type": kind}, statuses=(415,))
    packed = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    yield Mistake("compressed", "compressed", body, headers=packed, statuses=(415,))
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield Mistake(f"{method} completions", method, b"", method, statuses=(405,))
    for path in (
        "/v1/completions",
        "/v1/embeddings",
        "/v2/chat/completions",
        PATH + "/",
        "/docs",
        "/openapi.json",
        "/../etc/passwd",
    ):
        yield Mistake(f"POST {path}", path, body, path=path, statuses=(404,))
    yield Mistake("another model", "gpt-4o", b"", "GET", "/v1/models/gpt-4o", statuses=(404,))
    yield Mistake("POST models", "POST", body, path="/v1/models", statuses=(405,))
