"""Accept or resample: drafts are kept or replaced so that what comes out has the checking weights' own distribution.

The rule of speculative decoding (arXiv 2211.17192, arXiv 2302.01318): a draft x that was drawn from q is kept with probability
min(1, p(x) / q(x)); the first that is not kept is replaced by a draw from (p - q)+, normalised; behind a draft that is kept whole
stands a draw from p. Greedily that is: keep what is likeliest, replace the first that is not. Temperature, top-k and top-p, and
what is never predicted, apply to p and q alike.

It is exact if each draft is drawn from its q whatever the drafts before it became; so nothing that looks at a drawn token may
decide whether it is checked. `certainty` is of a distribution, not of what was drawn from it: drafts may be cut by it.

Shapes: B batch, m drafts of a sample, V vocabulary, [...] any.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .configuration_diffvl import never_predicted
from .settings_diffvl import DecodeSettings


@dataclass(frozen=True)
class Distributions:
    """plain: probabilities [M, V] at the given temperature. kept: the same after top-k and top-p, from which tokens are drawn."""

    plain: torch.Tensor
    kept: torch.Tensor


class Sampling:
    """Logits -> distributions -> tokens, by the settings of a call; one generator for all of its draws."""

    def __init__(self, settings: DecodeSettings, device: torch.device, config: Any) -> None:
        self.is_greedy, self.config = settings.is_greedy, config
        self.generator = torch.Generator(device=device).manual_seed(settings.seed)
        self._forbidden: dict[int, torch.Tensor] = {}  # by vocabulary, which the first logits tell
        self._warpers = LogitsProcessorList()
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(settings.top_p))
        self._temperature = None if settings.is_greedy else TemperatureLogitsWarper(float(settings.temperature))

    def allowed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [M, V], with minus infinity at what is never predicted."""
        vocabulary = logits.shape[-1]
        if vocabulary not in self._forbidden:
            self._forbidden[vocabulary] = never_predicted(self.config, vocabulary, logits.device)
        return logits.masked_fill(self._forbidden[vocabulary], float("-inf"))

    def distributions(self, logits: torch.Tensor) -> Distributions:
        """Of logits [M, V]."""
        no_ids: Any = None  # the warpers look at the scores alone
        logits = self.allowed(logits)
        if self._temperature is not None:
            logits = self._temperature(no_ids, logits)
        plain = logits.softmax(-1)
        warped = self._temperature is not None and len(self._warpers)
        return Distributions(plain, self._warpers(no_ids, logits).softmax(-1) if warped else plain)

    def draw(self, kept: torch.Tensor) -> torch.Tensor:
        """A token of each distribution [M, V], int64 [M]."""
        if not len(kept):
            return kept.new_empty(0, dtype=torch.long)
        return torch.multinomial(kept, 1, generator=self.generator)[:, 0]

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=device)


@dataclass(frozen=True)
class Drafts:
    """ids: drafted tokens [B, m]. certainty: the largest probability of each one's distribution, [B, m]. kept: the
    distributions that they were drawn from, [B, m, V]; None where they are the likeliest tokens. count_B: how many of each sample
    are checked."""

    ids: torch.Tensor
    certainty: torch.Tensor
    kept: torch.Tensor | None
    count_B: torch.Tensor

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "Drafts":
        nothing = torch.zeros(batch, 0, device=device)
        return cls(nothing.long(), nothing, None, torch.zeros(batch, dtype=torch.long, device=device))

    def of_width(self, width: int) -> "Drafts":
        """The first `width` columns; where there are fewer, further ones that nobody checks."""
        kept, more = self.kept, width - self.ids.shape[1]
        if more > 0:
            assert kept is None
            ids, certainty = (torch.nn.functional.pad(one, (0, more)) for one in (self.ids, self.certainty))
            return Drafts(ids, certainty, None, self.count_B)
        kept = None if kept is None else kept[:, :width]
        return Drafts(self.ids[:, :width], self.certainty[:, :width], kept, self.count_B.clamp_max(width))

    def selected(self, keep: torch.Tensor) -> "Drafts":
        """Those of some samples."""
        kept = None if self.kept is None else self.kept[keep]
        return Drafts(self.ids[keep], self.certainty[keep], kept, self.count_B[keep])


@dataclass(frozen=True)
class Verdict:
    """accepted_B: how many drafts of each sample are kept. following_B: the token behind them. Both int64 [B]."""

    accepted_B: torch.Tensor
    following_B: torch.Tensor


def note_places(reached: list[Any], agreed: list[Any], count: int, accepted: int) -> int:
    """Counts a draft of `count` tokens of which the first `accepted` were kept, in place, and returns the places it was checked
    at: where all before it had been kept (`reached`), and where it was kept too (`agreed`)."""
    checked = min(count, accepted + 1)
    for place in range(checked):
        if place == len(reached):
            reached.append(0)
            agreed.append(0)
        reached[place] += 1
        agreed[place] += place < accepted
    return checked


def agreed(says: torch.Tensor, drafts: Drafts) -> Verdict:
    """Keeps drafts up to the first that is not what the checking weights say, int64 [B, m + 1]; what they say there follows."""
    most = drafts.ids.shape[1]
    place = torch.arange(most, device=says.device)[None]
    agrees = (drafts.ids == says[:, :most]) & (place < drafts.count_B[:, None])
    accepted_B = agrees.long().cumprod(1).sum(1)
    return Verdict(accepted_B, says.gather(1, accepted_B[:, None])[:, 0])


class Judge:
    """Draws drafts, and judges them. `first_B`, int64 [B], is the position of the first token that is drawn or judged of each
    sample: nothing to this judge, but there are others."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def drafts(self, logits: torch.Tensor, first_B: torch.Tensor | None = None) -> Drafts:
        """Drafts of logits [B, m, V], all of which are checked."""
        batch, count = logits.shape[:2]
        found = self.sampling.distributions(logits.flatten(0, 1))
        certainty, likeliest = found.plain.max(-1)
        greedy = self.sampling.is_greedy
        ids = likeliest if greedy else self.sampling.draw(found.kept)
        kept = None if greedy else found.kept.view(batch, count, -1)
        all_B = torch.full((batch,), count, device=logits.device)
        return Drafts(ids.view(batch, count), certainty.view(batch, count), kept, all_B)

    def verdict(self, logits: torch.Tensor, drafts: Drafts, first_B: torch.Tensor | None = None) -> Verdict:
        """Judges drafts by the logits [B, m + 1, V] of the tokens that they may be, and of the token behind them."""
        if self.sampling.is_greedy:
            return agreed(self.sampling.allowed(logits.flatten(0, 1)).argmax(-1).view(logits.shape[:2]), drafts)
        most = drafts.ids.shape[1]
        place = torch.arange(most, device=logits.device)[None]
        p = self.sampling.distributions(logits.flatten(0, 1)).kept.view(logits.shape)
        accepted_B = torch.zeros(len(p), dtype=torch.long, device=p.device)
        if drafts.kept is not None and most:
            named = drafts.ids[..., None]
            of_p, of_q = p[:, :most].gather(2, named)[..., 0], drafts.kept.gather(2, named)[..., 0]
            keeps = self.sampling.uniform((len(p), most), p.device) * of_q < of_p
            accepted_B = (keeps & (place < drafts.count_B[:, None])).long().cumprod(1).sum(1)
        return Verdict(accepted_B, self.sampling.draw(_remaining(p, drafts, accepted_B)))


def _remaining(p: torch.Tensor, drafts: Drafts, accepted_B: torch.Tensor) -> torch.Tensor:
    """What the token behind the accepted drafts is drawn from, [B, V]: (p - q)+ where a draft was refused there, else p."""
    row = torch.arange(len(p), device=p.device)
    at = p[row, accepted_B]
    if drafts.kept is None or not drafts.ids.shape[1]:
        return at
    refused = accepted_B < drafts.count_B
    q = drafts.kept[row, accepted_B.clamp_max(drafts.ids.shape[1] - 1)]
    rest = (at - q).clamp_min(0)
    # Equal but for rounding: then a refusal has (nearly) no probability, and p is as good.
    usable = refused & (rest.sum(-1) > 0)
    return torch.where(usable[:, None], rest, at)
