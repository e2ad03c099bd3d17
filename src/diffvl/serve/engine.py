"""Requests wait, join the batch at a block border, and hear of their tokens; one thread does all that touches the model.

The event loop decides who joins and who leaves; the thread takes prompts in and decodes blocks, one call at a time. A fault in a
call is the fault of the requests that it was made for: they hear of it, the others go on, and the engine outlives them all. Only
where the model itself is broken does the engine end, so that whoever watches the server can start another: after a fault of CUDA
that lasts, or where calls have failed in a row and the shortest prompt fails too.
"""

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import BatchFeature

from diffvl.faults import is_lasting, is_of_memory
from diffvl.hub.answers_diffvl import certain
from diffvl.hub.processing_diffvl import TEXT_INPUTS
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.block_batch import BlockBatch
from diffvl.serve.denoising import Step
from diffvl.serve.draft_batch import DraftBatch
from diffvl.serve.limits import Limits
from diffvl.serve.refusals import Refusal, ending, failed, stopped
from diffvl.serve.sample import Sample

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_FAULTS = 3  # calls of the model that fail in a row before it is asked whether it answers at all
TAKE_IN_TOKENS = 8192  # prompt tokens, padding included, that are taken in at one block border; one prompt always is


@dataclass(frozen=True)
class Tokens:
    """What an answer has gained. tokens: since the last event. length: of the whole answer; where it is shorter than what was
    told and these tokens, the rest is taken away again. ended: as of a Sample. blocks, forwards: so far."""

    tokens: list[int]
    length: int
    ended: str | None
    blocks: int
    forwards: int


Event = Tokens | Step | Refusal


@dataclass(eq=False)
class Job:
    """A request with its sample. events: what happens to it, in order. is_gone: nobody waits for it any more."""

    sample: Sample
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    is_gone: bool = False
    arrived: float = field(default_factory=time.monotonic)
    joined: float | None = None
    told: int = 0  # tokens of the answer
    counted: int = 0  # of them, those that stay whatever comes


@dataclass
class Counts:
    """What has happened since the start. faults_in_row: since a block was last decoded, but for lacks of memory."""

    blocks: int = 0
    answer_tokens: int = 0
    faults: int = 0
    faults_in_row: int = 0


class Engine:
    """Decodes for many requests at once.

    Attributes:
        waiting: jobs that have not joined, the oldest first. joining: those that are being taken in. running: those in the batch.
        counts: since the start.
    """

    def __init__(self, model: Any, pad_token_id: int, limits: Limits) -> None:
        self.batch: BlockBatch | DraftBatch = (
            BlockBatch(model, pad_token_id) if model.gate is None else DraftBatch(model, pad_token_id, limits.samples)
        )
        self.limits = limits
        self.waiting: deque[Job] = deque()
        self.joining: list[Job] = []
        self.running: list[Job] = []
        self.counts = Counts()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._work = asyncio.Event()
        self._is_closing = False
        self._broken: BaseException | None = None  # the fault after which the model is given up
        self._task: asyncio.Task[None] | None = None

    # --- for requests ----------------------------------------------------------------------------------------------------------

    def submit(self, inputs: BatchFeature, settings: DecodeSettings, show_steps: bool) -> Job:
        """Lets a prompt wait for its place. Raises Refusal where nothing decodes any more."""
        self.require_alive()
        job, loop = Job(Sample(inputs, settings)), asyncio.get_running_loop()

        def on_step(step: Step) -> None:
            loop.call_soon_threadsafe(job.events.put_nowait, step)

        job.sample.on_step = on_step if show_steps else None
        self.waiting.append(job)
        self._work.set()
        return job

    def leave(self, job: Job) -> None:
        """Nobody waits for the answer any more: its place is free at the next block border."""
        job.is_gone = True
        if job in self.waiting:
            self.waiting.remove(job)
        self._work.set()

    @property
    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def require_alive(self) -> None:
        if not self.is_alive:
            raise stopped()

    @property
    def forwards(self) -> int:
        return self.batch.forwards

    # --- its life --------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._decode_for_ever(), name="engine")
        self._task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Ends after the block under way; whoever still waits is told."""
        self._is_closing = True
        self._work.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        self._thread.shutdown()

    async def _decode_for_ever(self) -> None:
        while not self._is_closing:
            if not self.waiting and not self.running:
                self._work.clear()
                await self._work.wait()
                continue
            await self._let_go()
            await self._take_in()
            if self.running and self._broken is None:
                await self._decode_block()
            if self.counts.faults_in_row >= MOST_FAULTS and not self.running and self._broken is None:
                await self._examine()
            if self._broken is not None:
                raise RuntimeError("the model fails whatever it is asked: start the server again") from self._broken

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Nothing is decoded any more: whoever waits is told, however it came to that."""
        told = ending()
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.critical("the engine has stopped", exc_info=fault)
            told = stopped()
        self._refuse([*self.running, *self.joining, *self.waiting], told)
        self.running, self.joining = [], []
        self.waiting.clear()
        self.batch.clear()

    async def _let_go(self) -> None:
        gone = [job for job in self.running if job.is_gone]
        if gone:
            self.running = [job for job in self.running if not job.is_gone]
            _, fault = await self._call(self.batch.drop, [job.sample for job in gone])
            if fault is not None:
                self._give_up(fault)

    async def _take_in(self) -> None:
        """Lets jobs join, as many as there are places for and as go in together."""
        jobs: list[Job] = []
        while self.waiting and len(self.running) + len(jobs) < self.limits.samples:
            longest = max(job.sample.prompt_tokens for job in (*jobs, self.waiting[0]))
            if jobs and longest * (len(jobs) + 1) > TAKE_IN_TOKENS:
                break
            jobs.append(self.waiting.popleft())
        if jobs:
            self.joining = jobs
            await self._join(jobs)
            self.joining = []

    async def _join(self, jobs: Sequence[Job]) -> None:
        """Takes the prompts of some jobs in; where that fails for several at once, for each by itself."""
        taken, fault = await self._call(self.batch.take_in, [job.sample for job in jobs])
        if taken is None:
            assert fault is not None
            if len(jobs) > 1 and all(not job.sample.answer for job in jobs) and not is_lasting(fault):
                for job in jobs:
                    await self._join([job])
            else:
                self._refuse(jobs, self._fault(fault))
            return
        _, fault = await self._call(self.batch.add, *taken)
        if fault is not None:
            self._refuse(jobs, self._fault(fault))
            self._give_up(fault)
            return
        for job in jobs:
            job.joined = time.monotonic()
        self.running += [job for job in jobs if job.sample.ended is None]
        self._tell([job for job in jobs if job.sample.blocks])

    async def _decode_block(self) -> None:
        jobs = self.running
        _, fault = await self._call(self.batch.decode_block)
        if fault is not None:
            self._give_up(fault)
            return
        self.counts.faults_in_row = 0
        self.counts.blocks += 1
        self.running = [job for job in jobs if job.sample.ended is None]
        self._tell(jobs)

    async def _examine(self) -> None:
        """Asks the empty batch for an answer, to know whose fault it was: clients ask again for what has failed, and no request
        may end a server that answers others."""
        _, fault = await self._call(self._answer_shortly)
        self.batch.clear()
        if fault is None:
            log.warning("%d calls of the model failed in a row, but it answers", self.counts.faults_in_row)
            self.counts.faults_in_row = 0
        elif not is_of_memory(fault):
            self._broken = fault

    def _answer_shortly(self) -> None:
        batch = self.batch
        prompt = torch.tensor([[batch.pad_token_id]])
        rows = (prompt, torch.ones_like(prompt), torch.zeros_like(prompt))  # one token, which is no part of an earlier answer
        settings = DecodeSettings(max_new_tokens=2).for_checkpoint(batch.model.config)
        taken_in, going_on = batch.take_in([Sample(BatchFeature(dict(zip(TEXT_INPUTS, rows, strict=True))), settings)])
        batch.add(taken_in, going_on)  # type: ignore[arg-type]
        while batch.samples:
            batch.decode_block()

    async def _call(self, work: Callable[..., T], *given: Any) -> tuple[T | None, BaseException | None]:
        """What a call in the model's thread gave, and what it raised."""
        future = asyncio.get_running_loop().run_in_executor(self._thread, work, *given)
        await asyncio.wait([future])
        fault = future.exception()
        if fault is not None:
            traceback.clear_frames(fault.__traceback__)  # or their tensors stay in memory as long as it is known what failed
            return None, fault
        return future.result(), None

    # --- what jobs hear --------------------------------------------------------------------------------------------------------

    def _tell(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            sample = job.sample
            fresh = sample.answer[job.told :]
            job.told = len(sample.answer)
            stays = len(sample.answer) if sample.ended else certain(sample.answer, sample.settings)
            self.counts.answer_tokens += stays - job.counted
            job.counted = stays
            job.events.put_nowait(Tokens(fresh, len(sample.answer), sample.ended, sample.blocks, sample.forwards))

    def _refuse(self, jobs: Sequence[Job], refusal: Refusal) -> None:
        for job in jobs:
            job.events.put_nowait(refusal)

    def _give_up(self, fault: BaseException) -> None:
        """The batch is lost, and all that are in it."""
        told = self._fault(fault)
        jobs, self.running = self.running, []
        self.batch.clear()
        self._refuse(jobs, told)

    def _fault(self, fault: BaseException) -> Refusal:
        self.counts.faults += 1
        log.error("a request failed", exc_info=fault)
        if is_of_memory(fault):
            torch.cuda.empty_cache()
            return Refusal(503, "the machine has too little memory for this request at present", code="out_of_memory")
        self.counts.faults_in_row += 1
        if is_lasting(fault):
            self._broken = fault
        return failed()
