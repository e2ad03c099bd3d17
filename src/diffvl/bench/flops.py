"""Model FLOPs of each form, and what the machine's matrix products reach: their quotient is the MFU.

One step (forward and backward, 3 times the forward) of a trunk with P weights in its layers, width H, vocabulary V, N layers
and attention of width A (heads times their width) takes

    3 * (2 * P * tokens + 2 * H * V * rows + 4 * A * N * pairs)

FLOPs, where `tokens` go through the trunk, `rows` through the head, and `pairs` are the (query, key) pairs that the attention
rule allows. Each form is counted as what it is: doubling the sequence raises its count (and lowers its tokens per second),
computing masked pairs lowers its MFU.
"""

import time

import torch

from diffvl.bench.forms import TrunkSize, Work, full_length_noise
from diffvl.objective.losses import Draw

FORMULA = "3 * (2 P tokens + 2 H V rows + 4 A N pairs), pairs as the attention rule allows"
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
PEAK_ROUNDS = 10


def step_flops(form: str, size: TrunkSize, work: Work, draw: Draw) -> int:
    """Model FLOPs of one forward and backward of a form."""
    tokens, rows, pairs = _counts(form, work, draw)
    attention = size.heads * size.head_dim
    per_layer = size.hidden * (2 * attention + 2 * size.kv_heads * size.head_dim) + 3 * size.hidden * size.intermediate
    forward = (
        2 * per_layer * size.layers * tokens + 2 * size.hidden * size.vocabulary * rows + 4 * attention * size.layers * pairs
    )
    return 3 * forward


def _counts(form: str, work: Work, draw: Draw) -> tuple[int, int, int]:
    """Tokens through the trunk, rows through the head, pairs of the attention rule."""
    length, answer, block_size = work.shape.length, work.shape.answer, work.objective.block_size
    if form in ("ar", "ar_answer_logits"):
        return length, length if form == "ar" else answer, length * (length + 1) // 2
    whole = length + -length % block_size
    if form == "published":
        noisy, rows, clean = whole, whole, whole
    else:
        noisy = whole - (length - answer) // block_size * block_size
        rows, clean = int(full_length_noise(work, draw)[0].sum()), length
    causal = work.objective.context == "causal"
    seen_by_clean = (place + 1 if causal else min((place // block_size + 1) * block_size, clean) for place in range(clean))
    seen_by_noisy = ((place // block_size + 1) * block_size for place in range(whole - noisy, whole))
    return clean + noisy, rows, sum(seen_by_clean) + sum(seen_by_noisy)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of several square matrix products."""
    side = PEAK_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(PEAK_ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
