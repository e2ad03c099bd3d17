"""Attention of decoding: transformers' own SDPA, without a mask where a block sees everything before it.

A denoising step without neighbours and windows hides nothing from anybody: its mask would be all ones. SDPA's fastest kernels,
and grouped key heads that are not copied for every query head, want no mask at all; but a stock trunk that is given none takes
its causal one. So a mask of one element goes through the trunk in the place of a 4-D mask, and the attention function takes it
for what it says. A trunk whose attention cannot be set gets a mask of ones, as a view of one element.

Shapes: B batch, H heads, Q queries, K keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "sdpa_blocks"


def everything(implementation: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The mask that hides nothing, for a `shape` of (B, Q, K): [1, 1, 1, 1] for `block_attention`; else [B, 1, Q, K], of ones, or
    of zeros for eager attention, which adds its mask."""
    if implementation == "eager":
        one = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
    else:
        one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    batch, queries, keys = shape
    return one if implementation == BLOCKS else one.expand(batch, 1, queries, keys)


def block_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers. Query [B, H, Q, head], key and value [B, KV heads, K, head] -> [B, Q, H, head]."""
    if attention_mask is not None and attention_mask.numel() == 1:
        attention_mask, is_causal = None, False
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)


AttentionInterface.register(BLOCKS, block_attention)
AttentionMaskInterface.register(BLOCKS, sdpa_mask)


@contextmanager
def block_kernels(trunk: Any) -> Iterator[None]:
    """In the block a trunk on SDPA leaves out masks that hide nothing, if its attention can be set."""
    config = trunk.config
    if config._attn_implementation != "sdpa" or not trunk._can_set_attn_implementation():
        yield
        return
    config._attn_implementation = BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
