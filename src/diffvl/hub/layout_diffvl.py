"""Who stands where and who sees whom: the one place that knows, for training, evaluation and decoding.

A sample is a clean stream (the chat text) and a noisy stream (the blocks that hold answer tokens, with the position ids of
their clean counterparts; an answer that is not to be trained on stands in the clean stream only). Every token is one row of
`Layout`; the attention rule is written once, in `attends` (BD3-LM, arXiv 2503.09573, section 3). The leak it guards against: a
noisy token must never see the clean copy of its own block, nor anything later.

Order is not rotation. Causality, windows and chunks count `Layout.position`, the index in the sample; the trunk rotates by
`rope_ids`, a tensor beside the layout.

A denoising step without neighbours and windows hides nothing from anybody: its mask would be all ones. SDPA's fastest kernels,
and grouped key heads that are not copied for every query head, want no mask at all; but a stock trunk that is given none takes
its causal one. So a mask of one element goes through the trunk in the place of a 4-D mask, and `block_attention` takes it for
what it says. A trunk whose attention cannot be set gets a mask of ones, as a view of one element.

Shapes: B batch, L clean length, R noisy length, T = all tokens of a row, Q queries, K keys, H heads. Bool masks: True = may be
attended.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "sdpa_blocks"  # the name of `block_attention` among transformers' attention functions


@dataclass
class Layout:
    """Per-token rows, each [B, T].

    position: index in the sample; the order of tokens. block: index of the block, rising along a sample. noisy: 0 (or False) in
    the clean stream, the number of the noisy copy in a noisy one (True where there is one copy only). valid: False for padding.
    document: which packed sample a token belongs to.
    context: "block" (clean tokens see their whole block) or "causal" (token by token).
    """

    position: torch.Tensor
    block: torch.Tensor
    noisy: torch.Tensor
    valid: torch.Tensor
    document: torch.Tensor
    context: str

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "context"}

    def joined(self, after: "Layout") -> "Layout":
        """This layout followed by another along T."""
        rows = {name: torch.cat([row, after.rows[name]], dim=1) for name, row in self.rows.items()}
        return Layout(**rows, context=self.context)

    def padded(self, length: int) -> "Layout":
        """This layout followed by padding, up to a length."""
        short = length - self.position.shape[1]
        rows = {name: torch.nn.functional.pad(row, (0, short)) for name, row in self.rows.items()}
        return Layout(**rows, context=self.context)

    def part(self, tokens: slice) -> "Layout":
        """Some of the tokens."""
        return Layout(**{name: row[:, tokens] for name, row in self.rows.items()}, context=self.context)

    def selected(self, keep: torch.Tensor) -> "Layout":
        """Some of the samples."""
        return Layout(**{name: row[keep] for name, row in self.rows.items()}, context=self.context)

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        """The attention rule, [B, Q, T].

        Args:
            queries: which rows ask; all rows answer.
            window: sliding window in tokens, as the stock model counts it (a token sees itself and window - 1 before).
            chunk: size of attention chunks in tokens.
        """
        q = {name: row[:, queries, None] for name, row in self.rows.items()}
        k = {name: row[:, None, :] for name, row in self.rows.items()}
        allowed = attends(q, k, self.context, window, chunk)
        # A padding query with nothing to see would be a softmax over nothing; it sees itself, and nobody sees it.
        index = torch.arange(self.position.shape[1], device=self.position.device)
        itself = index[queries, None] == index[None, :]
        return allowed | (itself[None] & ~q["valid"])


def attends(
    q: dict[str, torch.Tensor], k: dict[str, torch.Tensor], context: str, window: int | None = None, chunk: int | None = None
) -> torch.Tensor:
    """Whether queries with the rows `q` may attend to keys with the rows `k`: the attention rule itself, elementwise over
    whatever shapes broadcast, so that dense masks, FlexAttention kernels and the decoder all ask the same function."""
    q_noisy, k_noisy = q["noisy"].bool(), k["noisy"].bool()
    order = "position" if context == "causal" else "block"
    sees_clean = ~k_noisy & torch.where(q_noisy, k["block"] < q["block"], k[order] <= q[order])
    sees_noisy = k_noisy & (k["noisy"] == q["noisy"]) & (k["block"] == q["block"])
    allowed = (sees_clean | sees_noisy) & (k["document"] == q["document"]) & k["valid"]
    if window is not None:
        allowed = allowed & (k["position"] > q["position"] - window)
    if chunk is not None:
        q_chunk = torch.div(q["position"], chunk, rounding_mode="floor")
        allowed = allowed & (torch.div(k["position"], chunk, rounding_mode="floor") == q_chunk)
    return allowed


def rope_ids(position: torch.Tensor) -> torch.Tensor:
    """Rotary position ids of tokens at these indices of their samples, [B, T]: what a trunk takes as `position_ids`. Trunks with
    one rotary axis count the tokens. One with several (M-RoPE) would have [axes, B, T] here, and the same `Layout`."""
    return position


def clean_layout(block_BL: torch.Tensor, valid_BL: torch.Tensor, context: str) -> Layout:
    """Layout of a clean stream alone; positions count the valid tokens of each row from 0."""
    position = (valid_BL.long().cumsum(1) - 1).clamp_min(0)
    return Layout(position, block_BL, torch.zeros_like(valid_BL), valid_BL, torch.zeros_like(position), context)


def image_rows(is_image: torch.Tensor) -> torch.Tensor:
    """Counts out which image token each placeholder shows, over the whole batch in reading order; -1 for text.

    Args:
        is_image: True at placeholders, of any shape; the result has it too.
    """
    return torch.where(is_image, is_image.flatten().long().cumsum(0).view_as(is_image) - 1, -1)


def block_index(answer_BL: torch.Tensor, block_size: int, grid: str) -> torch.Tensor:
    """Block index of every clean token, [B, L], rising from 0.

    Args:
        answer_BL: 0 outside answers, k inside the k-th answer of the sample (its stop token included), -k where that answer
            is not to be trained on: it cuts blocks as any other, since in decoding it is one.
        block_size: D.
        grid: "absolute": cells start at multiples of D from token 0; "response": at the start of every answer (and of the
            text between answers). In both, a block is cut where an answer ends, so that no block holds two turns.
    """
    start = segment_start(answer_BL, grid)
    index = torch.arange(answer_BL.shape[1], device=answer_BL.device).expand_as(answer_BL)
    cell = torch.div(index - (0 if grid == "absolute" else start), block_size, rounding_mode="floor")
    new_block = torch.zeros_like(answer_BL, dtype=torch.bool)
    new_block[:, 1:] = (start[:, 1:] != start[:, :-1]) | (cell[:, 1:] != cell[:, :-1])
    return new_block.long().cumsum(1)


def segment_start(answer_BL: torch.Tensor, grid: str) -> torch.Tensor:
    """For each token the index at which its segment starts, [B, L]. Segments end with every answer; with the response grid
    an answer is a segment of its own, whether it is trained on (k) or not (-k)."""
    answer_BL = answer_BL.abs()
    index = torch.arange(answer_BL.shape[1], device=answer_BL.device).expand_as(answer_BL)
    changed = answer_BL[:, 1:] != answer_BL[:, :-1]
    if grid == "absolute":
        changed = changed & (answer_BL[:, :-1] > 0)
    start = torch.zeros_like(index)
    start[:, 1:] = torch.where(changed, index[:, 1:], torch.zeros_like(index[:, 1:]))
    return start.cummax(dim=1).values


def block_end(first_BL: torch.Tensor, start_BL: torch.Tensor, block_size: int, grid: str) -> torch.Tensor:
    """Where the grid cell that holds index `first_BL` ends (exclusive); `start_BL` is the start of its segment."""
    origin = 0 if grid == "absolute" else start_BL
    return origin + (torch.div(first_BL - origin, block_size, rounding_mode="floor") + 1) * block_size


def longest_sample(context: int | None, block_size: int, grid: str) -> int | None:
    """Counts the tokens that a sample may have, so that the last block of its last answer still ends inside the trunk's context;
    None where there is no limit. Next-token models have blocks of 1."""
    if context is None:
        return None
    return context // block_size * block_size if grid == "absolute" else context - block_size + 1


@dataclass
class NoisyStream:
    """The blocks of a batch that hold answer tokens, before corruption; every tensor is [B, R].

    source: index of the clean counterpart (of the answer's stop token for padding stops). position, block: as in Layout.
    eligible: True where corruption may mask (answer tokens and padding stops). padding_stop: True for the stop tokens that
    fill an answer's last block and exist in this stream only. valid: False for batch padding.
    """

    source: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor
    eligible: torch.Tensor
    padding_stop: torch.Tensor
    valid: torch.Tensor


def noisy_stream(answer_BL: torch.Tensor, block_BL: torch.Tensor, block_size: int, grid: str) -> NoisyStream:
    """Picks the blocks that hold tokens of answers to be trained on; see NoisyStream. A batch without any gives R = 0."""
    starts_BL = segment_start(answer_BL, grid)
    rows = []
    for answer, block, start in zip(answer_BL, block_BL, starts_BL, strict=True):
        rows.append(_noisy_row(answer, block, start, block_size, grid))
    longest = max(len(row[0]) for row in rows)
    device = answer_BL.device
    columns = []
    for number in range(5):
        column = torch.zeros(len(rows), longest, dtype=torch.long)
        for line, row in enumerate(rows):
            column[line, : len(row[number])] = row[number]
        columns.append(column.to(device))
    source, position, block, eligible, padding_stop = columns
    lengths = torch.tensor([len(row[0]) for row in rows], device=device)
    valid = torch.arange(longest, device=device)[None] < lengths[:, None]
    return NoisyStream(source, position, block, eligible.bool() & valid, padding_stop.bool() & valid, valid)


def _noisy_row(
    answer_L: torch.Tensor, block_L: torch.Tensor, start_L: torch.Tensor, block_size: int, grid: str
) -> tuple[torch.Tensor, ...]:
    """One sample's noisy stream as (source, position, block, eligible, padding_stop), each [R]."""
    answer_L, block_L, start_L = answer_L.cpu(), block_L.cpu(), start_L.cpu()
    index_L = torch.arange(len(answer_L))
    with_answer = torch.isin(block_L, block_L[answer_L > 0])
    chosen = index_L[with_answer]
    pieces = [(chosen, chosen, block_L[chosen], (answer_L[chosen] > 0).long(), torch.zeros_like(chosen))]
    is_last = (answer_L > 0) & torch.cat([answer_L[1:] != answer_L[:-1], torch.ones(min(1, len(answer_L)), dtype=torch.bool)])
    for last in index_L[is_last]:
        end = block_end(last, start_L[last], block_size, grid)
        position = torch.arange(int(last) + 1, int(end))
        filled = torch.ones_like(position)
        pieces.append((last * filled, position, block_L[last] * filled, filled, filled))
    columns = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    order = torch.argsort(columns[2] * 2 + columns[4], stable=True)
    return tuple(column[order] for column in columns)


def noisy_layout(stream: NoisyStream, context: str, copy: int = 1) -> Layout:
    """Layout of a noisy copy; copies, counted from 1, do not see each other."""
    return Layout(
        position=stream.position,
        block=stream.block,
        noisy=torch.full_like(stream.block, copy),
        valid=stream.valid,
        document=torch.zeros_like(stream.block),
        context=context,
    )


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
    config = trunk.config
    if config._attn_implementation != "sdpa" or not trunk._can_set_attn_implementation():
        yield
        return
    config._attn_implementation = BLOCKS
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
