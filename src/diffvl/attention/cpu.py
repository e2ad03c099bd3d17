"""A BlockMask executed on a CPU, with torch's flash kernel, part by part.

FlexAttention has no backward on a CPU, and a dense mask computes everything that it then throws away. Here the queries are cut
into groups, and each group looks at its keys in parts that need no mask where all is allowed: the clean stream of a sample is one
call of the causal kernel, plus the few keys after the diagonal that a block shows its own tokens. The parts of a group are
joined by their log-sum-exps: the softmax over all keys is the parts' own, weighted (FlashAttention, arXiv 2205.14135, section
3.1). tests/attention/test_attention.py holds values and gradients against dense attention.

Shapes: B batch, H heads, T tokens, Q queries of a group, K keys of a part, QT and KT tiles, n tiles of a band, w their width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

TILED = "tiled"
CPU_TILE = 64
# A new group of query tiles costs kernel calls; this many wasted scores are worth one.
CALL_COST = 8 * CPU_TILE * CPU_TILE
SHORTEST_RUN = 4  # tiles of a clean stream from which on the causal kernel pays

# torch's own CPU kernels under scaled_dot_product_attention; called by name, because joining parts needs the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# --- the attention function --------------------------------------------------------------------------------------------------


def tiled_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Executes a BlockMask, as an attention function of transformers. Query [B, H, T, head], key and value [B, KV heads,
    T, head] -> [B, T, H, head].

    Raises:
        ValueError: for another kind of mask, or a model that changes scores in a way that torch's kernel does not know.
    """
    odd = sorted(name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None)
    odd += ["dropout"] if dropout else []
    odd += ["values of another width than keys"] if value.shape[-1] != query.shape[-1] else []
    if odd:
        raise ValueError(f"{type(module).__name__} wants {', '.join(odd)}, which tiled attention does not know")
    if not isinstance(attention_mask, BlockMask):
        raise ValueError(f"tiled attention takes a BlockMask, got {type(attention_mask).__name__}")
    repeats = query.shape[1] // key.shape[1]
    states = [query, repeat_kv(key, repeats), repeat_kv(value, repeats)]
    if torch.is_autocast_enabled("cpu"):
        states = [state.to(torch.get_autocast_dtype("cpu")) for state in states]
    attended = _Joined.apply(*states, plan_of(attention_mask), scaling)
    assert isinstance(attended, torch.Tensor)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(TILED, tiled_attention)


class _Joined(torch.autograd.Function):
    """Attention of all groups. The kernel's backward is given the joined output and log-sum-exp for every part, and gives the
    part's share of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: "list[Group]", scale: float | None
    ) -> torch.Tensor:
        output = torch.empty_like(q)
        sums = torch.empty(q.shape[:-1], dtype=torch.float32)
        for group in plan:
            joined, total = None, None
            for part in group.parts:
                one, log_sum = part.attend(q[:, :, group.queries], k, v, scale)
                if joined is None or total is None:
                    joined, total = one, log_sum
                else:
                    both = torch.logaddexp(total, log_sum)
                    # A query that has seen nothing yet: -inf - -inf.
                    before, now = ((share - both).exp().nan_to_num(0.0)[..., None] for share in (total, log_sum))
                    joined, total = joined.mul_(before).add_(one.mul_(now)), both
            assert joined is not None and total is not None
            output[:, :, group.queries] = joined.to(q.dtype)
            sums[:, :, group.queries] = total
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, output, sums = ctx.saved_tensors
        q_gradient, k_gradient, v_gradient = (torch.zeros_like(state) for state in (q, k, v))
        for group in ctx.plan:
            rows = (slice(None), slice(None), group.queries)
            given = gradient[rows], q[rows], output[rows], sums[rows]
            for part in group.parts:
                q_gradient[rows] += part.gradients(*given, k, v, k_gradient, v_gradient, ctx.scale)
        return q_gradient, k_gradient, v_gradient, None, None


# --- parts -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slab:
    """Neighbouring keys. allowed: who sees whom among them, bool [B, 1, Q, K], None where all see all. blind: queries that see
    none of them, bool [B, 1, Q]. causal: the keys are the queries' own tokens, and each sees those up to itself."""

    keys: slice
    allowed: torch.Tensor | None = None
    blind: torch.Tensor | None = None
    causal: bool = False
    biases: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes output [B, H, Q, head] and log-sum-exp [B, H, Q] over these keys alone."""
        bias = _bias(self.allowed, self.biases, q.dtype)
        output, log_sum = _flash(q, k[:, :, self.keys], v[:, :, self.keys], 0.0, self.causal, attn_mask=bias, scale=scale)
        return _without(self.blind, output, log_sum)

    def gradients(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        output: torch.Tensor,
        log_sum: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_gradient: torch.Tensor,
        v_gradient: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        """Gives the share of the queries' gradient; those of the keys and values are added in place."""
        columns = (slice(None), slice(None), self.keys)
        bias = _bias(self.allowed, self.biases, q.dtype)
        given = (gradient, q, k[columns], v[columns], output, log_sum)
        share, keys, values = _flash_backward(*given, 0.0, self.causal, attn_mask=bias, scale=scale)
        k_gradient[columns] += keys
        v_gradient[columns] += values
        return share


@dataclass(frozen=True)
class Band:
    """The keys just after the diagonal, for tiles of w queries at once: a tile looks at its own w tokens and, where blocks lie
    across tiles, at w more. keys: their indices [n * K], K = w or 2w. allowed: bool [B, n, w, K]."""

    width: int
    keys: torch.Tensor
    allowed: torch.Tensor
    biases: dict[torch.dtype, torch.Tensor] = field(default_factory=dict)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Does as Slab's."""
        allowed = self.allowed.flatten(0, 1)[:, None]
        bias = _bias(allowed, self.biases, q.dtype)
        keys, values = (self._cut(state[:, :, self.keys], allowed.shape[-1]) for state in (k, v))
        tiles, log_sum = _flash(self._tiled(q), keys, values, 0.0, False, attn_mask=bias, scale=scale)
        tiles, log_sum = _without(~allowed.any(-1), tiles, log_sum)
        return self._joined(tiles, q), self._joined(log_sum[..., None], q)[..., 0]

    def gradients(
        self,
        gradient: torch.Tensor,
        q: torch.Tensor,
        output: torch.Tensor,
        log_sum: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_gradient: torch.Tensor,
        v_gradient: torch.Tensor,
        scale: float | None,
    ) -> torch.Tensor:
        """Does as Slab's."""
        bias = _bias(self.allowed.flatten(0, 1)[:, None], self.biases, q.dtype)
        keys, values = (self._cut(state[:, :, self.keys], self.allowed.shape[-1]) for state in (k, v))
        sums = self._tiled(log_sum[..., None])[..., 0].contiguous()
        given = (self._tiled(gradient), self._tiled(q), keys, values, self._tiled(output), sums)
        share, key_share, value_share = _flash_backward(*given, 0.0, False, attn_mask=bias, scale=scale)
        for total, one in ((k_gradient, key_share), (v_gradient, value_share)):
            flat = one.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
            total.index_add_(2, self.keys, flat.to(total.dtype))
        return self._joined(share, q)

    def _tiled(self, states: torch.Tensor) -> torch.Tensor:
        """Cuts [B, H, Q, x] -> [B * n, H, w, x], the last tile filled up."""
        short = self.allowed.shape[1] * self.width - states.shape[2]
        return self._cut(torch.nn.functional.pad(states, (0, 0, 0, short)), self.width)

    @staticmethod
    def _cut(states: torch.Tensor, size: int) -> torch.Tensor:
        return states.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1).contiguous()

    @staticmethod
    def _joined(tiles: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Joins [B * n, H, w, x] -> [B, H, Q, x]."""
        return tiles.unflatten(0, (len(like), -1)).transpose(1, 2).flatten(2, 3)[:, :, : like.shape[2]]


def _bias(allowed: torch.Tensor | None, made: dict[torch.dtype, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Makes the additive form of a mask, made once for all layers."""
    if allowed is not None and dtype not in made:
        made[dtype] = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf"))
    return made.get(dtype)


def _without(blind: torch.Tensor | None, output: torch.Tensor, log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes nothing from keys that a query does not see; the kernel says nothing useful of a softmax over none."""
    if blind is None:
        return output, log_sum
    return output.masked_fill(blind[..., None], 0.0), log_sum.masked_fill(blind, float("-inf"))


@dataclass(frozen=True)
class Group:
    """Neighbouring queries and the parts that hold every key that any of them may see, once."""

    queries: slice
    parts: tuple[Slab | Band, ...]


# --- the plan ----------------------------------------------------------------------------------------------------------------


def plan_of(mask: BlockMask) -> list[Group]:
    """Groups of queries, worked out once for a mask (every layer asks) and kept on it."""
    plan = getattr(mask, "plan_for_cpu", None)
    if plan is None:
        plan, tile = [], 0
        visible, full = _tables(mask)
        for first, end in [*_causal_runs(visible, full), (len(visible), len(visible))]:
            plan += [_masked_group(mask, tile + start, tile + stop, keys) for start, stop, keys in _grouped(visible[tile:first])]
            plan += _run_groups(mask, first, end, visible) if end > first else []
            tile = end
        mask.plan_for_cpu = plan  # type: ignore[attr-defined]
    return plan


def _tables(mask: BlockMask) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives two tables, bool [QT, KT]: the tiles that some row of the batch needs, and those that are allowed as a whole in every
    row."""
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    partial, full = (
        torch.zeros(indices.shape, dtype=torch.bool).scatter(
            -1, indices.long(), torch.arange(indices.shape[-1]) < count[..., None]
        )
        for count, indices in lists
    )
    return (partial | full).any(0)[0], full.all(0)[0]


def _rule(mask: BlockMask, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Applies the rule to indices that broadcast, [B, ...]; nothing is allowed after the last token."""
    last = mask.seq_lengths[0] - 1
    batch = torch.arange(mask.kv_indices.shape[0]).view(-1, *[1] * queries.dim())
    allowed = mask.mask_mod(batch, torch.zeros_like(batch), queries.clamp_max(last)[None], keys.clamp_max(last)[None])
    return allowed & (queries <= last) & (keys <= last)


def _grouped(visible: torch.Tensor) -> list[tuple[int, int, torch.Tensor]]:
    """Gives (first, end, key tiles) of runs of query tiles: a run grows while the scores wasted on keys that only some of its
    tiles see cost less than one more call."""
    runs: list[tuple[int, int, torch.Tensor]] = []
    for number, keys in enumerate(visible):
        if runs:
            first, end, together = runs[-1]
            union = together | keys
            grown = (number + 1 - first) * int(union.sum())
            apart = (end - first) * int(together.sum()) + int(keys.sum())
            if (grown - apart) * CPU_TILE * CPU_TILE <= CALL_COST:
                runs[-1] = (first, number + 1, union)
                continue
        runs.append((number, number + 1, keys))
    return runs


def _masked_group(mask: BlockMask, first: int, end: int, key_tiles: torch.Tensor) -> Group:
    """Finds runs of keys that all the queries see, and one part from the first to the last of the others, where the rule
    decides."""
    length, tile = mask.seq_lengths[0], mask.BLOCK_SIZE[0]
    queries = slice(first * tile, min(end * tile, length))
    within = key_tiles.repeat_interleave(tile)[:length].nonzero()[:, 0]
    low, high = int(within[0]), int(within[-1]) + 1
    index = torch.arange(length)
    allowed = _rule(mask, index[queries, None], index[None, low:high])
    everybody = allowed.flatten(0, 1).all(0)
    somebody = (allowed.flatten(0, 1).any(0) & ~everybody).nonzero()[:, 0]
    masked = []
    if len(somebody):
        start, stop = int(somebody[0]), int(somebody[-1]) + 1
        everybody[start:stop] = False
        seen = allowed[:, None, :, start:stop].contiguous()
        masked.append(Slab(slice(low + start, low + stop), seen, ~seen.any(-1)))
    return Group(queries, (*_whole(everybody, low), *masked))


def _whole(everybody: torch.Tensor, low: int) -> list[Slab]:
    """Finds runs of keys that need no mask."""
    edges = torch.nn.functional.pad(everybody.long(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [Slab(slice(low + start, low + stop)) for start, stop in zip(starts, stops, strict=True)]


# --- clean streams -----------------------------------------------------------------------------------------------------------


def _causal_runs(visible: torch.Tensor, full: torch.Tensor) -> list[tuple[int, int]]:
    """Ranges of query tiles that see all of the range's tiles before their own, one tile before the range and one after their
    own at most: clean streams."""
    runs, first, count = [], 0, len(visible)
    while first < count:
        end = first
        while end < count and _goes_on(visible[end], full[end], first, end):
            end += 1
        if end - first >= SHORTEST_RUN:
            runs.append((first, end))
        first = max(end, first + 1)
    return runs


def _goes_on(visible: torch.Tensor, full: torch.Tensor, first: int, tile: int) -> bool:
    nothing_else = not bool(visible[: max(first - 1, 0)].any()) and not bool(visible[tile + 2 :].any())
    return nothing_else and bool(full[first:tile].all()) and bool(visible[tile])


def _run_groups(mask: BlockMask, first: int, end: int, visible: torch.Tensor) -> list[Group]:
    """Turns the run into one group of causal parts, if the rule agrees token by token; as masked groups if it does not."""
    length, tile = mask.seq_lengths[0], mask.BLOCK_SIZE[0]
    queries = slice(first * tile, min(end * tile, length))
    index = torch.arange(queries.start, queries.stop)
    before = torch.arange(max(first - 1, 0) * tile, queries.start)
    earlier = _rule(mask, index[:, None], before[None, :]).flatten(0, 1)
    band = _band(mask, queries)
    if band is None or bool((earlier.any(0) != earlier.all(0)).any()):
        return [_masked_group(mask, first + start, first + stop, keys) for start, stop, keys in _grouped(visible[first:end])]
    parts = [*_whole(earlier.all(0), int(before[0]) if len(before) else 0), Slab(queries, causal=True)]
    return [Group(queries, (*parts, *([band] if bool(band.allowed.any()) else [])))]


def _band(mask: BlockMask, queries: slice) -> Band | None:
    """Tells what the queries see after the diagonal; None if it reaches too far, or if something up to it is hidden."""
    for width in (8, 16, 32, CPU_TILE):
        starts = torch.arange(queries.start, queries.stop, width)
        q_index = starts[:, None, None] + torch.arange(width)[None, :, None]
        k_index = starts[:, None, None] + torch.arange(2 * width)[None, None, :]
        allowed = _rule(mask, q_index, k_index)
        inside = q_index < queries.stop
        if not bool((allowed | (k_index > q_index) | ~inside).all()):
            return None
        allowed = allowed & (k_index > q_index) & inside
        # The next tile of keys must be out of sight, or the band is too narrow.
        beyond = starts[:, None, None] + torch.arange(2 * width, 2 * width + CPU_TILE)[None, None, :]
        if not bool((_rule(mask, q_index, beyond) & inside).any()):
            if not bool(allowed[..., width:].any()):
                k_index, allowed = k_index[..., :width], allowed[..., :width].contiguous()
            return Band(width, k_index.flatten().clamp_max(mask.seq_lengths[0] - 1), allowed)
    return None
