"""What a forward costs by the number of its tokens on this machine, and from that the drafts that pay.

A draft of k masks makes forwards longer and fewer. How much longer they take is a fact of the machine: on a GPU at batch 1 some
dozens of tokens are nearly free, on a CPU each is paid for, in a large batch too. So forwards of several lengths are timed once
for a model, in a second or so, and kept with it. How many drafts are accepted is seen while decoding, place by place. What gives
most tokens a second by both is done, and that may be no drafts at all.

Greedy answers do not depend on it. In sampling the draws do, so a length is fixed there (`DecodeSettings.draft_length`).
"""

import bisect
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks_diffvl import Piece, Places, clean
from .configuration_diffvl import never_predicted
from .decoder_diffvl import BlockDecoder
from .judge_diffvl import note_places
from .layout_diffvl import Layout
from .settings_diffvl import DecodeSettings

PROMPT = 64  # tokens behind which forwards are timed
REPEATS = 3  # of which the fastest counts
MOST_TIMED = 256  # tokens; what longer forwards cost follows from the two longest
ENOUGH, SLOW = 8, 1.0  # tokens and seconds of a forward after which no longer one is timed: it would be for minutes
FIRST_GUESS = 0.6  # of the acceptance at a place that no draft has reached
WEIGHT = 4.0  # drafts that the guess counts as
MEMORY = 512.0  # drafts at a place after which older ones count half
LONGEST_FUSED = 1024  # tokens of a prompt that goes in together with the first masks, where nobody knows what that costs
WAIT = 64  # forwards without drafts after which one is tried again


# --- what is accepted --------------------------------------------------------------------------------------------------------


@dataclass
class Acceptance:
    """At each place of a draft: tried, how many drafts were checked there whose beginning was accepted; kept, how many of these
    were accepted there too."""

    tried: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def note(self, count: int, accepted: int) -> None:
        """A draft of `count` tokens of which the first `accepted` were kept."""
        for place in range(note_places(self.tried, self.kept, count, accepted)):
            if self.tried[place] > MEMORY:
                self.tried[place] /= 2
                self.kept[place] /= 2

    def expected(self, length: int) -> float:
        """Tokens of a draft of this length that will be accepted."""
        total, reached, rate = 0.0, 1.0, FIRST_GUESS
        for place in range(length):
            tried, kept = (self.tried[place], self.kept[place]) if place < len(self.tried) else (0.0, 0.0)
            rate = (kept + WEIGHT * rate) / (tried + WEIGHT)  # what was not seen is as at the place before
            reached *= rate
            total += reached
        return total


# --- what it costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Seconds of a forward by its tokens, rising: plain, and with adapters on all but its first token. Plain ones multiply no
    adapter."""

    tokens: tuple[int, ...]
    plain: tuple[float, ...]
    adapted: tuple[float, ...]

    def seconds(self, tokens: int, adapted: bool) -> float:
        """Of a forward of so many tokens, by a line between those that were timed."""
        known = self.adapted if adapted else self.plain
        right = min(max(bisect.bisect_left(self.tokens, tokens), 1), len(self.tokens) - 1)
        start, end = self.tokens[right - 1], self.tokens[right]
        share = (tokens - start) / (end - start)
        return known[right - 1] + share * max(known[right] - known[right - 1], 0.0)

    def tokens_per_second(self, drafting: str, length: int, batch: int, acceptance: Acceptance, steps: int = 1) -> float:
        """What a sample of a batch gains by drafts of this length, made in so many forwards; of none it is one token a
        forward."""
        if not length:
            return 1 / self.seconds(batch, False)
        accepted = acceptance.expected(length)
        if drafting == "fused":
            return (1 + accepted) / self.seconds(batch * (length + 1) ** 2, True)
        once = batch * (length + 1)
        more = (min(steps, length) - 1) * self.seconds(batch * length, True)
        return (2 + accepted) / (self.seconds(once, True) + more + self.seconds(once, False))


def timed_tokens(most: int) -> tuple[int, ...]:
    """The lengths of forwards that are timed, where drafts and batch ask for up to `most` tokens."""
    sizes = [1, 2]
    while sizes[-1] < min(most, MOST_TIMED):
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


@torch.no_grad()
def measured(model: Any, most: int) -> Costs:
    """Times forwards of the model, as it is and where it is."""
    table = model.get_input_embeddings().weight
    text = (~never_predicted(model.config, len(table), table.device)).nonzero()[:, 0]  # some models' image token is the tenth
    ids = text[torch.arange(PROMPT, device=table.device) % len(text)][None]
    decoder = BlockDecoder(model, ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids), {})
    decoder.committed.has_gaps = True
    decoder.forward(decoder.prompt.beginning(PROMPT, torch.ones_like(ids, dtype=torch.bool), "causal", False), None, None, None)
    sizes, plain, adapted = timed_tokens(most), list[float](), list[float]()
    for size in sizes:
        plain.append(_seconds(decoder, size, False))
        adapted.append(_seconds(decoder, size, True))
        if size >= ENOUGH and adapted[-1] > SLOW:
            break
    return Costs(sizes[: len(plain)], tuple(plain), tuple(adapted))


def _seconds(decoder: BlockDecoder, tokens: int, adapted: bool) -> float:
    """The fastest of some forwards of so many tokens, which leave nothing in the cache."""
    position = PROMPT + torch.arange(tokens, device=decoder.device)[None]
    valid, zero = torch.ones_like(position, dtype=torch.bool), torch.zeros_like(position)
    first = 1 if adapted and tokens > 1 else tokens
    ids = torch.zeros_like(position)
    stored = Piece(
        ids[:, :first], clean(position[:, :first], position[:, :first], valid[:, :first], "causal"), position[:, :first], None
    )
    read = None
    if first < tokens:
        rest = slice(first, None)
        noisy = torch.ones_like(position[:, rest])
        layout = Layout(position[:, rest], noisy * (PROMPT + 1), noisy, valid[:, rest], zero[:, rest], "causal")
        read = Piece(noisy * decoder.config.mask_token_id, layout, position[:, rest], None)
    for piece in filter(None, (stored, read)):
        piece.rope_ids = decoder.prompt.rope.at(piece.layout.position)
    places = [None if piece is None else Places.true_in(piece.layout.valid, piece.ids.numel()) for piece in (stored, read)]
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first warms up
        began = _now(decoder.device)
        decoder.forward(stored, read, *places)
        best = min(best, _now(decoder.device) - began)
        decoder.committed.crop_last(first)
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- what is done ------------------------------------------------------------------------------------------------------------


class DraftPlan:
    """Drafts of one length.

    Attributes:
        length: masks of a draft. is_fused: whether they are made in the forward that checks others. most_rows: tokens of a sample
        in the longest forward.
    """

    def __init__(self, length: int, drafting: str) -> None:
        self.length, self.is_fused = length, drafting == "fused"

    @property
    def most_rows(self) -> int:
        return (self.length + 1) ** 2 if self.is_fused else self.length + 1

    def masks(self, checking: bool, batch: int) -> int:
        """How many masks stand behind each clean token of the coming forward. checking: it checks drafts. batch: samples."""
        return self.length if self.is_fused or not checking else 0

    def prompt_masks(self, rows: int, tokens: int) -> int:
        """How many masks stand behind the last token of each of some prompts; `tokens` of each, padding included."""
        return self.masks(False, rows) if tokens <= LONGEST_FUSED else 0

    def note(self, count: int, accepted: int) -> None:
        """Hears of a draft of `count` tokens of which the first `accepted` were kept."""


class PayingPlan(DraftPlan):
    """Drafts of the length that pays, which may be none. steps: forwards of a draft, one for each of its tokens at most."""

    def __init__(self, model: Any, longest: int, drafting: str | None, batch: int, steps: int) -> None:
        super().__init__(longest, drafting or "fused")
        self.steps = steps
        self.ways = [drafting] if drafting else ["fused", "separate"]
        self.longest, self.idle = longest, 0
        self.costs = _costs_of(model, batch * (longest + 1) ** 2)
        if not hasattr(model, "_acceptance"):
            model._acceptance = Acceptance()
        self.acceptance: Acceptance = model._acceptance

    def masks(self, checking: bool, batch: int) -> int:
        if checking and not self.is_fused:
            return 0  # the second forward of a round
        choices = [("fused", 0), *((way, length) for way in self.ways for length in range(1, self.longest + 1))]
        way, length = max(choices, key=lambda one: self.costs.tokens_per_second(*one, batch, self.acceptance, self.steps))
        self.idle = 0 if length else self.idle + 1
        if self.idle > WAIT:  # the text may have become easier to guess
            self.idle, way, length = 0, self.ways[0], 1
        self.is_fused, self.length = way == "fused", length
        return length

    def prompt_masks(self, rows: int, tokens: int) -> int:
        length = self.masks(False, rows)
        return length if self.pays_in_prompt(length, rows, tokens, rows) else 0

    def pays_in_prompt(self, length: int, rows: int, tokens: int, batch: int) -> bool:
        """Whether masks in the forward of some prompts save more than they cost: all of its tokens go through the adapters then.
        batch: samples that are decoded, those of the prompts among them."""
        if not length:
            return False
        costs = self.costs
        cost = costs.seconds(rows * (tokens + length), True) - costs.seconds(rows * tokens, False)
        way = "fused" if self.is_fused else "separate"
        of_token = 1 / costs.tokens_per_second(way, length, batch, self.acceptance, self.steps)
        if self.is_fused or batch > rows:  # else nothing would be checked in the next forward
            saved = self.acceptance.expected(length) * of_token * rows / batch
        else:
            saved = costs.seconds(rows * (length + 1), True) - of_token
        return saved > cost

    def note(self, count: int, accepted: int) -> None:
        self.acceptance.note(count, accepted)


def _costs_of(model: Any, most: int) -> Costs:
    """The costs that are kept with a model; timed anew for longer forwards, and where it was moved or cast."""
    kind, most = (model.trunk.dtype, model.trunk.device, torch.get_num_threads()), min(most, MOST_TIMED)
    held = getattr(model, "_costs", None)
    if held is None or held[0] != kind or held[1] < most:
        model._costs = held = (kind, most, measured(model, most))
    return held[2]


def plan_of(decoder: BlockDecoder, settings: DecodeSettings) -> DraftPlan:
    """How a call drafts."""
    if settings.draft_length is not None:
        assert settings.drafting is not None
        return DraftPlan(settings.draft_length, settings.drafting)
    batch, steps = len(decoder.prompt.ids), settings.denoising_steps or 1
    return PayingPlan(decoder.model, decoder.config.block_size, settings.drafting, batch, steps)
