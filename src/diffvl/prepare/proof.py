"""Numeric proofs on a loaded model: AR parity, and that masks and positions really steer its attention.

Shapes: L tokens of the probe, D block size of the probe, V vocabulary.
"""

import math
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from diffvl.errors import UnsupportedModelError
from diffvl.hub.layout_diffvl import Layout, attention_masks

PROBE_LENGTH = 24
PROBE_BLOCK = 4
# Errors of families that pass lie below 1e-5 of the logits' spread, errors of those that fail above 0.5.
TOLERANCE = 1e-3


def probe_ids(vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [2, L], the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (2, PROBE_LENGTH), generator=generator)


@torch.no_grad()
def native_logits(trunk: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What the stock model itself says, [2, L, V] in fp32."""
    return trunk(input_ids=ids, use_cache=False).logits.float()


def largest(errors: Iterable[float], default: float = 0.0) -> float:
    """The largest error, nan where any is nan: Python's own max loses a nan that does not stand first."""
    errors = list(errors)
    return next((error for error in errors if math.isnan(error)), max(errors, default=default))


def smallest(changes: Iterable[float]) -> float:
    """The smallest change, nan where any is nan."""
    return -largest(-change for change in changes)


def spread(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference in units of the reference's standard deviation; nan, which passes no `not error <= limit`, where a logit
    is no finite number."""
    return float(difference.abs().max() / reference.std().clamp_min(1e-12))


@torch.no_grad()
def check_block_attention(trunk: PreTrainedModel, vocabulary: int, mask_token_id: int) -> float:
    """Runs clean tokens and one noisy block through the trunk and compares with what block diffusion demands.

    Returns:
        the largest error, in standard deviations of the logits.
    Raises:
        UnsupportedModelError: if the clean stream differs from the AR model, the noisy block sees its clean copy or later
            tokens, its tokens do not see each other, or any logit is no finite number.
    """
    ids = probe_ids(vocabulary)[:1]
    reference = native_logits(trunk, ids)
    base = _noisy_pass(trunk, ids, mask_token_id)
    clean_error = spread(base[:, :PROBE_LENGTH] - reference, reference)
    other = ids.clone()
    other[:, -PROBE_BLOCK:] = (other[:, -PROBE_BLOCK:] + 1) % vocabulary
    leak_error = spread(_noisy_pass(trunk, other, mask_token_id)[:, PROBE_LENGTH:] - base[:, PROBE_LENGTH:], reference)
    last = probe_ids(vocabulary, seed=1)[0, -1]
    changed = _noisy_pass(trunk, ids, mask_token_id, last_noisy=int(last))
    both_ways = spread(changed[:, PROBE_LENGTH] - base[:, PROBE_LENGTH], reference)
    kind = trunk.config.model_type
    if not clean_error <= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: with explicit masks the logits differ from its own by {clean_error:.2g} std")
    if not leak_error <= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: a noisy block sees its own clean copy (its logits move by {leak_error:.2g} std)")
    if not both_ways >= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: tokens of a noisy block do not see each other: the model ignores the mask")
    return largest([clean_error, leak_error])


def _noisy_pass(trunk: PreTrainedModel, ids: torch.Tensor, mask_id: int, last_noisy: int | None = None) -> torch.Tensor:
    """Logits [1, L + D, V] of the clean tokens and a noisy copy of their last block, all masked but for its last token."""
    index = torch.arange(PROBE_LENGTH)
    position = torch.cat([index, index[-PROBE_BLOCK:]])[None]
    noisy = torch.arange(position.shape[1])[None] >= PROBE_LENGTH
    layout = Layout(
        position=position,
        block=position // PROBE_BLOCK,
        noisy=noisy,
        valid=torch.ones_like(noisy),
        document=torch.zeros_like(position),
        context="causal",
    )
    block = torch.full((1, PROBE_BLOCK), mask_id)
    if last_noisy is not None:
        block[0, -1] = last_noisy
    masks = attention_masks(trunk.config, layout, slice(None), torch.float32)
    return trunk(input_ids=torch.cat([ids, block], 1), attention_mask=masks, position_ids=position).logits.float()
