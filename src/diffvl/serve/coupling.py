"""Draws that belong to positions: what a sample draws does not depend on what was drafted, nor on who is decoded with it.

A token is drawn at position p as the v with the largest P(v) / E(v), where the E are exponential noise that the sample's seed
and p decide. That is a draw from P (of exponential times with rates P(v) the smallest comes first), and each position has noise
of its own, so the answer has the checking weights' own distribution. The draft is drawn with the same noise from the drafting
distribution, and is right where it is the same token: a draft can save a forward, and never changes what comes out (the coupling
of arXiv 2408.07978). It agrees a little less often than the rule of `judge_diffvl`, which draws anew for every draft; but there
the answer changes with the length of the drafts, which in a server goes by who else is asking.

Shapes: B batch, m tokens of a sample, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffvl.hub.judge_diffvl import Drafts, Judge, Sampling, Verdict, agreed
from diffvl.hub.settings_diffvl import DecodeSettings

SMALLEST = 1e-30  # of noise: nothing divided by nothing is no number


class PositionDraws:
    """The draws of one sample."""

    def __init__(self, settings: DecodeSettings, device: torch.device, config: Any) -> None:
        self._sampling, self._seed = Sampling(settings, device, config), settings.seed
        self._generator = torch.Generator(device=device)
        self._noise: dict[int, torch.Tensor] = {}  # by position; each is asked for twice, by the draft and by its check

    def tokens(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """The tokens [m] of logits [m, V] for the positions from `first` on; what was before it is not asked for again."""
        self._noise = {position: noise for position, noise in self._noise.items() if position >= first}
        kept = self._sampling.distributions(logits).kept
        noise = torch.stack([self._at(first + place, kept[0]) for place in range(len(kept))])
        return (kept / noise).argmax(-1)

    def _at(self, position: int, like: torch.Tensor) -> torch.Tensor:
        if position not in self._noise:
            named = hashlib.blake2b(f"{self._seed}/{position}".encode(), digest_size=8).digest()
            self._generator.manual_seed(int.from_bytes(named, "big") >> 1)
            self._noise[position] = torch.empty_like(like).exponential_(generator=self._generator).clamp_min(SMALLEST)
        return self._noise[position]


class CoupledJudge(Judge):
    """Draws and judges drafts of samples of which each chooses in its own way. draws: those of each row of the batch that is
    judged; None for one that takes the likeliest token."""

    def __init__(self, draws: Callable[[], Sequence[PositionDraws | None]], device: torch.device, config: Any) -> None:
        super().__init__(Sampling(DecodeSettings(), device, config))
        self._draws = draws

    def drafts(self, logits: torch.Tensor, first_B: torch.Tensor | None = None) -> Drafts:
        count_B = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        certainty = torch.ones(logits.shape[:2], device=logits.device)  # which nobody asks for: drafts of one forward, uncut
        return Drafts(self._tokens(logits, first_B), certainty, None, count_B)

    def verdict(self, logits: torch.Tensor, drafts: Drafts, first_B: torch.Tensor | None = None) -> Verdict:
        return agreed(self._tokens(logits, first_B), drafts)

    def _tokens(self, logits: torch.Tensor, first_B: torch.Tensor | None) -> torch.Tensor:
        ids = self.sampling.allowed(logits.flatten(0, 1)).argmax(-1).view(logits.shape[:2])
        draws = self._draws()
        if any(one is not None for one in draws):
            assert first_B is not None
            for row, (of_sample, first) in enumerate(zip(draws, first_B.tolist(), strict=True)):
                if of_sample is not None and logits.shape[1]:
                    ids[row] = of_sample.tokens(logits[row], first)
        return ids
