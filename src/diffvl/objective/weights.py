"""The loss of masked tokens: weighted cross-entropy, normalised by answer tokens.

Weights: "1/t" (BD3-LM, arXiv 2503.09573, Eq. 8; DiffusionVL; one over the token's own masking probability), "effective"
(SDAR-VL's effective mask ratio scaling, arXiv 2512.14068, Eq. 6 and 7: one over the *realised* mask ratio of the block, over
its eligible tokens), "none". What each of them is an unbiased estimate of: docs/objective.md.

Shapes: M masked tokens, R noisy tokens of a row, B batch, V vocabulary.
"""

import torch
from torch.nn import functional


def block_weights(
    kind: str, p_BR: torch.Tensor, masked_BR: torch.Tensor, eligible_BR: torch.Tensor, block_BR: torch.Tensor
) -> torch.Tensor:
    """Loss weight of every noisy token, [B, R]; only masked ones are used.

    Args:
        p_BR: the probability with which each token was masked: t of its block, unless masking is biased by position.
        block_BR: block index, counted within the row.
    """
    if kind == "none":
        return torch.ones_like(p_BR)
    if kind == "1/t":
        return 1.0 / p_BR
    blocks = int(block_BR.max()) + 1 if block_BR.numel() else 0
    shape = (len(block_BR), blocks)
    masked = torch.zeros(shape, dtype=p_BR.dtype, device=p_BR.device).scatter_add_(1, block_BR, masked_BR.to(p_BR.dtype))
    eligible = torch.zeros(shape, dtype=p_BR.dtype, device=p_BR.device).scatter_add_(1, block_BR, eligible_BR.to(p_BR.dtype))
    return (eligible / masked.clamp_min(1.0)).gather(1, block_BR)


def token_cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor, forbidden_V: torch.Tensor) -> torch.Tensor:
    """Computes the cross-entropy of each row in fp32, [M]; forbidden tokens (the mask token, padding rows of the table) get no
    probability."""
    return functional.cross_entropy(logits_MV.float().masked_fill(forbidden_V, float("-inf")), targets_M, reduction="none")
