"""A request from its arrival to its end: a place, its body, its prompt, its job.

Invariants: a place is given back however a request ends, and with it whatever it held. No more prompts are prepared than can join
next, so what waits in memory is bodies, which are limited, and not images, which grow when they are decoded. Images of the net
come before that, by threads of their own: a slow host holds up those who ask for images of the net, and nobody else. Nothing is
fetched for a request that has ended, and the end of the server waits for no host.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from transformers import BatchFeature

from diffvl.decode.answer import Decoder, context_length
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.asked import Asked, asked_in
from diffvl.serve.engine import Engine, Event, Job, Tokens
from diffvl.serve.errand import Errand, in_a_daemon
from diffvl.serve.figures import Figures
from diffvl.serve.images import Fetch, fetch_images, open_images
from diffvl.serve.limits import ALL_FETCH_SECONDS, FETCH_SECONDS, Limits
from diffvl.serve.refusals import Refusal, stopped, wrong
from diffvl.serve.remote import RemoteImages

log = logging.getLogger(__name__)

IMAGE_THREADS = 2  # each may hold the images of a request, which may have as many pixels as are allowed
OPENED = IMAGE_THREADS + 1  # requests at once whose images are being opened, or have been and are not yet encoded
FETCHING = 8  # requests at once whose images are fetched, or have come and are not yet opened
LONGEST_RETRY = 60  # seconds that a client is told to stay away


class Service:
    """A checkpoint that answers requests.

    Attributes:
        name: under which it is served. drafts: whether it drafts and checks as a lossless checkpoint does,
        and denoises no block.
    """

    def __init__(self, decoder: Decoder, name: str, limits: Limits) -> None:
        self.decoder, self.name, self.limits = decoder, name, limits
        self.drafts = decoder.model.gate is not None
        self.created = int(time.time())
        self.engine = Engine(decoder.model, decoder.processor.pad_token_id, limits)
        self.figures = Figures(self.engine)
        self.inside = 0
        self._usual_seconds = 1.0  # of a request
        self._ahead = asyncio.Semaphore(limits.samples)
        self._fetching = asyncio.Semaphore(FETCHING)
        self._opened = asyncio.Semaphore(OPENED)
        self._errands: set[Errand] = set()
        self._images = ThreadPoolExecutor(IMAGE_THREADS, thread_name_prefix="images")
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._fetch: Fetch | None = RemoteImages(FETCH_SECONDS) if limits.fetches_images else None

    def start(self) -> None:
        self.engine.start()

    async def close(self) -> None:
        for errand in self._errands:
            errand.finish()
        await self.engine.close()
        for pool in (self._images, self._prompts):
            pool.shutdown(wait=False, cancel_futures=True)

    def enter(self) -> "Visit":
        """Gives a request a place.

        Raises:
            Refusal: 429 where all are taken, 503 where nothing decodes any more.
        """
        if not self.engine.is_alive:
            raise self.refused(stopped())
        if self.inside >= self.limits.samples + self.limits.waiting:
            rounds = self.inside / self.limits.samples
            seconds = min(max(math.ceil(self._usual_seconds * rounds / 2), 1), LONGEST_RETRY)
            message = f"{self.inside} requests are being answered or wait already: try again in {seconds} seconds"
            raise self.refused(Refusal(429, message, code="overloaded", headers={"Retry-After": str(seconds)}))
        return Visit(self)

    def refused(self, refusal: Refusal) -> Refusal:
        """Counts a request that gets no place."""
        self.figures.requests.labels(str(refusal.status)).inc()
        return refusal

    def note_seconds(self, seconds: float) -> None:
        self._usual_seconds += (seconds - self._usual_seconds) / 16

    # --- a prompt --------------------------------------------------------------------------------------------------------------

    def read(self, body: bytes) -> Asked:
        """Raises Refusal for a body that asks for nothing, or for what is not to be had."""
        model, processor = self.decoder.model, self.decoder.processor
        return asked_in(body, model.config, processor.tokenizer, self.name, self.limits)

    @asynccontextmanager
    async def fetched(self, asked: Asked) -> AsyncIterator[Mapping[str, bytes]]:
        """The bytes of a request's images of the net, which may lie in memory for the block. Raises Refusal for one that does not
        come."""
        sources = [source for source in asked.conversation.images if source.is_on_the_net]
        if not sources:
            yield {}
            return
        await self._fetching.acquire()
        errand = Errand(ALL_FETCH_SECONDS)
        self._errands.add(errand)
        fetching = in_a_daemon(fetch_images, sources, self.limits, self._fetch, errand)
        try:
            await asyncio.wait([fetching])
            yield fetching.result()
        finally:
            errand.finish()
            self._errands.discard(errand)
            fetching.add_done_callback(self._give_back_thread)

    def _give_back_thread(self, fetching: "asyncio.Future[Any]") -> None:
        """Lets another request be fetched for, now that the thread has ended too."""
        fetching.exception()  # looked at: asyncio complains of those that nobody has seen, as of a request that has ended
        self._fetching.release()

    async def turn_to_prepare(self) -> Callable[[], None]:
        """Waits until a prompt may be prepared; what it returns gives the turn back."""
        await self._ahead.acquire()
        return self._ahead.release

    async def prepared(self, asked: Asked, fetched: Mapping[str, bytes]) -> tuple[BatchFeature, DecodeSettings]:
        """The prompt as tensors, and the settings with its limit. Raises Refusal for a prompt that does not fit.

        Args:
            fetched: its images of the net.
        """
        loop, sources = asyncio.get_running_loop(), asked.conversation.images
        if not sources:
            return await loop.run_in_executor(self._prompts, self._encoded, asked, {})
        async with self._opened:
            images = await loop.run_in_executor(self._images, open_images, sources, self.limits, fetched)
            return await loop.run_in_executor(self._prompts, self._encoded, asked, images)

    def _encoded(self, asked: Asked, images: dict[str, Any]) -> tuple[BatchFeature, DecodeSettings]:
        messages, processor = asked.conversation.messages(images), self.decoder.processor
        try:
            length = len(processor.encode_chat(messages, add_generation_prompt=True).ids)
            settings = self._fitted(asked, length)
            inputs = processor.apply_chat_template([messages], tokenize=True, add_generation_prompt=True)
        except ValueError as error:
            raise wrong("messages", f"the messages cannot be answered: {error}") from error
        return inputs, settings

    def _fitted(self, asked: Asked, length: int) -> DecodeSettings:
        """The settings with a limit for which there is room behind a prompt of this length."""
        context, new = context_length(self.decoder), asked.settings.max_new_tokens
        most = self.limits.prompt_tokens if context is None else min(self.limits.prompt_tokens, context - 1)
        if length > most:
            message = f"the messages have {length} tokens, images included, and a prompt at most {most}: shorten them"
            raise wrong("messages", message, "context_length_exceeded")
        room = new if context is None else context - length
        if asked.names_limit is not None and new > room:
            message = f"{asked.names_limit} is {new}, and behind a prompt of {length} tokens there is room for {room}: lower it"
            raise wrong(asked.names_limit, message, "context_length_exceeded")
        return replace(asked.settings, max_new_tokens=min(new, room))


class Visit:
    """A request that has a place, until `close`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.arrived = time.monotonic()
        self.end = asyncio.get_running_loop().time() + service.limits.seconds
        self.job: Job | None = None
        self._give_back_turn: Callable[[], None] | None = None
        self._is_closed = self._has_first = False
        self.status = 500  # unless it comes to something else
        service.inside += 1

    async def submit(self, asked: Asked) -> Job:
        """Fetches the images, prepares the prompt when it is its turn, and lets it wait for its place in the batch."""
        service = self._service
        async with service.fetched(asked) as fetched:
            self._give_back_turn = await service.turn_to_prepare()
            inputs, settings = await service.prepared(asked, fetched)
        self.job = service.engine.submit(inputs, settings, asked.show_steps)
        self.job.arrived = self.arrived
        service.figures.prompt_tokens.inc(self.job.sample.prompt_tokens)
        return self.job

    async def next_event(self) -> Event:
        """What happens next to the job. Raises Refusal where that is its end."""
        assert self.job is not None
        event = await self.job.events.get()
        self._end_turn()
        if isinstance(event, Refusal):
            raise event
        if isinstance(event, Tokens) and not self._has_first:
            self._has_first = True
            self._service.figures.first.observe(time.monotonic() - self.arrived)
        return event

    def figures(self) -> dict[str, Any]:
        """What an answer has cost."""
        assert self.job is not None
        sample, joined = self.job.sample, self.job.joined or self.arrived
        drafted = {"drafted": sample.drafted, "accepted": sample.accepted}
        return {
            **(drafted if self._service.drafts else {"blocks": sample.blocks}),
            "forwards": sample.forwards,
            "tokens_per_forward": round(len(sample.answer) / max(sample.forwards, 1), 3),
            "waited_seconds": round(joined - self.arrived, 4),
            "seconds": round(time.monotonic() - self.arrived, 4),
        }

    def _end_turn(self) -> None:
        if self._give_back_turn is not None:
            self._give_back_turn()
            self._give_back_turn = None

    def close(self) -> None:
        """Gives everything back."""
        if self._is_closed:
            return
        self._is_closed = True
        service, job, seconds = self._service, self.job, time.monotonic() - self.arrived
        self._end_turn()
        service.inside -= 1
        service.figures.requests.labels(str(self.status)).inc()
        service.figures.seconds.observe(seconds)
        tokens = (0, 0)
        if job is not None:
            tokens = job.sample.prompt_tokens, len(job.sample.answer)
            if job.joined is not None:
                service.figures.waited.observe(job.joined - self.arrived)
                service.note_seconds(seconds)
            service.engine.leave(job)
        log.info("%d in %.2f s: prompt of %d tokens, answer of %d", self.status, seconds, *tokens)
