"""The server's addresses: OpenAI's chat completions, and what belongs to them.

Every answer but the page's and Prometheus's is JSON, every mistake too, whoever finds it. No schema is served, and no page that
loads anything from elsewhere.
"""

import asyncio
import hashlib
import hmac
import logging
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from re import DOTALL, findall
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from diffvl.serve.asked import Asked
from diffvl.serve.denoising import Step
from diffvl.serve.engine import Tokens
from diffvl.serve.figures import CONTENT_TYPE
from diffvl.serve.limits import BODY_SECONDS, Limits
from diffvl.serve.refusals import Refusal, ending, failed, json_bytes, short
from diffvl.serve.replies import AnswerText, Completion, event
from diffvl.serve.service import Service, Visit

log = logging.getLogger(__name__)
T = TypeVar("T")

COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
ADDRESSES = f"POST {COMPLETIONS}, GET {MODELS}, GET /health, GET /metrics and GET /"
LAST_WORDS = 5.0  # seconds in which a client must take what it is told at the end of a stream
DRAINED = 4  # how many times the largest body is read before it is refused: a client that still sends reads no answer


def make_app(service: Service, keys: Sequence[str], hosts: Collection[str] = ()) -> FastAPI:
    """The application. keys: one of which a request must name; none where anybody may ask. hosts: names by which requests must
    call the server, in small letters; none where any will do."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    async def require_key(request: Request) -> None:
        _require_host(request, hosts, service)
        _require_key(request, keys, service)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    locked = [Depends(require_key)]

    @app.post(COMPLETIONS, dependencies=locked, response_class=Response)
    async def complete(request: Request) -> Response:
        return await _complete(request, service)

    @app.get(MODELS, dependencies=locked, response_class=Response)
    async def models() -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    @app.get(MODELS + "/{name:path}", dependencies=locked, response_class=Response)
    async def model(name: str) -> Response:
        if name != service.name:
            message = f"the model {short(name)!r} is not served here; {service.name!r} is"
            raise Refusal(404, message, "model", "model_not_found")
        return _json(_model(service))

    @app.get("/health", response_class=Response)
    async def health() -> Response:
        engine = service.engine
        state = {"status": "ok" if engine.is_alive else "stopped", "running": len(engine.running), "requests": service.inside}
        return _json(state, 200 if engine.is_alive else 503)

    @app.get("/metrics", dependencies=locked, response_class=Response)
    async def metrics() -> Response:
        return Response(service.figures.text(), media_type=CONTENT_TYPE)

    page, policy = _page()

    @app.get("/", response_class=Response)
    async def root() -> Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    _tell_mistakes(app)
    return app


def _model(service: Service) -> dict[str, Any]:
    config = service.decoder.model.config
    limits = service.limits
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "diffvl",
        "diffvl": {
            "block_size": config.block_size,
            "drafts": service.drafts,
            "context": config.context,
            "grid": config.grid,
            "max_tokens": limits.answer_tokens,
            "max_prompt_tokens": limits.prompt_tokens,
            "max_images": limits.images,
        },
    }


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json_bytes(value), status, headers, "application/json")


def _page() -> tuple[bytes, str]:
    """The page, and the policy by which a browser runs this page's own script and style and nothing else."""
    page = files("diffvl.serve").joinpath("page.html").read_text(encoding="utf-8")

    def sums(tag: str) -> str:
        inside = findall(rf"<{tag}>(.*?)</{tag}>", page, DOTALL)
        return " ".join(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in inside)

    policy = (
        f"default-src 'none'; script-src {sums('script')}; style-src {sums('style')}; img-src data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), policy


# --- who may ask, and what a mistake is told -----------------------------------------------------------------------------------


def _require_key(request: Request, keys: Sequence[str], service: Service) -> None:
    """Compares with every key in a time that tells nothing of them. A completion that is refused is counted."""
    if not keys:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key.encode()) for key in keys]
    if kind.lower() != "bearer" or not any(matches):
        message = "the API key is wrong or missing: expected the header Authorization: Bearer KEY, with a key of this server"
        refusal = Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        raise service.refused(refusal) if request.url.path == COMPLETIONS else refusal


def _require_host(request: Request, hosts: Collection[str], service: Service) -> None:
    """Refuses who calls this machine by another name than its own: a page of the net, whose name leads here by now (DNS
    rebinding), and which a browser would let read the answers."""
    named = request.headers.get("host", "").lower()
    name = named.partition("]")[0] + "]" if named.startswith("[") else named.partition(":")[0]
    if not hosts or name in hosts:
        return
    message = (
        f"the request is for the host {short(named)!r}, and without an API key this server answers on {', '.join(sorted(hosts))} "
        "only: start it with --api-key to be asked by another name"
    )
    refusal = Refusal(403, message, code="host_not_allowed")
    raise service.refused(refusal) if request.url.path == COMPLETIONS else refusal


def _tell_mistakes(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return _json(error.body, error.status, error.headers)

    async def not_found(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {short(request.url.path)}"
        if error.status_code == 405:
            message = f"{where} is not to be had with this method; there are {ADDRESSES}"
        else:
            message = f"{where} does not exist here; there are {ADDRESSES}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return _json(Refusal(error.status_code, message, code=code).body, error.status_code, dict(error.headers or {}))

    async def broken(_: Request, __: Exception) -> Response:
        return _json(failed().body, 500)

    app.exception_handler(Refusal)(refused)
    app.exception_handler(HTTPException)(not_found)
    app.exception_handler(Exception)(broken)


# --- a chat completion ---------------------------------------------------------------------------------------------------------


async def _complete(request: Request, service: Service) -> Response:
    visit = service.enter()
    handed_over = False
    try:
        async with asyncio.timeout_at(visit.end):
            # Held by nobody but the work: bodies are large, and many requests wait.
            response = await _until_gone(request.receive, _begun(service, visit, await _asked(request, service)))
            handed_over = isinstance(response, EventStream)
            visit.status = 200
            return response
    except TimeoutError as error:
        visit.status = 504
        raise _too_slow(service.limits) from error
    except asyncio.CancelledError as error:  # by the server alone, when it ends
        visit.status = 503
        raise ending() from error
    except Refusal as error:
        visit.status = error.status
        raise
    finally:
        if not handed_over:
            visit.close()


def _too_slow(limits: Limits) -> Refusal:
    message = f"the answer was not ready within {limits.seconds:g} seconds: ask for fewer tokens, or when there is less to do"
    return Refusal(504, message, code="timeout")


async def _asked(request: Request, service: Service) -> Asked:
    return service.read(await _body(request, service.limits))


async def _body(request: Request, limits: Limits) -> bytes:
    """The body of a request that says it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {short(kind)!r}: expected application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "the body is compressed (content-encoding): send it as it is", code="unsupported_media_type")
    pieces, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limits.body_bytes:
                    pieces.append(piece)
                elif size > DRAINED * limits.body_bytes:
                    break
    except TimeoutError as error:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:g} seconds", code="timeout") from error
    except ClientDisconnect as error:
        raise _nobody() from error
    if size > limits.body_bytes:
        message = f"the body has more than {limits.body_bytes} bytes: send smaller images, or fewer"
        raise Refusal(413, message, code="body_too_large")
    return b"".join(pieces)


async def _begun(service: Service, visit: Visit, asked: Asked) -> Response:
    """The whole answer; or, of a stream, the response once its first block is there, so that what fails before has a status."""
    job, streams, includes_usage = await visit.submit(asked), asked.streams, asked.includes_usage
    del asked  # with the images in it
    tokenizer = service.decoder.processor.tokenizer
    completion = Completion(service.name, job.sample.prompt_tokens, includes_usage)
    text = AnswerText(tokenizer, job.sample.settings)
    first = await visit.next_event()
    if streams:
        return EventStream(service, visit, completion, text, first)
    while not (isinstance(first, Tokens) and first.ended):
        first = await visit.next_event()
    answer = job.sample.answer
    text.ids = answer
    return _json(completion.whole(text.whole(), len(answer), first.ended, visit.figures()))


class EventStream(Response):
    """An answer that is sent block by block. It closes the visit, however it ends."""

    def __init__(self, service: Service, visit: Visit, completion: Completion, text: AnswerText, first: Any) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}, "text/event-stream")
        del self.headers["content-length"]
        self._service, self._visit, self._completion, self._text, self._first = service, visit, completion, text, first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async with asyncio.timeout_at(self._visit.end):
                    await _until_gone(receive, self._send_all(send))
            except TimeoutError:
                await self._break_off(send, _too_slow(self._service.limits))
            except asyncio.CancelledError:  # by the server alone, when it ends
                await self._break_off(send, ending())
            except Refusal as error:
                await self._break_off(send, error)
            except Exception:  # a fault of ours, whatever it is: whoever reads cannot be told by a status any more
                log.exception("a stream failed")
                await self._break_off(send, failed())
        finally:
            self._visit.close()

    async def _break_off(self, send: Send, refusal: Refusal) -> None:
        """Tells what went wrong in the stream, where a status can tell it no more; to a client that still reads."""
        self._visit.status = refusal.status
        self._visit.close()
        if refusal.status == 499:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await send({"type": "http.response.body", "body": event(refusal.body), "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async for piece in self._pieces():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[bytes]:
        completion, visit, text = self._completion, self._visit, self._text
        yield completion.chunk({"role": "assistant", "content": ""})
        found = self._first
        while True:
            if isinstance(found, Step):
                yield completion.chunk({}, diffvl={"cells": text.cells(found)})
            elif isinstance(found, Tokens):
                piece = text.add(found.tokens, found.length, bool(found.ended))
                if piece or not found.ended:
                    blocks = {} if self._service.drafts else {"blocks": found.blocks}
                    progress = {**blocks, "forwards": found.forwards, "tokens": len(text.ids)}
                    yield completion.chunk({"content": piece}, diffvl=progress)
                if found.ended:
                    yield completion.chunk({}, found.ended, diffvl=visit.figures())
                    yield completion.last(len(text.ids))
                    return
            found = await visit.next_event()


def _nobody() -> Refusal:
    return Refusal(499, "the client has gone away", code="client_closed")


async def _until_gone(receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, T]) -> T:
    """What some work gives; raises Refusal, and ends the work, if the client goes away before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise _nobody()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
