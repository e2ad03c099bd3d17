"""Which token a masked position gets, and which positions settle in a denoising step.

Shapes: B batch, D block size, M masked tokens of the batch, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

COLDEST, HOTTEST = 1e-4, 1e4  # temperatures between which logits stay numbers
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy")


@dataclass(frozen=True)
class Sampling:
    """As in transformers; None is "not said"."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def sampling_of(settings: Any, asked: Sampling) -> Sampling:
    """The caller's words on top of a GenerationConfig; greedy decoding comes out as temperature 0.

    Raises:
        ValueError: if a setting would have no effect.
    """
    _check_ranges(asked)
    do_sample = asked.do_sample
    if do_sample is None:
        do_sample = bool(asked.temperature) if asked.temperature is not None else bool(getattr(settings, "do_sample", False))
    if not do_sample:
        configured = getattr(settings, "temperature", None)
        if asked.do_sample is asked.temperature is None and configured not in (None, 0, 1):
            raise ValueError(f"temperature {configured} (in generation_config) has no effect without do_sample=True there")
        if asked.temperature not in (None, 0, 1):
            raise ValueError(f"temperature {asked.temperature} has no effect with do_sample=False: leave one of them out")
        if asked.top_k not in (None, 0) or asked.top_p not in (None, 1):
            raise ValueError("top_k and top_p have no effect at temperature 0: give a temperature, or leave them out")
        return Sampling(False, 0.0)
    names = ("temperature", "top_k", "top_p")
    said = {name: getattr(asked, name) if getattr(asked, name) is not None else getattr(settings, name, None) for name in names}
    if said["temperature"] is None:
        said["temperature"] = 1.0
    if said["temperature"] == 0:
        raise ValueError("do_sample=True needs a temperature above 0")
    sampling = Sampling(True, **said)
    _check_ranges(sampling)
    return sampling


def _check_ranges(sampling: Sampling) -> None:
    """Raises ValueError for what no probabilities come out of; 0 and 1 are the neutral values of top_k and top_p."""
    if (heat := sampling.temperature) is not None and (not 0 <= heat <= HOTTEST or 0 < heat < COLDEST):
        raise ValueError(f"temperature is {heat}, expected 0 (the likeliest token) or {COLDEST:g} to {HOTTEST:g}")
    if sampling.top_k is not None and sampling.top_k < 0:
        raise ValueError(f"top_k is {sampling.top_k}, expected 0 (all tokens) or more")
    if sampling.top_p is not None and not 0 <= sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected 0 to 1")


def never_predicted(config: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [V]: the mask token, the image token and the table's padding rows."""
    forbidden = torch.arange(vocabulary, device=device) >= config.vocabulary_size
    forbidden[[config.mask_token_id, config.image_token_id]] = True
    return forbidden


@dataclass(frozen=True)
class Prediction:
    """What the sampler makes of masked tokens, each [M]: the token, its probability before top-k and top-p (SDAR's confidence),
    and the entropy of that distribution in nats, where the remasking rule asks for it."""

    ids: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor | None


@dataclass(frozen=True)
class Remasking:
    """Which predictions are kept in a denoising step, and which are masked again.

    strategy: "low_confidence_static" (the quota's most confident), "low_confidence_dynamic" (all above `threshold`, at least the
    quota's), "sequential" (from the left) or "entropy" (the least uncertain whose entropies add up to no more than
    `entropy_budget`, at least the quota's; the rule of EB-Sampler, arXiv 2505.24857, with the quota as its floor).
    """

    steps: int
    strategy: str = "low_confidence_static"
    threshold: float | None = None
    entropy_budget: float | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether exactly the quota settles in every step, so that nobody has to look how many did."""
        return self.strategy in ("low_confidence_static", "sequential")

    def quota(self, count: Any, step: int) -> Any:
        """Tokens that must settle in a step of a block with so many masks (a number, or a tensor of numbers); the remainder goes
        to the first steps, as in SDAR."""
        return count // self.steps + (step < count % self.steps)


def settled(
    remasking: Remasking,
    quota_B: torch.Tensor,
    masked_BD: torch.Tensor,
    confidence_BD: torch.Tensor,
    entropy_BD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which masked tokens settle in this step, bool [B, D]; never more than are masked, and never none where one must. Entropies
    are needed by the strategy of that name."""
    if remasking.strategy == "sequential":
        score = -torch.arange(masked_BD.shape[1], device=masked_BD.device).expand_as(masked_BD).float()
    elif remasking.strategy == "entropy":
        assert entropy_BD is not None
        score = -entropy_BD
    else:
        score = confidence_BD
    score = score.masked_fill(~masked_BD, float("-inf"))
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    rank = torch.argsort(order, dim=1, stable=True)
    chosen = (rank < quota_B[:, None]) & masked_BD
    if remasking.strategy == "low_confidence_dynamic":
        assert remasking.threshold is not None
        chosen = chosen | ((confidence_BD > remasking.threshold) & masked_BD)
    elif remasking.strategy == "entropy":
        assert remasking.entropy_budget is not None and entropy_BD is not None
        spent = entropy_BD.masked_fill(~masked_BD, float("inf")).gather(1, order).cumsum(1).gather(1, rank)
        chosen = chosen | ((spent <= remasking.entropy_budget) & masked_BD)
    return chosen


def picker(sampling: Sampling, seed: int, device: torch.device, config: Any, with_entropy: bool) -> Any:
    """logits [M, V] -> Prediction; entropies, which cost another pass over all logits, only where they are asked for."""
    forbidden: dict[int, torch.Tensor] = {}  # by vocabulary, which the first logits tell
    generator = torch.Generator(device=device).manual_seed(seed)
    # The warpers look at the scores alone.
    no_ids: Any = None
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    heat = TemperatureLogitsWarper(sampling.temperature) if sampling.temperature else None

    def pick(logits: torch.Tensor) -> Prediction:
        vocabulary = logits.shape[-1]
        if vocabulary not in forbidden:
            forbidden[vocabulary] = never_predicted(config, vocabulary, logits.device)
        logits = logits.masked_fill(forbidden[vocabulary], float("-inf"))
        if heat is not None:
            logits = heat(no_ids, logits)
        distribution = logits.softmax(-1)
        entropy = torch.special.entr(distribution).sum(-1) if with_entropy else None
        if heat is None:
            confidence, ids = distribution.max(-1)
        else:
            kept = warpers(no_ids, logits).softmax(-1) if len(warpers) else distribution
            ids = torch.multinomial(kept, 1, generator=generator)[:, 0] if len(kept) else kept.new_empty(0, dtype=torch.long)
            confidence = distribution.gather(1, ids[:, None])[:, 0]
        return Prediction(ids, confidence, entropy)

    return pick


DEFAULT_THRESHOLD = 0.9
DEFAULT_BUDGET = 0.35  # nats, as SDAR's entropy_bounded


def remasking_of(
    strategy: str, steps: int | None, block_size: int, threshold: float | None, entropy_budget: float | None
) -> Remasking:
    """The remasking settings of `generate`, with defaults.

    Raises:
        ValueError: if they do not fit together, or not the block size.
    """
    steps = block_size if steps is None else steps
    if not 1 <= steps <= block_size:
        raise ValueError(f"denoising_steps is {steps}, expected 1 to the block size, {block_size}")
    if strategy not in STRATEGIES:
        raise ValueError(f"remasking is {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if threshold is not None and strategy != "low_confidence_dynamic":
        raise ValueError(f"threshold has no effect with {strategy}: use remasking='low_confidence_dynamic'")
    if entropy_budget is not None and strategy != "entropy":
        raise ValueError(f"entropy_budget has no effect with {strategy}: use remasking='entropy'")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected 0 to 1")
    if entropy_budget is not None and entropy_budget < 0:
        raise ValueError(f"entropy_budget is {entropy_budget}, expected 0 or more")
    if strategy == "low_confidence_dynamic" and threshold is None:
        threshold = DEFAULT_THRESHOLD
    if strategy == "entropy" and entropy_budget is None:
        entropy_budget = DEFAULT_BUDGET
    return Remasking(steps, strategy, threshold, entropy_budget)
