"""Who stands where and who sees whom: the one place that knows, for training, evaluation and decoding.

A sample is a clean stream (the chat text) and a noisy stream (the blocks that hold answer tokens, with the position ids of
their clean counterparts; an answer that is not to be trained on stands in the clean stream only). Every token is one row of
`Layout`; the attention rule is written once, in `attends` (BD3-LM, arXiv 2503.09573, section 3). The leak it guards against: a
noisy token must never see the clean copy of its own block, nor anything later.

Order is not rotation. Causality, windows and chunks count `Layout.position`, the index in the sample; the trunk rotates by
`Rope`, a fact beside the layout.

Shapes: B batch, L clean length, R noisy length, T = all tokens of a row, Q queries, K keys, H heads. Bool masks: True = may be
attended.
"""

from dataclasses import dataclass, fields, replace

import torch


@dataclass
class Layout:
    """Per-token rows, each [B, T].

    position: index in the sample; the order of tokens. block: index of the block, rising along a sample. noisy: 0 (or False) in
    the clean stream, the number of the noisy copy in a noisy one (True where there is one copy only). valid: False for padding.
    document: which packed sample a token belongs to.
    context: "block" (clean tokens see their whole block) or "causal" (token by token).
    span: 0 outside, k in the k-th span of the sample whose clean tokens all see each other (an image of some models); None
    where there are none. image_attention: how spans and windows meet, one of IMAGE_ATTENTION.
    """

    position: torch.Tensor
    block: torch.Tensor
    noisy: torch.Tensor
    valid: torch.Tensor
    document: torch.Tensor
    context: str
    span: torch.Tensor | None = None
    image_attention: str = "causal"

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("context", "image_attention")}
        return {name: row for name, row in rows.items() if row is not None}

    def with_rows(self, rows: dict[str, torch.Tensor]) -> "Layout":
        """A layout of the same rule with these rows."""
        return Layout(**rows, context=self.context, image_attention=self.image_attention)

    def joined(self, after: "Layout") -> "Layout":
        """This layout followed by another along T."""
        first, second = self, after
        if (first.span is None) != (second.span is None):
            first, second = (
                one if one.span is not None else replace(one, span=torch.zeros_like(one.position)) for one in (first, second)
            )
        rows = {name: torch.cat([row, second.rows[name]], dim=1) for name, row in first.rows.items()}
        return (self if self.image_attention != "causal" else after).with_rows(rows)

    def padded(self, length: int) -> "Layout":
        """This layout followed by padding, up to a length."""
        short = length - self.position.shape[1]
        return self.with_rows({name: torch.nn.functional.pad(row, (0, short)) for name, row in self.rows.items()})

    def part(self, tokens: slice) -> "Layout":
        """Some of the tokens."""
        return self.with_rows({name: row[:, tokens] for name, row in self.rows.items()})

    def selected(self, keep: torch.Tensor) -> "Layout":
        """Some of the samples."""
        return self.with_rows({name: row[keep] for name, row in self.rows.items()})

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        """The attention rule, [B, Q, T].

        Args:
            queries: which rows ask; all rows answer.
            window: sliding window in tokens, as the stock model counts it (a token sees itself and window - 1 before).
            chunk: size of attention chunks in tokens.
        """
        q = {name: row[:, queries, None] for name, row in self.rows.items()}
        k = {name: row[:, None, :] for name, row in self.rows.items()}
        allowed = attends(q, k, self.context, window, chunk, self.image_attention)
        # A padding query with nothing to see would be a softmax over nothing; it sees itself, and nobody sees it.
        index = torch.arange(self.position.shape[1], device=self.position.device)
        itself = index[queries, None] == index[None, :]
        return allowed | (itself[None] & ~q["valid"])


# How clean tokens of one span (an image, as a rule) see each other:
#   causal              as any other tokens
#   runs                both ways inside a run of image tokens, as far as the layer's window reaches
#   runs_beyond_window  the same, whatever the window
#   runs_sliding        as `runs`, in layers with a sliding window only
#   images              as `runs`, all image tokens between two answers being one span
#   prompt              all tokens between two answers are one span, whatever the window
IMAGE_ATTENTION = ("causal", "runs", "runs_beyond_window", "runs_sliding", "images", "prompt")
BEYOND_WINDOW = frozenset({"runs_beyond_window", "prompt"})


def attends(
    q: dict[str, torch.Tensor],
    k: dict[str, torch.Tensor],
    context: str,
    window: int | None = None,
    chunk: int | None = None,
    image_attention: str = "causal",
) -> torch.Tensor:
    """Whether queries with the rows `q` may attend to keys with the rows `k`: the attention rule itself, elementwise over
    whatever shapes broadcast, so that dense masks, FlexAttention kernels and the decoder all ask the same function."""
    q_noisy, k_noisy = q["noisy"].bool(), k["noisy"].bool()
    order = "position" if context == "causal" else "block"
    sees_clean = ~k_noisy & torch.where(q_noisy, k["block"] < q["block"], k[order] <= q[order])
    sees_noisy = k_noisy & (k["noisy"] == q["noisy"]) & (k["block"] == q["block"])
    is_there = (k["document"] == q["document"]) & k["valid"]
    allowed = (sees_clean | sees_noisy) & is_there
    sees_span = None
    if "span" in q and image_attention != "causal" and (image_attention != "runs_sliding" or window is not None):
        sees_span = (q["span"] > 0) & (k["span"] == q["span"]) & ~q_noisy & ~k_noisy & is_there
        if image_attention not in BEYOND_WINDOW:
            allowed, sees_span = allowed | sees_span, None
    if window is not None:
        allowed = allowed & (k["position"] > q["position"] - window)
    if chunk is not None:
        q_chunk = torch.div(q["position"], chunk, rounding_mode="floor")
        allowed = allowed & (torch.div(k["position"], chunk, rounding_mode="floor") == q_chunk)
    return allowed if sees_span is None else allowed | sees_span


@dataclass(frozen=True)
class Rope:
    """Rotary position ids of the samples of a batch, a fact of its own beside the order of the tokens.

    table: int64 [A, B, L], of clean tokens, for a trunk with A rotary axes (M-RoPE); None for one that counts the tokens.
    length_B: tokens of each sample that have an entry. Text after them goes on by one on every axis.
    first: of the first token, for a trunk that counts.
    """

    table: torch.Tensor | None = None
    length_B: torch.Tensor | None = None
    first: int = 0

    def at(self, position_Bn: torch.Tensor) -> torch.Tensor:
        """Position ids of tokens at these indices of their samples: [B, n], or [A, B, n]."""
        if self.table is None or self.length_B is None:
            return position_Bn + self.first if self.first else position_Bn
        last = (self.length_B[:, None] - 1).clamp_min(0)
        known = position_Bn.minimum(last)
        return self._entries(known) + (position_Bn - known)

    def of_stream(self, stream: "NoisyStream") -> torch.Tensor:
        """Position ids of a noisy stream: those of the clean counterparts, and padding stops counted on from their stop. (The
        table has the next turn at the index of a padding stop.)"""
        if self.table is None:
            return self.at(stream.position)
        return self._entries(stream.source) + (stream.position - stream.source)

    def selected(self, keep: torch.Tensor) -> "Rope":
        """Some of the samples."""
        if self.table is None or self.length_B is None:
            return self
        return Rope(self.table[:, keep], self.length_B[keep])

    def _entries(self, index_Bn: torch.Tensor) -> torch.Tensor:
        assert self.table is not None
        return self.table.gather(2, index_Bn.expand(len(self.table), *index_Bn.shape))


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
