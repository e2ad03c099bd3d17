"""A layout as a stock trunk takes it: masks for each of its layer types, and no mask where nothing is hidden.

A denoising step without neighbours and windows hides nothing from anybody: its mask would be all ones. SDPA's fastest kernels,
and grouped key heads that are not copied for every query head, want no mask at all; but a stock trunk that is given none takes
its causal one. So a mask of one element goes through the trunk in the place of a 4-D mask, and `block_attention` takes it for
what it says. A trunk whose attention cannot be set gets a mask of ones, as a view of one element.

Shapes: B batch, Q queries, T tokens (keys).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .layout_diffvl import Layout

BLOCKS = "sdpa_blocks"  # the name of `block_attention` among transformers' attention functions


def attention_masks(text_config: Any, layout: Layout, queries: slice, dtype: torch.dtype, sees_all: bool = False) -> Any:
    """The layout as the stock trunk takes it: one 4-D mask [B, 1, Q, T], or one per layer type where the config has them.

    Bool masks for sdpa, additive floats of `dtype` for eager attention (which *adds* its mask: a bool there is silently
    wrong).

    Args:
        sees_all: the caller knows that the queries see all T tokens, which stand at positions 0 to T - 1; what no window or chunk
            hides then either is not masked (see `block_attention`).
    Raises:
        ValueError: for a layer type other than full, sliding or chunked attention, or another attention implementation.
    """
    implementation = text_config._attn_implementation
    if implementation not in ("sdpa", BLOCKS, "eager"):
        raise ValueError(f"attention implementation {implementation!r}: dense masks are for 'sdpa' and 'eager'")
    batch, tokens = layout.position.shape

    def mask(window: int | None, chunk: int | None) -> torch.Tensor:
        if sees_all and all(reach is None or reach >= tokens for reach in (window, chunk)):
            asking = len(range(*queries.indices(tokens)))
            return everything(implementation, (batch, asking, tokens), dtype, layout.position.device)
        allowed = layout.allowed(queries, window, chunk)[:, None]
        if implementation != "eager":
            return allowed
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)

    return for_layers(text_config, mask)


def for_layers(text_config: Any, make: Callable[[int | None, int | None], Any]) -> Any:
    """What `make(window, chunk)` gives for each layer type of the trunk, as a dict where its config lists layer types.

    Raises:
        ValueError: for a layer type other than full, sliding or chunked attention.
    """
    window = getattr(text_config, "sliding_window", None)
    chunk = getattr(text_config, "attention_chunk_size", None)
    limits = {"full_attention": (None, None), "sliding_attention": (window, None), "chunked_attention": (None, chunk)}
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        unknown = set(layer_types) - limits.keys()
        if unknown:
            raise ValueError(f"layer types {sorted(unknown)} cannot take block attention; known: {sorted(limits)}")
        return {kind: make(*limits[kind]) for kind in set(layer_types)}
    return make(*limits["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"])


@contextmanager
def masks_for(trunk: Any, masks: Any, masks_at: str) -> Iterator[Any]:
    """In the block the trunk is called with what this gives in the place of `masks`. A forward that takes one mask for all layers
    gets one; its text part gets them all."""
    if masks_at == "forward" or not isinstance(masks, dict):
        yield masks
        return

    def put(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return given, {**named, "attention_mask": masks}

    hook = trunk.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield next(iter(masks.values()))
    finally:
        hook.remove()


# --- no mask where nothing is hidden -----------------------------------------------------------------------------------------


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
    config = trunk.config.get_text_config(decoder=True)
    if config._attn_implementation != "sdpa" or not trunk._can_set_attn_implementation():
        yield
        return
    config._attn_implementation = BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def check_mask(mask: torch.Tensor, batch: int, tokens: int, total: int) -> None:
    """Raises ValueError unless a caller's mask is one column or one matrix for the tokens of the cache and of the call."""
    if mask.dim() == 2 and mask.shape[1] != total:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns for {total - tokens} cached and {tokens} new tokens")
    if mask.dim() != 2 and (mask.dim() != 3 or mask.shape[-2:] != (tokens, total)):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, expected [{batch}, {tokens}, {total}]")


class GivenMask(Layout):
    """A caller's own [B, T, K] mask in the place of the attention rule; windows still apply, and the tokens of an image still see
    each other where the model wants it, of which a caller knows nothing."""

    def __init__(self, layout: Layout, mask: torch.Tensor) -> None:
        super().__init__(**vars(layout))
        self.mask = mask

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        plain = replace(self.plain, image_attention="causal")
        everything = replace(plain, block=torch.zeros_like(self.block), context="block").allowed(queries, window, chunk)
        given = everything & self.mask
        if self.span is None:
            return given
        return given | (self.plain.allowed(queries, window, chunk) & ~plain.allowed(queries, window, chunk))

    @property
    def plain(self) -> Layout:
        """The same tokens without the caller's mask."""
        return self.with_rows(self.rows)
