"""What a batch's decoding has come to: its answers as they grow, who looks on, and the figures at the end.

Shapes: B batch, L prompt length, D block size.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from .decoder_diffvl import BlockDecoder
from .prefix_diffvl import Prefix
from .stopping_diffvl import Stopping

# Finished samples leave the batch when at least this share of it is finished: moving the cache has a price.
LEAVE_AT = 0.25


@dataclass
class BlockGenerationOutput(ModelOutput):
    """sequences: [B, L + new] prompt and answer, padded after the stop. tokens: answer tokens up to and including the stop,
    summed over the batch. forwards: passes of the trunk. prefill_seconds: until the prompt was in and the first tokens were
    predicted; decode_seconds: the rest. settling: for each sample the denoising step at which each answer token settled, counted
    over its answer; None where tokens come one by one. prefix: of one prompt, for the next turn of the conversation; reused:
    tokens of this prompt that were not computed again."""

    sequences: torch.Tensor | None = None
    tokens: int | None = None
    forwards: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    settling: list[list[int]] | None = None
    prefix: Prefix | None = None
    reused: int | None = None

    @property
    def tokens_per_forward(self) -> float:
        assert self.tokens is not None and self.forwards is not None
        return self.tokens / self.forwards


@dataclass(frozen=True)
class DenoisingStep:
    """What `on_step` sees after every denoising step: ids [B, D] of the open blocks with mask tokens where open, which settled
    just now, the confidence of what was predicted in this step (0 elsewhere), and the samples' numbers in the batch as given. A
    sample that has ended may still be among them; nothing of it settles any more."""

    ids: torch.Tensor
    settled: torch.Tensor
    confidence: torch.Tensor
    samples: list[int]


OnStep = Callable[[DenoisingStep], None]


class Run:
    """The answers of a batch as they grow, whatever decodes them.

    Attributes:
        live: numbers of the samples that are still decoded, in the order of the decoder's rows.
    """

    def __init__(self, decoder: BlockDecoder, stopping: Stopping, streamer: Any, on_step: OnStep | None) -> None:
        self.decoder, self.stopping, self.streamer, self.on_step = decoder, stopping, streamer, on_step
        self.live = list(range(len(decoder.prompt_ids)))
        self.answers: list[list[int]] = [[] for _ in self.live]
        self.settling: list[list[int]] | None = None
        self.told = 0  # tokens that the streamer has
        self.began = self._now()
        self.first: Any = None

    def predicted(self) -> None:
        """Notes when the first tokens were there."""
        if self.first is None:
            self.first = self._now()

    def _now(self) -> Any:
        return mark(self.decoder.start.device)

    def extend(self, sample: int, tokens: list[int]) -> bool:
        """Adds final tokens to an answer; True if it ends there."""
        answer = self.answers[sample]
        before = len(answer)
        answer.extend(tokens)
        ended = self.stopping.cut(answer, before)
        if self.streamer is not None:
            self._tell(answer, len(answer) if ended else self.stopping.certain(answer))
        return ended

    def finish(self) -> None:
        """Tells who follows that no more will come."""
        if self.streamer is not None:
            self._tell(self.answers[0], len(self.answers[0]))
            self.streamer.end()

    def _tell(self, answer: list[int], certain: int) -> None:
        if certain > self.told:
            self.streamer.put(torch.tensor(answer[self.told : certain]))
            self.told = certain

    def leave(self, ended: list[bool]) -> bool:
        """Takes ended samples (one flag for each row of the decoder) out of the batch, if they are many; True if none is left."""
        if all(ended):
            return True
        # A static cache has one batch size: leaving it would compile another.
        if self.decoder.static is None and sum(ended) >= LEAVE_AT * len(ended):
            keep = [row for row, done in enumerate(ended) if not done]
            self.decoder.select(keep)
            self.live = [self.live[row] for row in keep]
            ended[:] = [False] * len(keep)
        return False

    def output(self, sequences: torch.Tensor) -> BlockGenerationOutput:
        now = self._now()
        first = self.first if self.first is not None else now
        settling = None
        if self.settling is not None:
            settling = [steps[: len(answer)] for steps, answer in zip(self.settling, self.answers, strict=True)]
        return BlockGenerationOutput(
            sequences=sequences,
            tokens=sum(map(len, self.answers)),
            forwards=self.decoder.forwards,
            prefill_seconds=seconds(self.began, first),
            decode_seconds=seconds(first, now),
            settling=settling,
            prefix=self.decoder.prefix() if len(self.answers) == 1 and self.settling is not None else None,
            reused=self.decoder.reused,
        )


def mark(device: torch.device) -> Any:
    """A moment, on the device's own clock: on a GPU nobody waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds(first: Any, second: Any) -> float:
    """Between two moments."""
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1e3
