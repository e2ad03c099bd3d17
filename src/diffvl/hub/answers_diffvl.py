"""Logits -> tokens -> answers: which token a masked position gets, which settle in a step, and where an answer ends.

Shapes: B batch, L prompt length, D block size, M masked tokens of the batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from .blocks_diffvl import Prefix
from .clock_diffvl import moment, seconds_between
from .decoder_diffvl import BlockDecoder
from .judge_diffvl import Sampling, note_places
from .settings_diffvl import DecodeSettings

LONGEST_UNIT = 64  # tokens of a repeated unit that is looked for
# Finished samples leave the batch when at least this share of it is finished: moving the cache has a price.
LEAVE_AT = 0.25


# --- tokens -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What the sampler makes of masked tokens, each [M]: the token, its probability before top-k and top-p (SDAR's confidence),
    and the entropy of that distribution in nats, where the remasking rule asks for it."""

    ids: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor | None


Picker = Callable[[torch.Tensor], Prediction]


def picker(sampling: Sampling, settings: DecodeSettings) -> Picker:
    """logits [M, V] -> Prediction. Entropies, which cost another pass over all logits, only where remasking asks for them."""

    def pick(logits: torch.Tensor) -> Prediction:
        found = sampling.distributions(logits)
        entropy = torch.special.entr(found.plain).sum(-1) if settings.remasking == "entropy" else None
        if sampling.is_greedy:
            confidence, ids = found.plain.max(-1)
        else:
            ids = sampling.draw(found.kept)
            confidence = found.plain.gather(1, ids[:, None])[:, 0]
        return Prediction(ids, confidence, entropy)

    return pick


def quota(count: Any, step: int, steps: int) -> Any:
    """Tokens that must settle in one of `steps` steps of a block with `count` masks (a number, or a tensor of numbers); the
    remainder goes to the first steps, as in SDAR."""
    return count // steps + (step < count % steps)


def settled(
    settings: DecodeSettings,
    quota_B: torch.Tensor,
    masked_BD: torch.Tensor,
    confidence_BD: torch.Tensor,
    entropy_BD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which masked tokens settle in this step, bool [B, D]; never more than are masked, and never none where one must.

    remasking: "low_confidence_static" (the quota's most confident), "low_confidence_dynamic" (all above `threshold`, at least the
    quota's), "sequential" (from the left) or "entropy" (the least uncertain whose entropies add up to no more than
    `entropy_budget`, at least the quota's; the rule of EB-Sampler, arXiv 2505.24857, with the quota as its floor). Entropies are
    needed by the last only.
    """
    if settings.remasking == "sequential":
        score = -torch.arange(masked_BD.shape[1], device=masked_BD.device).expand_as(masked_BD).float()
    elif settings.remasking == "entropy":
        assert entropy_BD is not None
        score = -entropy_BD
    else:
        score = confidence_BD
    score = score.masked_fill(~masked_BD, float("-inf"))
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1, stable=True)
    chosen = (rank < quota_B[:, None]) & masked_BD
    if settings.remasking == "low_confidence_dynamic":
        assert settings.threshold is not None
        chosen = chosen | ((confidence_BD > settings.threshold) & masked_BD)
    elif settings.remasking == "entropy":
        assert settings.entropy_budget is not None and entropy_BD is not None
        spent = entropy_BD.masked_fill(~masked_BD, float("inf")).gather(1, order).cumsum(1).gather(1, rank)
        chosen = chosen | ((spent <= settings.entropy_budget) & masked_BD)
    return chosen


# --- ends -------------------------------------------------------------------------------------------------------------------


def cut(answer: list[int], seen: int, settings: DecodeSettings) -> bool:
    """Trims an answer in place where it ends: at a stop token, a stop string, a loop of repetitions or the limit. True if it
    does. `seen` tokens of it were looked at before; in what portions they come does not matter."""
    assert settings.eos_token_id is not None
    ends = [place + 1 for place in range(seen, len(answer)) if answer[place] in settings.eos_token_id][:1]
    if settings.stop_strings:
        ends += _string_end(answer, seen, settings)
    if len(answer) >= settings.max_new_tokens:
        ends.append(settings.max_new_tokens)
    if settings.repetition_stop is not None:
        # A loop that would close after another end is none.
        ends += _loop_end(answer[: min(ends, default=len(answer))], seen, settings.repetition_stop)
    if not ends:
        return False
    del answer[min(ends) :]
    return True


def certain(answer: Sequence[int], settings: DecodeSettings) -> int:
    """How many tokens of an answer that goes on nothing can take away any more: a loop that closes later is cut after its
    first round."""
    count = len(answer)
    if settings.repetition_stop is None:
        return count
    for unit in range(1, LONGEST_UNIT + 1):
        begin = len(answer) - unit
        while begin > 0 and answer[begin - 1] == answer[begin - 1 + unit]:
            begin -= 1
        if begin + unit < len(answer):
            count = min(count, begin + unit)
    return count


def _string_end(answer: Sequence[int], seen: int, settings: DecodeSettings) -> list[int]:
    """The first length at which the text holds a stop string."""

    def holds(length: int) -> bool:
        text = settings.tokenizer.decode(answer[:length], skip_special_tokens=False)
        return any(string in text for string in settings.stop_strings)

    if not holds(len(answer)):
        return []
    return [length for length in range(seen + 1, len(answer) + 1) if holds(length)][:1]


def _loop_end(answer: Sequence[int], seen: int, repeats: int) -> list[int]:
    """The end of the first round of a loop, looked for at every length."""
    for length in range(seen + 1, len(answer) + 1):
        for unit in range(1, min(LONGEST_UNIT, length // repeats) + 1):
            tail = list(answer[length - unit * repeats : length])
            if tail == tail[:unit] * repeats:
                return [length - unit * (repeats - 1)]
    return []


# --- answers ----------------------------------------------------------------------------------------------------------------


@dataclass
class DraftFigures:
    """What became of drafts, summed over the samples of a batch. rounds: drafts that were checked. drafted, accepted: their
    tokens. reached: for each place of a draft how many were checked there, all before it being accepted; agreed: and were
    accepted there too."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)

    def note(self, count: int, accepted: int) -> None:
        """A draft of `count` tokens of which the first `accepted` were kept; no draft where there were none."""
        self.rounds += count > 0
        self.drafted += count
        self.accepted += accepted
        note_places(self.reached, self.agreed, count, accepted)

    def add(self, other: "DraftFigures") -> None:
        """Those of another batch as well."""
        self.rounds, self.drafted, self.accepted = (
            self.rounds + other.rounds,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )
        self.reached = [one + more for one, more in zip_longest(self.reached, other.reached, fillvalue=0)]
        self.agreed = [one + more for one, more in zip_longest(self.agreed, other.agreed, fillvalue=0)]

    @property
    def accepted_per_round(self) -> float:
        return self.accepted / self.rounds if self.rounds else 0.0


@dataclass
class BlockGenerationOutput(ModelOutput):
    """sequences: [B, L + new] prompt and answer, padded after the stop. tokens: answer tokens up to and including the stop,
    summed over the batch. forwards: passes of the trunk. prefill_seconds: until the images were encoded, the prompt was in and
    the first tokens were predicted; decode_seconds: the rest. settling: for each sample the denoising step at which each answer
    token settled, counted over its answer; None where tokens come one by one. drafts: what became of them, in mode
    "speculative". prefix: of one prompt, for the next turn of the conversation; reused: tokens of this prompt that were not
    computed again."""

    sequences: torch.Tensor | None = None
    tokens: int | None = None
    forwards: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    settling: list[list[int]] | None = None
    drafts: DraftFigures | None = None
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


class BatchAnswers:
    """The answers of a batch as they grow, whatever decodes them.

    Attributes:
        live: numbers of the samples that are still decoded, in the order of the decoder's rows.
        settling: see BlockGenerationOutput; filled by whoever decodes in blocks.
        figures: of drafts; filled by whoever checks some.
        stops: says of an answer whether it ends with its last token, besides what the settings say; None for never.
    """

    def __init__(self, decoder: BlockDecoder, settings: DecodeSettings, streamer: Any, on_step: OnStep | None) -> None:
        self.decoder, self.settings, self.streamer, self.on_step = decoder, settings, streamer, on_step
        self.live = list(range(len(decoder.prompt.ids)))
        self.answers: list[list[int]] = [[] for _ in self.live]
        self.settling: list[list[int]] | None = None
        self.stops: Callable[[list[int]], bool] | None = None
        self.figures = DraftFigures()
        self._streamed = 0  # tokens
        self._first: Any = None

    def note_prediction(self) -> None:
        """Notes when the first tokens were there."""
        if self._first is None:
            self._first = moment(self.decoder.device)

    def length(self, sample: int) -> int:
        """Tokens of an answer so far."""
        return len(self.answers[sample])

    def note_drafts(self, sample: int, count: int, accepted: int) -> None:
        """A draft of `count` tokens for a sample of which the first `accepted` were kept."""
        self.figures.note(count, accepted)

    def extend(self, sample: int, tokens: list[int]) -> bool:
        """Adds final tokens to an answer; True if it ends there."""
        answer = self.answers[sample]
        before = len(answer)
        answer.extend(tokens)
        ended = cut(answer, before, self.settings)
        if (stops := self.stops) is not None:
            first = next((end for end in range(before + 1, len(answer) + 1) if stops(answer[:end])), None)
            if first is not None:
                del answer[first:]
                ended = True
        if self.streamer is not None:
            self._stream(answer, len(answer) if ended else certain(answer, self.settings))
        return ended

    def finish(self) -> None:
        """Tells a streamer that no more will come."""
        if self.streamer is not None:
            self._stream(self.answers[0], len(self.answers[0]))
            self.streamer.end()

    def _stream(self, answer: list[int], end: int) -> None:
        if end > self._streamed:
            self.streamer.put(torch.tensor(answer[self._streamed : end]))
            self._streamed = end

    def drop(self, ended: list[bool]) -> bool:
        """Takes ended samples (one flag for each row of the decoder) out of the batch, if they are many; True if none is left."""
        if all(ended):
            return True
        # A static cache has one batch size: dropping samples would compile another.
        if self.decoder.static is None and sum(ended) >= LEAVE_AT * len(ended):
            keep = [row for row, done in enumerate(ended) if not done]
            self.decoder.select(keep)
            self.live = [self.live[row] for row in keep]
            ended[:] = [False] * len(keep)
        return False

    def output(self, sequences: torch.Tensor) -> BlockGenerationOutput:
        """What `generate` returns beside the sequences."""
        now = moment(self.decoder.device)
        first = self._first if self._first is not None else now
        settling = None
        if self.settling is not None:
            settling = [steps[: len(answer)] for steps, answer in zip(self.settling, self.answers, strict=True)]
        return BlockGenerationOutput(
            sequences=sequences,
            tokens=sum(map(len, self.answers)),
            forwards=self.decoder.forwards,
            prefill_seconds=seconds_between(self.decoder.begun, first),
            decode_seconds=seconds_between(first, now),
            settling=settling,
            drafts=self.figures if self.settings.mode == "speculative" else None,
            prefix=self.decoder.prefix() if len(self.answers) == 1 and settling is not None else None,
            reused=self.decoder.reused,
        )
