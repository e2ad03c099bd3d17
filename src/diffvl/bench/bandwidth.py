"""The floor under a forward at batch 1: every weight is read once, and memory gives so many bytes a second."""

import time
from collections.abc import Callable
from typing import Any

import torch

from diffvl.bench.flops import synchronize

BUFFER_BYTES = {"cpu": 2**28, "cuda": 2**32}
ROUNDS = 10


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second: the best of reading a large buffer (a sum) and of copying it (counted twice)."""
    source = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reading = size / _best(source.sum, device)
    copying = 2 * size / _best(lambda: target.copy_(source), device)
    return max(reading, copying)


def _best(work: Callable[[], Any], device: torch.device) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def streamed_bytes(trunk: Any) -> int:
    """Bytes of weights that one forward with a head reads: all of them, without an input embedding that the head does not share
    (of that only the rows of the tokens are read)."""
    head, embedding = trunk.get_output_embeddings().weight, trunk.get_input_embeddings().weight
    total = sum(parameter.numel() * parameter.element_size() for parameter in trunk.parameters())
    return total if head is embedding else total - embedding.numel() * embedding.element_size()
