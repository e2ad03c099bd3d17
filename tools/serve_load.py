"""Many clients at a server at once: is it faster than one by one, does it stay small, does it lose anything?

    python -m tools.serve_load DIR                                # starts `diffvl serve DIR`, and ends it
    python -m tools.serve_load --url http://127.0.0.1:8000        # a server that runs already, on this machine
    python -m tools.serve_load DIR --clients 32 --seconds 300 --json > load.json

1. One by one: one client asks every question once. Its answers are what everybody must get.
2. Together: `--clients` clients ask the questions in turn, each with a connection of its own, half of them streaming, some of
   them going away in the middle of an answer, for `--seconds`. Greedy answers must be those of 1, letter for letter; of a
   checkpoint in 16 bits, where the size of a batch decides between nearly equal tokens, with `--rounding` they need not.
3. Mistakes: every request of tools/serve_mistakes.py must be told by a status of 400 to 499 and a message that names it.

The memory of the server's process is read from /metrics all the while. Only addresses of this machine are asked.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tools.serve_mistakes import PATH, Mistake, mistakes

JSON = {"Content-Type": "application/json"}
TEXTS = (
    "What is it?",
    "Describe what you see in one sentence.",
    "Name three colours.",
    "Why is the sky blue? Answer for a child of ten years, please.",
    "Count from one to nine.",
)
GOES_AWAY = 0.03  # share of requests whose client leaves in the middle
LOCAL = ("127.0.0.1", "localhost", "::1")


class LoadError(Exception):
    """The load cannot be made, or what was promised did not hold."""


# --- questions ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A request, and the text that it must get; None while it is not known."""

    request: dict[str, Any]
    answer: str | None = None
    tokens: int = 0


def questions(count: int, tokens: int) -> list[Question]:
    """Different ones: texts and pictures, short and long answers, one to all denoising steps."""
    drawn = random.Random(0)
    found = []
    for number in range(count):
        text = TEXTS[number % len(TEXTS)] + (f" ({number})" if number >= len(TEXTS) else "")
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if number % 2:
            parts.insert(0, {"type": "image_url", "image_url": {"url": picture(number)}})
        limit = drawn.randint(max(tokens // 4, 1), tokens)
        found.append(Question({"messages": [{"role": "user", "content": parts}], "max_tokens": limit}))
    return found


def picture(seed: int) -> str:
    drawn = random.Random(seed)
    image = Image.new("RGB", (96, 96), tuple(drawn.randrange(256) for _ in range(3)))
    image.paste(tuple(drawn.randrange(256) for _ in range(3)), (8, 8, 20 + drawn.randrange(60), 80))
    out = io.BytesIO()
    image.save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


# --- one client --------------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """A client with a connection that it keeps."""

    host: str
    port: int
    connection: http.client.HTTPConnection | None = None

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        if self.connection is None:
            self.connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        self.connection.request(method, path, body, headers or {})
        return self.connection.getresponse()

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def ask(self, request: dict[str, Any]) -> tuple[int, str, int]:
        """Status, text, tokens of the answer. Raises LoadError for a stream that does not end as one does."""
        response = self.send("POST", PATH, json.dumps(request).encode(), JSON)
        body = response.read()
        if response.status != 200:
            return response.status, body.decode(), 0
        if request.get("stream"):
            return 200, *_streamed(body.decode())
        found = json.loads(body)
        return 200, found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]

    def leave(self, request: dict[str, Any]) -> None:
        """Begins to ask and goes away."""
        response = self.send("POST", PATH, json.dumps({**request, "stream": True}).encode(), JSON)
        response.read(100)
        response.close()
        self.close()


def _streamed(body: str) -> tuple[str, int]:
    *events, done, _ = body.split("\n\n")
    if done != "data: [DONE]":
        raise LoadError(f"a stream ended with {done[:200]!r}")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    texts = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
    return "".join(texts), chunks[-1]["usage"]["completion_tokens"]


# --- what is measured --------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What clients have seen. different: answers that are not those of one by one. lost: requests without a whole answer."""

    answers: int = 0
    tokens: int = 0
    left: int = 0
    different: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def note(self, question: Question, status: int, text: str, tokens: int, seconds: float) -> None:
        with self.lock:
            if status != 200 or not text or not tokens:
                self.lost.append(f"{status}: {text[:100]!r} for {(question.answer or '')[:100]!r}")
                return
            if text != question.answer or tokens != question.tokens:
                self.different.append(f"{text[:100]!r} for {(question.answer or '')[:100]!r}")
            self.answers, self.tokens = self.answers + 1, self.tokens + tokens
            self.seconds.append(seconds)


@dataclass(frozen=True)
class Report:
    """The figures of a run. megabytes: of the server's process, at the start of the load, in its middle and at its end."""

    clients: int
    one_by_one_tokens_per_second: float
    together_tokens_per_second: float
    times_as_fast: float
    answers: int
    different: int
    left_on_purpose: int
    lost: int
    median_seconds: float
    slowest_seconds: float
    megabytes: list[float]
    mistakes: int
    mistakes_told: int


def one_by_one(client: Client, asked: Sequence[Question]) -> tuple[list[Question], float]:
    """The questions with their answers, and tokens per second."""
    known, start = [], time.monotonic()
    for question in asked:
        status, text, tokens = client.ask(question.request)
        if status != 200:
            raise LoadError(f"a question was not answered: {status}: {text[:300]}")
        known.append(Question(question.request, text, tokens))
    return known, sum(question.tokens for question in known) / (time.monotonic() - start)


def together(host: str, port: int, known: Sequence[Question], clients: int, seconds: float) -> tuple[Tally, float]:
    """Lets clients ask for some seconds; what they saw, and tokens per second until the last answer."""
    tally, start = Tally(), time.monotonic()
    threads = [
        threading.Thread(target=_asks, args=(Client(host, port), known, number, start + seconds, tally))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally, tally.tokens / (time.monotonic() - start)


def _asks(client: Client, known: Sequence[Question], number: int, end: float, tally: Tally) -> None:
    drawn, place = random.Random(number), number
    while time.monotonic() < end:
        question, place = known[place % len(known)], place + 1
        streams = {"stream": True, "stream_options": {"include_usage": True}} if drawn.random() < 0.5 else {}
        began = time.monotonic()
        try:
            if drawn.random() < GOES_AWAY:
                client.leave(question.request)
                with tally.lock:
                    tally.left += 1
                continue
            tally.note(question, *client.ask({**question.request, **streams}), time.monotonic() - began)
        except (OSError, http.client.HTTPException, LoadError, ValueError) as error:
            client.close()
            with tally.lock:
                tally.lost.append(f"{type(error).__name__}: {error}")
    client.close()


class Memory:
    """Reads the memory of the server's process now and then. megabytes: what it read."""

    def __init__(self, host: str, port: int, every: float) -> None:
        self.megabytes: list[float] = []
        self._client, self._every = Client(host, port), every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        while True:
            lines = self._client.send("GET", "/metrics").read().decode().splitlines()
            self._client.close()
            found = next(line for line in lines if line.startswith("process_resident_memory_bytes "))
            self.megabytes.append(round(float(found.split()[1]) / 1e6, 1))
            if self._stop.wait(self._every):
                return

    def thirds(self) -> list[float]:
        """The largest of each third: a leak makes them rise, load alone does not."""
        size = max(len(self.megabytes) // 3, 1)
        return [max(self.megabytes[start : start + size]) for start in (0, size, len(self.megabytes) - size)]


def is_told(mistake: Mistake, status: int, body: bytes) -> bool:
    """Whether a server told a mistake as it should."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return status in mistake.statuses and mistake.named in error["message"] and set(error) == {"message", "type", "param", "code"}


def tell_mistakes(host: str, port: int) -> tuple[int, list[str]]:
    """How many requests were wrong, and those that were not told so."""
    made, silent = mistakes(), []
    for mistake in made:
        client = Client(host, port)
        response = client.send(mistake.method, mistake.path, mistake.body, mistake.headers)
        body = response.read()
        if not is_told(mistake, response.status, body):
            silent.append(f"{mistake.about}: {response.status} {body[:300].decode(errors='replace')}")
        client.close()
    return len(made), silent


def measured(
    host: str, port: int, clients: int, seconds: float, tokens: int, count: int, rounding: bool = False
) -> tuple[Report, list[str]]:
    """The whole run: its figures, and what did not hold, in words. rounding: answers may differ from those of one by one."""
    client = Client(host, port)
    client.ask({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1})  # whatever a first request alone has to do
    known, slow = one_by_one(client, questions(count, tokens))
    client.close()
    with Memory(host, port, min(seconds / 30, 5.0)) as memory:
        tally, fast = together(host, port, known, clients, seconds)
    number, silent = tell_mistakes(host, port)
    times = sorted(tally.seconds) or [0.0]
    report = Report(
        clients=clients,
        one_by_one_tokens_per_second=round(slow, 2),
        together_tokens_per_second=round(fast, 2),
        times_as_fast=round(fast / slow, 2),
        answers=tally.answers,
        different=len(tally.different),
        left_on_purpose=tally.left,
        lost=len(tally.lost),
        median_seconds=round(times[len(times) // 2], 2),
        slowest_seconds=round(times[-1], 2),
        megabytes=memory.thirds(),
        mistakes=number,
        mistakes_told=number - len(silent),
    )
    return report, [*tally.lost[:10], *([] if rounding else tally.different[:10]), *silent[:10]]


# --- the server --------------------------------------------------------------------------------------------------------------


@contextmanager
def started(directory: Path, words: Sequence[str]) -> Iterator[tuple[str, int]]:
    """`diffvl serve` in a process of its own; its address."""
    program = [sys.executable, "-m", "diffvl.cli", "serve", str(directory), "--port", "0", *words]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ) as running:
        assert running.stderr is not None
        told: list[str] = []  # it may say more before its address
        while not told or " at http://" not in told[-1]:
            told.append(running.stderr.readline())
            if not told[-1]:
                raise LoadError(f"the server did not start: {''.join(told)}")
        reader = threading.Thread(target=lambda log: [None for _ in log], args=(running.stderr,))
        reader.start()
        address = urlsplit(told[-1].partition(" at ")[2].partition(": ")[0])
        try:
            assert address.hostname is not None and address.port is not None
            _wait_for(address.hostname, address.port)
            yield address.hostname, address.port
        finally:
            running.terminate()
            reader.join()


def _wait_for(host: str, port: int) -> None:
    for _ in range(600):
        client = Client(host, port)
        try:
            client.send("GET", "/health").read()
            return
        except ConnectionRefusedError:
            time.sleep(0.1)
        finally:
            client.close()
    raise LoadError("the server does not listen")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR")
    parser.add_argument("--url", help="a server that runs already, on this machine")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounding", action="store_true", help="of 16 bits: count other answers, as no mistake")
    parser.add_argument("--json", action="store_true")
    given, for_server = parser.parse_known_args(words)
    if (given.directory is None) == (given.url is None):
        parser.error("name DIR, or --url of a server that runs already")
    sizes = (given.clients, given.seconds, given.max_tokens, given.questions, given.rounding)
    if given.url is not None:
        address = urlsplit(given.url)
        if address.hostname not in LOCAL or for_server:
            parser.error("only a server of this machine is loaded, and its settings are its own")
        report, wrong = measured(address.hostname, address.port or 80, *sizes)
    else:
        with started(given.directory, for_server) as (host, port):
            report, wrong = measured(host, port, *sizes)
    for name, value in asdict(report).items() if not given.json else ():
        print(f"{name:30} {value}")
    if given.json:
        print(json.dumps({**asdict(report), "wrong": wrong}))
    for line in wrong:
        print(f"did not hold: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
