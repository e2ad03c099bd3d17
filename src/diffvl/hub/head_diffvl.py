"""The head of a stock model on some tokens only, and on a bounded number of them at a time.

Logits of M rows are M x V values, and a loss
needs several such tensors; for a vocabulary of 150,000 that is the peak of a training step. Calling the head by hand would be
wrong for many families (soft caps, scales, biases after it), so the stock model's own forward is run again for each chunk of
rows with the trunk below the head standing still: what it would return is put in its place.

Shapes: B batch, T tokens, H trunk width, V vocabulary, M rows asked of the head, m rows of a chunk.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**25  # values of a chunk's logits: 128 MiB in fp32


@contextmanager
def head_on(trunk: Any, rows: torch.Tensor | None) -> Iterator[None]:
    """Lets the trunk's own head (with whatever its forward does after it) run on some rows only."""
    if rows is None:
        yield
        return
    flat = flat_rows(rows)
    hook = trunk.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[flat][None],))
    try:
        yield
    finally:
        hook.remove()


def flat_rows(rows: torch.Tensor | None) -> torch.Tensor:
    """Rows given as bool [B, T] or as indices -> indices into the flattened tokens, [M]."""
    if rows is None:
        raise ValueError("row_map needs logits_rows")
    return rows.flatten().nonzero()[:, 0] if rows.dtype == torch.bool else rows


def mapped_rows(
    trunk: Any,
    trunk_pass: Callable[[], Any],
    rows: torch.Tensor,
    row_map: Callable[[torch.Tensor, slice], torch.Tensor],
    earlier: torch.Tensor | None = None,
) -> torch.Tensor:
    """`row_map` over the logits at `rows`, chunk by chunk; [M, ...].

    Args:
        trunk: the causal LM, possibly wrapped by peft. trunk_pass: runs it on the whole batch.
        rows: int64 [M], indices into the flattened tokens of the batch; or [M, k] of tokens that `row_map` is given together.
        earlier: final hidden states [B, C, H] of tokens that stand before those of the batch, and are counted with them.
    """
    stock = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
    body, output, one_logit_row = _body_pass(stock, trunk_pass)
    states = output.last_hidden_state
    states = states if earlier is None else torch.cat([earlier.to(states.dtype), states], 1)
    hidden = states.flatten(0, 1)[rows]
    # Only the form of the first pass's output is used; the trunk's own output must not be held through it.
    like = _with_hidden(output, hidden[:0])

    def chunk(hidden_mH: torch.Tensor, which: slice) -> torch.Tensor:
        with _returning(body, _with_hidden(like, hidden_mH.flatten(0, -2)[None])):
            logits = stock(input_ids=torch.zeros(1, 1, dtype=torch.long, device=rows.device), use_cache=False).logits
        return row_map(logits[0].unflatten(0, hidden_mH.shape[:-1]), which)

    size = max(CHUNK_LOGITS // (one_logit_row.shape[-1] * max(rows[:1].numel(), 1)), 1)
    chunks = [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)] or [slice(0, 0)]
    if len(chunks) == 1:
        return chunk(hidden, chunks[0])
    run: Any = _recomputed if torch.is_grad_enabled() else lambda function, *arguments: function(*arguments)
    return torch.cat([run(chunk, hidden[which], which) for which in chunks])


def last_states(trunk: Any, trunk_pass: Callable[[], Any]) -> torch.Tensor:
    """The final hidden states of a pass, [B, T, H], of which the head sees one row."""
    stock = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
    return _body_pass(stock, trunk_pass)[1].last_hidden_state


def _body_pass(stock: Any, trunk_pass: Callable[[], Any]) -> tuple[Any, Any, torch.Tensor]:
    """One pass with the head on a single row: the module below the head, its output, and that row's logits."""
    head = stock.get_output_embeddings()
    with _recorded_outputs(stock) as seen:
        hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0].flatten(0, -2)[:1][None],))
        try:
            one_logit_row = trunk_pass().logits
        finally:
            hook.remove()
    body, output = seen[-1]
    _BODIES[stock] = body
    return body, output, one_logit_row


# For each stock model the module below its head: the outermost one that returns hidden states. Models name it differently.
_BODIES: "WeakKeyDictionary[Any, Any]" = WeakKeyDictionary()


@contextmanager
def _recorded_outputs(stock: Any) -> Iterator[list[tuple[Any, Any]]]:
    """In the block, collects (module, output) of modules that return hidden states, the outermost one last."""
    seen: list[tuple[Any, Any]] = []

    def note(module: Any, _: Any, output: Any) -> None:
        if getattr(output, "last_hidden_state", None) is not None:
            seen.append((module, output))

    known = _BODIES.get(stock)
    watched = [known] if known is not None else [module for module in stock.modules() if module is not stock]
    hooks = [module.register_forward_hook(note) for module in watched]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _recomputed(function: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    result = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, torch.Tensor)
    return result


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A copy of the trunk's output with other hidden states and no cache."""
    shown = copy.copy(output)
    shown.last_hidden_state = hidden
    return shown


@contextmanager
def _returning(body: Any, output: Any) -> Iterator[None]:
    """In the block the module returns `output` whatever it is given."""
    before = body.__dict__.get("forward")
    body.forward = lambda *_, **__: output
    try:
        yield
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
