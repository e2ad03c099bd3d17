"""What must hold of a trunk before block diffusion can be put on it, measured on a tiny copy: one `Check` for each demand.

Place in the flow: `doctor` builds the copy (`miniature`) and asks here. Masks, layouts and the cache are those of training and
decoding (`diffvl.hub`); the reference forwards beside them are written out again token by token, since independence is their
point. A check that must stay small is worth nothing unless it can grow: the rule with the leak in it must be noticed.

Shapes: B batch, L clean length, R noisy length, T = all tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from diffvl.doctor.streams import GRID_OF, Streams, Token, forward, plain_forward, text, text_config, tokens_of, vocabulary
from diffvl.doctor.tiny_copy import FIRST_ORDINARY
from diffvl.hub.cache_diffvl import BlockCache
from diffvl.hub.layout_diffvl import Layout, attention_masks, block_kernels, clean_layout
from diffvl.hub.modeling_diffvl import mapped_rows
from diffvl.prepare.proof import TOLERANCE, largest, native_logits, smallest, spread

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
    """An error that must vanish; nan does not."""
    return Check(name, error <= TOLERANCE, error, f"< {TOLERANCE:g}")


def above(name: str, change: float) -> Check:
    """A change that must show."""
    return Check(name, change > TOLERANCE, change, f"> {TOLERANCE:g}")


def probe(trunk: PreTrainedModel) -> list[Check]:
    """Every check, each for all contexts; the weights are left as they were, the embedding table is one row longer."""
    both = [Streams.of(trunk, context) for context in GRID_OF]
    checks: dict[str, Callable[[], Check]] = {
        "AR parity": lambda: below("AR parity", _ar_error(trunk)),
        "no leak": lambda: below("no leak", largest(_leak(two) for two in both)),
        "a leak is caught": lambda: above("a leak is caught", smallest(_leak(two.leaking()) for two in both)),
        "block sees itself": lambda: above("block sees itself", smallest(_both_ways(two) for two in both)),
        "clean stream untouched": lambda: below("clean stream untouched", largest(_clean_error(two) for two in both)),
        "direct forward": lambda: below("direct forward", largest(_direct_error(two) for two in both)),
        "doubled layout": lambda: below("doubled layout", largest(_doubled_error(two) for two in both)),
        "train = decode": lambda: below("train = decode", largest(_decoding_error(two) for two in both)),
        "embeddings given": lambda: below("embeddings given", _embeddings_error(both[0])),
        "head on some rows": lambda: below("head on some rows", _rows_error(both[0])),
        "head in chunks": lambda: below("head in chunks", _chunks_error(both[0])),
        "gradients": lambda: _gradients(both[0]),
        "new token": lambda: below("new token", _new_token_error(trunk)),
    }
    return [_run(name, check) for name, check in checks.items()]


def _run(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except MODEL_FAULTS as error:
        return Check(name, False, None, "runs", first_line(error))


def first_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:300] if words else type(error).__name__


# --- checks with training's own masks ------------------------------------------------------------------------------------


@torch.no_grad()
def _ar_error(trunk: PreTrainedModel) -> float:
    """An explicit causal mask with positions against the stock forward, which makes its own."""
    ids, _, valid = text(trunk)
    layout = clean_layout(torch.zeros_like(ids), torch.ones_like(valid), "causal")
    reference = native_logits(trunk, ids)
    return spread(forward(trunk, ids, layout).logits.float() - reference, reference)


def _leak(two: Streams) -> float:
    """How far the noisy logits of a block move when its own clean tokens and all later ones change; the largest."""
    before, clean, worst = two.logits(), torch.arange(two.ids.shape[1]) < two.clean, 0.0
    for block in two.noisy_blocks():
        later = clean & (two.layout.block >= block)
        other = (two.ids + 1 - FIRST_ORDINARY) % (vocabulary(two.trunk) - 1 - FIRST_ORDINARY) + FIRST_ORDINARY
        moved = two.logits(torch.where(later, other, two.ids)) - before
        own = (two.layout.block == block) & two.layout.noisy.bool() & two.layout.valid
        worst = largest([worst, spread(moved[own], before)])
    return worst


def _both_ways(two: Streams) -> float:
    """How far the first token of a noisy block moves with the last one; the largest of the blocks."""
    before, moves = two.logits(), []
    for block in two.noisy_blocks():
        places = ((two.layout.block[0] == block) & two.layout.noisy[0].bool() & two.layout.valid[0]).nonzero()[:, 0]
        other = two.ids.clone()
        other[0, places[-1]] = FIRST_ORDINARY + (other[0, places[-1]] == FIRST_ORDINARY)
        if len(places) > 1:
            moves.append(spread((two.logits(other) - before)[0, places[0]], before))
    return largest(moves)


@torch.no_grad()
def _clean_error(two: Streams) -> float:
    """The clean stream with the noisy one behind it against the clean stream alone."""
    rows = {name: row[:, : two.clean] for name, row in two.layout.rows.items()}
    alone = forward(two.trunk, two.ids[:, : two.clean], Layout(**rows, context=two.layout.context)).logits.float()
    valid = rows["valid"]
    return spread(two.logits()[:, : two.clean][valid] - alone[valid], alone[valid])


@torch.no_grad()
def _decoding_error(two: Streams) -> float:
    """Noisy logits of each block of the first sample against those over a cache of the clean tokens before it, which were stored
    by a forward of their own, or by the same forward."""
    expected, row = two.logits()[0], 0
    apart, fused = BlockCache(), BlockCache()
    clean = torch.arange(two.ids.shape[1]) < two.clean
    block, valid = two.layout.block[row], two.layout.valid[row]
    committed, worst = torch.zeros(0, dtype=torch.long), 0.0
    for number in two.noisy_blocks(row):
        before = (clean & valid & (block < number)).nonzero()[:, 0]
        fresh = before[len(committed) :]
        places = (~clean & valid & (block == number)).nonzero()[:, 0]
        together = _cached(two, fused, committed, torch.cat([fresh, places]), store=len(fresh))[len(fresh) :]
        _cached(two, apart, committed, fresh, store=True)
        committed = before
        alone = _cached(two, apart, committed, places, store=False)
        worst = largest([worst, *(spread(logits - expected[places], expected) for logits in (alone, together))])
        lengths = {cache.get_seq_length() for cache in (apart, fused)}
        assert lengths == {len(committed)}, f"the cache holds {lengths} tokens, {len(committed)} were stored"
    return worst


def _cached(two: Streams, cache: BlockCache, past: torch.Tensor, fresh: torch.Tensor, store: bool | int) -> torch.Tensor:
    """Logits of the tokens at `fresh` over the cached ones at `past`, as the decoder asks for them: where nothing is stored,
    without a mask but for windows."""
    rows = {name: row[:1, torch.cat([past, fresh])] for name, row in two.layout.rows.items()}
    layout = Layout(**rows, context=two.layout.context)
    queries = slice(len(past), None)
    cache.store = store
    with block_kernels(two.trunk):
        output = two.trunk(
            input_ids=two.ids[:1, fresh],
            attention_mask=attention_masks(text_config(two.trunk), layout, queries, torch.float32, sees_all=store is False),
            position_ids=layout.position[:, queries],
            past_key_values=cache,
            use_cache=True,
        )
    return output.logits[0].float()


@torch.no_grad()
def _embeddings_error(two: Streams) -> float:
    """Embeddings in the place of ids, which is how pictures come in: those of the ids give the same logits, and a vector that
    belongs to no id can be read as well."""
    masks = attention_masks(text_config(two.trunk), two.layout, slice(None), torch.float32)

    def run(embeds: torch.Tensor) -> torch.Tensor:
        output = two.trunk(inputs_embeds=embeds, attention_mask=masks, position_ids=two.layout.position, use_cache=False)
        return output.logits.float()

    embeds = two.trunk.get_input_embeddings()(two.ids)
    error = spread(run(embeds) - two.logits(), two.logits())
    with_picture = run(torch.cat([embeds[:, 1:2] + embeds[:, 2:3], embeds[:, 1:]], 1))
    return error if bool(with_picture.isfinite().all()) else float("inf")


@contextmanager
def head_on(trunk: PreTrainedModel, rows: torch.Tensor) -> Iterator[None]:
    """The head of the trunk runs on some rows only, as in the DiffVL model."""
    head: Any = trunk.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][rows][None],))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _rows_error(two: Streams) -> float:
    """The head on some rows only, as decoding asks for it."""
    rows = two.layout.noisy.bool() & two.layout.valid
    with head_on(two.trunk, rows):
        some = forward(two.trunk, two.ids, two.layout).logits[0].float()
    return spread(some - two.logits()[rows], two.logits())


@torch.no_grad()
def _chunks_error(two: Streams) -> float:
    """The head apart from the rest of the model, as the loss asks for it."""
    rows = two.layout.noisy.bool() & two.layout.valid
    flat = rows.flatten().nonzero()[:, 0]
    some = mapped_rows(two.trunk, lambda: forward(two.trunk, two.ids, two.layout), flat, lambda logits, _: logits.float())
    return spread(some - two.logits()[rows], two.logits())


def _gradients(two: Streams) -> Check:
    """Backward of the masked-token loss in training mode: every gradient is finite, and the mask token gets one."""
    trunk, mask_id = two.trunk, vocabulary(two.trunk) - 1
    masked = two.ids == mask_id
    truth = torch.cat([two.ids[:, : two.clean], two.ids[:, : two.clean].gather(1, two.stream.source)], 1)
    trunk.train()
    try:
        with torch.random.fork_rng(devices=[]):
            logits = forward(trunk, two.ids, two.layout).logits.float()
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
    """One more row in the embedding table: the other logits stay, and the new token can be read."""
    before = Streams.of(trunk, "block")
    expected, size = before.logits(), vocabulary(trunk)
    trunk.resize_token_embeddings(size + 1, mean_resizing=False)
    error = spread(before.logits()[..., :size] - expected, expected)
    read = before.logits(torch.where(before.ids == size - 1, size, before.ids))
    return error if bool(read.isfinite().all()) and read.shape[-1] == size + 1 else float("inf")


# --- references, written out token by token ------------------------------------------------------------------------------


@torch.no_grad()
def _direct_error(two: Streams) -> float:
    """Each noisy block against a forward over the clean text before it and itself, one stream, nothing twice."""
    expected, tokens, worst = two.logits()[0], tokens_of(two), 0.0
    for block in two.noisy_blocks():
        prefix = [token for token in tokens if not token.noisy and token.block < block]
        own = [token for token in tokens if token.noisy and token.block == block]

        def sees(q: Token, k: Token) -> bool:
            whole_block = q.noisy or two.layout.context == "block"
            return k.position <= q.position or (whole_block and k.block == q.block)

        logits = plain_forward(two.trunk, prefix + own, sees)[len(prefix) :]
        worst = largest([worst, spread(logits - expected[[token.place for token in own]], expected)])
    return worst


@torch.no_grad()
def _doubled_error(two: Streams) -> float:
    """The published form: the whole clean text once more as the noisy stream, prompts included."""
    expected, tokens = two.logits()[0], tokens_of(two)
    clean, noisy = ([token for token in tokens if token.noisy == kind] for kind in (False, True))
    answered = {token.block for token in noisy}
    prompts = [Token(t.id, t.position, t.block, True, -1) for t in clean if t.block not in answered]
    second = sorted(prompts + noisy, key=lambda token: token.position)

    def sees(q: Token, k: Token) -> bool:
        if k.noisy:
            return q.noisy and q.block == k.block
        if q.noisy:
            return k.block < q.block
        return k.position <= q.position or (two.layout.context == "block" and k.block == q.block)

    logits = plain_forward(two.trunk, clean + second, sees)[len(clean) :]
    places = [number for number, token in enumerate(second) if token.place >= 0]
    return spread(logits[places] - expected[[second[number].place for number in places]], expected)
