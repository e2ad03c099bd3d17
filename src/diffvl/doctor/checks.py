"""What must hold of a trunk before block diffusion can be put on it, measured on a tiny copy: one `Check` for each demand.

Place in the flow: `doctor` builds the copy (`tiny_copy`) and asks here; what `prepare` proves too stands in `attention_proof`.
Masks, layouts and the cache are those of training and decoding (`diffvl.hub`); the reference forwards are written out again token
by token, since independence is their point. A check that must stay small is worth nothing unless it can grow: the rule with the
leak in it must be noticed.

Shapes: B batch, L clean length, R noisy length, T = all tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from diffvl.doctor.plain_forward import Token, plain_forward, tokens_of
from diffvl.doctor.tiny_copy import ordinary_tokens, probe_text, vocabulary
from diffvl.hub.cache_diffvl import BlockCache
from diffvl.hub.head_diffvl import mapped_rows
from diffvl.hub.layout_diffvl import Layout
from diffvl.hub.masks_diffvl import attention_masks, block_kernels
from diffvl.prepare.attention_proof import (
    GRIDS,
    TOLERANCE,
    ProbeText,
    ar_error,
    both_ways,
    clean_error,
    conversations,
    forward,
    largest,
    leak,
    smallest,
    spread,
    text_config,
)

# What the code of some model class may raise on inputs that it was not written for.
MODEL_FAULTS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError)
MODEL_FAULTS += (StrictDataclassError, TypeError, ValueError)


@dataclass(frozen=True)
class Check:
    """error: in standard deviations of the logits, None where nothing was measured. wanted: what it had to be.
    fault: what the model's code said where it could not run."""

    name: str
    passed: bool
    error: float | None
    wanted: str
    fault: str = ""


def below(name: str, error: float) -> Check:
    """Judges an error that must vanish; nan does not."""
    return Check(name, error <= TOLERANCE, error, f"< {TOLERANCE:g}")


def above(name: str, change: float) -> Check:
    """Judges a change that must show."""
    return Check(name, change > TOLERANCE, change, f"> {TOLERANCE:g}")


def run_checks(trunk: PreTrainedModel) -> list[Check]:
    """Runs every check, each for all contexts; the weights are left as they were, the embedding table is one row longer."""
    both = [probe_text(trunk, context) for context in GRIDS]
    checks: dict[str, Callable[[], Check]] = {
        "AR parity": lambda: below("AR parity", ar_error(trunk, conversations(ordinary_tokens(trunk))[0])),
        "no leak": lambda: below("no leak", largest(leak(probe) for probe in both)),
        "a leak is caught": lambda: above("a leak is caught", smallest(leak(leaking(probe)) for probe in both)),
        "block sees itself": lambda: above("block sees itself", smallest(both_ways(probe) for probe in both)),
        "clean stream untouched": lambda: below("clean stream untouched", largest(clean_error(probe) for probe in both)),
        "direct forward": lambda: below("direct forward", largest(_direct_error(probe) for probe in both)),
        "doubled layout": lambda: below("doubled layout", largest(_doubled_error(probe) for probe in both)),
        "train = decode": lambda: below("train = decode", largest(_decoding_error(probe) for probe in both)),
        "embeddings given": lambda: below("embeddings given", _embeddings_error(both[0])),
        "head on some rows": lambda: below("head on some rows", _rows_error(both[0])),
        "head in chunks": lambda: below("head in chunks", _chunks_error(both[0])),
        "gradients": lambda: _gradients(both[0]),
        "new token": lambda: below("new token", _new_token_error(trunk)),
    }
    return [run_check(name, check) for name, check in checks.items()]


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """Makes a check; what the model's code raises fails it."""
    try:
        return check()
    except MODEL_FAULTS as error:
        return Check(name, False, None, "runs", describe_fault(error))


def describe_fault(error: BaseException) -> str:
    """Tells what an exception says, on one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


# --- checks with training's own masks ------------------------------------------------------------------------------------


class LeakyLayout(Layout):
    """The bug to be caught: `<=` for `<`, so that a noisy token sees the clean copy of its own block."""

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        q, k = ({name: row[:, places] for name, row in self.rows.items()} for places in (queries, slice(None)))
        own_block = (k["block"][:, None] == q["block"][..., None]) & (k["document"][:, None] == q["document"][..., None])
        leak = own_block & q["noisy"][..., None].bool() & ~k["noisy"][:, None].bool() & k["valid"][:, None]
        return super().allowed(queries, window, chunk) | leak


def leaking(probe: ProbeText) -> ProbeText:
    """Gives the same text the bug in its masks."""
    return replace(probe, layout=leaky(probe.layout))


def leaky(layout: Layout) -> Layout:
    """Puts the bug into a layout."""
    return LeakyLayout(**vars(layout))


@torch.no_grad()
def _decoding_error(probe: ProbeText) -> float:
    """Compares the noisy logits of each block of the first sample with those over a cache; see `cached_blocks_error`."""
    return cached_blocks_error(probe.layout.selected(torch.tensor([0])), probe.logits()[0], partial(_cached, probe))


CachedPass = Callable[[BlockCache, torch.Tensor, torch.Tensor, bool | int], torch.Tensor]


def cached_blocks_error(layout: Layout, expected: torch.Tensor, run: CachedPass) -> float:
    """Compares the logits of each noisy block with those over a cache of the clean tokens before it, which were stored by a
    forward of their own, or by the same forward.

    Args:
        layout: of one sample. expected: logits of all its tokens, [T, V].
        run: (cache, past, fresh, store) -> logits of the tokens at `fresh` over those at `past`; `store` of them are stored.
    """
    apart, fused = BlockCache(), BlockCache()
    clean, block, valid = ~layout.noisy[0].bool(), layout.block[0], layout.valid[0]
    committed, worst = torch.zeros(0, dtype=torch.long), 0.0
    for number in block[~clean & valid].unique().tolist():
        before = (clean & valid & (block < number)).nonzero()[:, 0]
        fresh = before[len(committed) :]
        places = (~clean & valid & (block == number)).nonzero()[:, 0]
        together = run(fused, committed, torch.cat([fresh, places]), len(fresh))[len(fresh) :]
        run(apart, committed, fresh, True)
        committed = before
        alone = run(apart, committed, places, False)
        worst = largest([worst, *(spread(logits - expected[places], expected) for logits in (alone, together))])
        lengths = {cache.get_seq_length() for cache in (apart, fused)}
        assert lengths == {len(committed)}, f"the cache holds {lengths} tokens, {len(committed)} were stored"
    return worst


def _cached(probe: ProbeText, cache: BlockCache, past: torch.Tensor, fresh: torch.Tensor, store: bool | int) -> torch.Tensor:
    """Computes the logits of the tokens at `fresh` over the cached ones at `past`, as the decoder asks for them: where nothing is
    stored, without a mask but for windows."""
    rows = {name: row[:1, torch.cat([past, fresh])] for name, row in probe.layout.rows.items()}
    layout = probe.layout.with_rows(rows)
    queries = slice(len(past), None)
    cache.store = store
    with block_kernels(probe.trunk):
        output = probe.trunk(
            input_ids=probe.ids[:1, fresh],
            attention_mask=attention_masks(text_config(probe.trunk), layout, queries, torch.float32, sees_all=store is False),
            position_ids=layout.position[:, queries],
            past_key_values=cache,
            use_cache=True,
        )
    return output.logits[0].float()


@torch.no_grad()
def _embeddings_error(probe: ProbeText) -> float:
    """Embeddings in the place of ids, which is how images come in: those of the ids give the same logits, and a vector that
    belongs to no id can be read as well."""
    masks = attention_masks(text_config(probe.trunk), probe.layout, slice(None), torch.float32)

    def run(embeds: torch.Tensor) -> torch.Tensor:
        output = probe.trunk(inputs_embeds=embeds, attention_mask=masks, position_ids=probe.layout.position, use_cache=False)
        return output.logits.float()

    embeds = probe.trunk.get_input_embeddings()(probe.ids)
    error = spread(run(embeds) - probe.logits(), probe.logits())
    with_image = run(torch.cat([embeds[:, 1:2] + embeds[:, 2:3], embeds[:, 1:]], 1))
    return error if bool(with_image.isfinite().all()) else float("inf")


@contextmanager
def head_on(trunk: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:
    """Lets the head of the trunk run on some rows only, as in the DiffVL model."""
    head: Any = trunk.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][rows][None],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _rows_error(probe: ProbeText) -> float:
    """Runs the head on some rows only, as decoding asks for it."""
    rows = probe.layout.noisy.bool() & probe.layout.valid
    with head_on(probe.trunk, rows):
        some = forward(probe.trunk, probe.ids, probe.layout).logits[0].float()
    return spread(some - probe.logits()[rows], probe.logits())


@torch.no_grad()
def _chunks_error(probe: ProbeText) -> float:
    """Runs the head apart from the rest of the model, as the loss asks for it."""
    rows = probe.layout.noisy.bool() & probe.layout.valid
    flat = rows.flatten().nonzero()[:, 0]
    some = mapped_rows(probe.trunk, lambda: forward(probe.trunk, probe.ids, probe.layout), flat, lambda logits, _: logits.float())
    return spread(some - probe.logits()[rows], probe.logits())


def _gradients(probe: ProbeText) -> Check:
    """Runs backward of the masked-token loss in training mode: every gradient is finite, and the mask token gets one."""
    trunk, mask_id = probe.trunk, vocabulary(probe.trunk) - 1
    masked = probe.ids == mask_id
    truth = torch.cat([probe.ids[:, : probe.clean_length], probe.ids[:, : probe.clean_length].gather(1, probe.stream.source)], 1)
    trunk.train()
    try:
        with torch.random.fork_rng(devices=[]):
            logits = forward(trunk, probe.ids, probe.layout).logits.float()
            cross_entropy(logits[masked], truth[masked]).backward()
        gradients = {name: parameter.grad for name, parameter in trunk.named_parameters() if parameter.grad is not None}
        bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
        table: Any = trunk.get_input_embeddings()
        reached = table.weight.grad
        lost = reached is None or float(reached[mask_id].abs().max()) == 0.0
    finally:
        trunk.zero_grad(set_to_none=True)
        trunk.eval()
    fault = f"not finite: {', '.join(bad[:3])}" if bad else "the mask token gets no gradient" if lost else ""
    return Check("gradients", not fault, None, "finite", fault)


@torch.no_grad()
def _new_token_error(trunk: PreTrainedModel) -> float:
    """Adds one row to the embedding table: the other logits stay, and the new token can be read."""
    before = probe_text(trunk, "block")
    expected, size = before.logits(), vocabulary(trunk)
    trunk.resize_token_embeddings(size + 1, mean_resizing=False)
    error = spread(before.logits()[..., :size] - expected, expected)
    read = before.logits(torch.where(before.ids == size - 1, size, before.ids))
    return error if bool(read.isfinite().all()) and read.shape[-1] == size + 1 else float("inf")


# --- references, written out token by token ------------------------------------------------------------------------------


@torch.no_grad()
def _direct_error(probe: ProbeText) -> float:
    """Compares each noisy block with a forward over the clean text before it and itself, one stream, nothing twice."""
    expected, tokens, worst = probe.logits()[0], tokens_of(probe), 0.0
    for block in probe.noisy_blocks():
        prefix = [token for token in tokens if not token.noisy and token.block < block]
        own = [token for token in tokens if token.noisy and token.block == block]

        def sees(q: Token, k: Token) -> bool:
            whole_block = q.noisy or probe.layout.context == "block"
            return k.position <= q.position or (whole_block and k.block == q.block)

        logits = plain_forward(probe.trunk, prefix + own, sees)[len(prefix) :]
        worst = largest([worst, spread(logits - expected[[token.place for token in own]], expected)])
    return worst


@torch.no_grad()
def _doubled_error(probe: ProbeText) -> float:
    """Compares with the published form: the whole clean text once more as the noisy stream, prompts included."""
    expected, tokens = probe.logits()[0], tokens_of(probe)
    clean, noisy = ([token for token in tokens if token.noisy == kind] for kind in (False, True))
    answered = {token.block for token in noisy}
    prompts = [Token(t.id, t.position, t.block, True, -1) for t in clean if t.block not in answered]
    second = sorted(prompts + noisy, key=lambda token: token.position)

    def sees(q: Token, k: Token) -> bool:
        if k.noisy:
            return q.noisy and q.block == k.block
        if q.noisy:
            return k.block < q.block
        return k.position <= q.position or (probe.layout.context == "block" and k.block == q.block)

    logits = plain_forward(probe.trunk, clean + second, sees)[len(clean) :]
    places = [number for number, token in enumerate(second) if token.place >= 0]
    return spread(logits[places] - expected[[second[number].place for number in places]], expected)
