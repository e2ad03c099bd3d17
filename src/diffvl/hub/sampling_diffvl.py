"""Which token a masked position gets, and which positions settle in a denoising step.

Shapes: B batch, D block size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

STRATEGIES = ("low_confidence_static", "low_confidence_dynamic")


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
    do_sample = asked.do_sample
    if do_sample is None:
        do_sample = bool(asked.temperature) if asked.temperature is not None else bool(getattr(settings, "do_sample", False))
    if not do_sample:
        if asked.temperature:
            raise ValueError(f"temperature {asked.temperature} has no effect with do_sample=False: leave one of them out")
        if asked.top_k is not None or asked.top_p is not None:
            raise ValueError("top_k and top_p have no effect at temperature 0: give a temperature, or leave them out")
        return Sampling(False, asked.temperature or 0.0)
    names = ("temperature", "top_k", "top_p")
    said = {name: getattr(asked, name) if getattr(asked, name) is not None else getattr(settings, name, None) for name in names}
    if said["temperature"] is None:
        said["temperature"] = 1.0
    if said["temperature"] == 0:
        raise ValueError("do_sample=True needs a temperature above 0")
    return Sampling(True, **said)


def never_predicted(config: Any, vocabulary: int, device: torch.device) -> torch.Tensor:
    """bool [V]: the mask token, the image token and the table's padding rows."""
    forbidden = torch.arange(vocabulary, device=device) >= config.vocabulary_size
    forbidden[[config.mask_token_id, config.image_token_id]] = True
    return forbidden


def choose(confidence: torch.Tensor, masked: torch.Tensor, quota: torch.Tensor, threshold: float | None) -> torch.Tensor:
    """Which masked tokens settle in this step, bool [B, D].

    Args:
        confidence: [B, D]; masked: True where a token is still open; quota: [B], clamped to the masks that are left.
        threshold: None takes the `quota` most confident (low_confidence_static); a number takes all that are more confident
            than it, if these are at least `quota` (low_confidence_dynamic).
    """
    score = confidence.masked_fill(~masked, -1.0)
    rank = torch.argsort(torch.argsort(score, dim=1, descending=True, stable=True), dim=1, stable=True)
    chosen = (rank < quota[:, None]) & masked
    if threshold is not None:
        sure = (score > threshold) & masked
        chosen = torch.where((sure.sum(1) >= quota)[:, None], sure, chosen)
    return chosen


def picker(sampling: Sampling, seed: int, device: torch.device, config: Any) -> Any:
    """logits [B, D, V] -> token ids [B, D] and their probability before top-k and top-p (SDAR's confidence)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    # The warpers look at the scores alone.
    no_ids: Any = None
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    heat = TemperatureLogitsWarper(sampling.temperature) if sampling.temperature else None

    def pick(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = logits.shape[:2]
        flat = logits.flatten(0, 1).masked_fill(never_predicted(config, logits.shape[-1], logits.device), float("-inf"))
        if heat is None:
            probability, ids = flat.softmax(-1).max(-1)
            return ids.view(shape), probability.view(shape)
        flat = heat(no_ids, flat)
        kept = warpers(no_ids, flat).softmax(-1)
        ids = torch.multinomial(kept, 1, generator=generator)
        return ids.view(shape), flat.softmax(-1).gather(1, ids).view(shape)

    return pick


def check_settings(steps: int, block_size: int, remasking: str, threshold: float | None, temperature: float) -> None:
    """Raises ValueError if the settings of `generate` do not fit together or do not fit the block size."""
    if not 1 <= steps <= block_size:
        raise ValueError(f"denoising_steps is {steps}, expected 1 to the block size, {block_size}")
    if remasking not in STRATEGIES:
        raise ValueError(f"remasking is {remasking!r}, expected one of {', '.join(STRATEGIES)}")
    if threshold is not None and remasking != "low_confidence_dynamic":
        raise ValueError("threshold has no effect with low_confidence_static: use remasking='low_confidence_dynamic'")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected 0 to 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, expected 0 or more")
