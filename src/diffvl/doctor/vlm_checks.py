"""What must hold of a vision-language model before block diffusion can be put on it: the demands of `checks`, with images.

Place in the flow: `doctor` builds the copy (`tiny_vlm`) and asks here. What is run is what will be shipped (`vlm_probe`); the
references ask the stock model alone (`vlm_reference`). How clean image tokens see each other is found out first: of the rules
that the hub knows, the one under which explicit masks give the model's own logits.

Shapes: B conversations, L clean length, T = all tokens of a row, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from diffvl.doctor.checks import MODEL_FAULTS, Check, above, below, cached_blocks_error, describe_fault, leaky, run_check
from diffvl.doctor.vlm_pixels import Pixels
from diffvl.doctor.vlm_probe import MASK, SINGLE, TOKENS, VlmProbe, conversation, image_sizes, permitted, shipped
from diffvl.doctor.vlm_reference import direct_logits, native_pass, native_positions
from diffvl.hub.cache_diffvl import BlockCache
from diffvl.hub.images_diffvl import Shown, placed_images, vision_parameters
from diffvl.hub.layout_diffvl import IMAGE_ATTENTION, Layout, clean_layout
from diffvl.hub.masks_diffvl import attention_masks, block_kernels
from diffvl.hub.spans_diffvl import span_ids
from diffvl.objective.packing import pack
from diffvl.prepare.attention_proof import GRIDS, largest, smallest, spread


@dataclass(frozen=True)
class Findings:
    """rule: how image tokens see each other, one of IMAGE_ATTENTION; "" where none of them is the model's."""

    rule: str
    checks: list[Check]


def run_vlm_checks(source: PreTrainedModel, pixels: Pixels) -> Findings:
    """Runs every check, each for all contexts; weights are left as they were, the embedding table is one row longer."""
    alone = run_check("own forward", lambda: _own_forward(source, pixels))
    if not alone.passed:
        return Findings("", [alone])
    rule, parity = find_rule(source, pixels)
    if not parity.passed:
        return Findings("", [alone, parity])
    model = shipped(source, pixels, rule)
    try:
        both = [VlmProbe.make(model, pixels, context) for context in GRIDS]
    except MODEL_FAULTS as error:
        return Findings(rule, [alone, parity, Check("layout", False, None, "runs", describe_fault(error))])
    last = both[-1]
    checks: dict[str, Callable[[], Check]] = {
        "position ids": lambda: below("position ids", _positions_error(last)),
        "images show": lambda: above("images show", _images_effect(last)),
        "no leak": lambda: below("no leak", largest(leak(probe) for probe in both)),
        "a leak is caught": lambda: above("a leak is caught", smallest(leak(_leaking(probe)) for probe in both)),
        "block sees itself": lambda: above("block sees itself", smallest(both_ways(probe) for probe in both)),
        "clean stream untouched": lambda: below("clean stream untouched", largest(_clean_error(probe) for probe in both)),
        "direct forward": lambda: below("direct forward", largest(_direct_error(probe) for probe in both)),
        "train = decode": lambda: below("train = decode", largest(_decoding_error(probe) for probe in both)),
        "image cut in two": lambda: below("image cut in two", _cut_error(last)),
        "packed in one row": lambda: below("packed in one row", largest(_packing_error(probe) for probe in both)),
        "head on some rows": lambda: below("head on some rows", _rows_error(last)),
        "head in chunks": lambda: below("head in chunks", _chunks_error(last)),
        "gradients": lambda: _gradients(last),
        "new token": lambda: below("new token", _new_token_error(last)),
    }
    return Findings(rule, [alone, parity, *(run_check(name, check) for name, check in checks.items())])


# --- how image tokens see each other ---------------------------------------------------------------------------------------


@torch.no_grad()
def _own_forward(source: PreTrainedModel, pixels: Pixels) -> Check:
    """Runs the stock model by itself: logits must be finite numbers, or nothing can be said of it."""
    model = shipped(source, pixels)
    ids, answer = (part[None] for part in conversation(SINGLE, image_sizes(model, pixels), model.config.image_token_id))
    logits, _ = native_pass(source, ids, answer, pixels)
    fault = "" if bool(logits.isfinite().all()) else "its logits are no finite numbers"
    return Check("own forward", not fault, None, "finite", fault)


@torch.no_grad()
def find_rule(source: PreTrainedModel, pixels: Pixels) -> tuple[str, Check]:
    """Finds the rule under which explicit masks and position ids give the stock model's own logits, on a conversation with two
    images, and on one without any."""
    best, least = "", Check("AR parity", False, None, "runs")
    for rule in IMAGE_ATTENTION:
        found = run_check("AR parity", lambda rule=rule: below("AR parity", parity_error(source, pixels, rule)))
        if found.passed:
            return rule, found if rule == "causal" else _long_enough(source, pixels, found)
        if least.error is None or (found.error is not None and found.error < least.error):
            best, least = rule, found
    return best, least


def _long_enough(source: PreTrainedModel, pixels: Pixels, parity: Check) -> Check:
    """Refuses a finding on images that all fit in the window: they do not show how span and window meet."""
    window = getattr(source.config.get_text_config(decoder=True), "sliding_window", None)
    longest = max(image_sizes(shipped(source, pixels), pixels))
    if window is None or longest > window:
        return parity
    fault = f"images of {longest} tokens are not longer than the window of {window}: how they meet cannot be told"
    return Check(parity.name, False, None, parity.wanted, fault)


@torch.no_grad()
def parity_error(source: PreTrainedModel, pixels: Pixels, rule: str) -> float:
    """Compares the shipped form with the stock forward, which makes masks and position ids by itself."""
    model = shipped(source, pixels, rule)
    errors = []
    for chat, images in ((SINGLE, pixels), (tuple(piece for piece in SINGLE if piece[0] != "image"), {})):
        ids, answer = (part[None] for part in conversation(chat, image_sizes(model, pixels), model.config.image_token_id))
        valid = torch.ones_like(ids, dtype=torch.bool)
        rows = model.images.encode(images) if images else None
        layout = clean_layout(torch.zeros_like(ids), valid, "causal")
        layout.image_attention = rule
        layout.span = span_ids(ids == model.config.image_token_id, answer, valid, torch.zeros_like(valid), rule)
        rope = model.images.rope(ids, valid, images, Shown([2 if images else 0], [0]))
        masks = attention_masks(model.config.text_config, layout, slice(None), torch.float32)
        index = placed_images(ids, model.config)
        ours = model(ids, rows=rows, image_index=index, attention_mask=masks, position_ids=rope.at(layout.position)).logits
        native, _ = native_pass(source, ids, answer, images)
        errors.append(spread(permitted(ours) - native, native))
    return largest(errors)


def _positions_error(probe: VlmProbe) -> float:
    """Compares position ids of the clean stream with those that the stock model makes, counted from the first token: where they
    begin does not matter to rotary positions, and to others the parity of logits tells."""
    numbers = native_positions(probe)
    ours = probe.rope[..., :1, : numbers.shape[-1]]
    return float(((ours - ours[..., :1]) - (numbers - numbers[..., :1])).abs().max())


@torch.no_grad()
def _images_effect(probe: VlmProbe) -> float:
    """Measures how far other images move the logits of the text behind them."""
    before = probe.logits()
    pixels = {name: value.flip(-1) if value.is_floating_point() else value for name, value in probe.pixels.items()}
    moved = probe.changed(rows=probe.model.images.encode(pixels)).logits() - before
    return spread(moved[0, probe.clean_length - 1], before)


# --- checks with training's own masks --------------------------------------------------------------------------------------


def _leaking(probe: VlmProbe) -> VlmProbe:
    return probe.changed(layout=leaky(probe.layout))


def leak(probe: VlmProbe) -> float:
    """Measures how far the noisy logits of a block move when its own clean tokens and all later ones change, and which images
    these show; the largest."""
    before, clean, worst = probe.logits(), probe.is_clean(), 0.0
    is_text = probe.image_index < 0
    for block in probe.noisy_blocks():
        later = clean & (probe.layout.block >= block)
        other = (probe.ids + 1 - TOKENS.start) % len(TOKENS) + TOKENS.start
        shown = torch.where(later & ~is_text, probe.rows.total - 1 - probe.image_index, probe.image_index)
        changed = probe.changed(ids=torch.where(later & is_text, other, probe.ids), image_index=shown)
        worst = largest([worst, spread((changed.logits() - before)[probe.own_block(block)], before)])
    return worst


def both_ways(probe: VlmProbe) -> float:
    """Measures how far the first token of a noisy block moves with the last one; the largest of the blocks."""
    before, moves = probe.logits(), []
    for block in probe.noisy_blocks():
        places = probe.own_block(block)[0].nonzero()[:, 0]
        other = probe.ids.clone()
        other[0, places[-1]] = TOKENS.start + (other[0, places[-1]] == TOKENS.start)
        if len(places) > 1:
            moves.append(spread((probe.changed(ids=other).logits() - before)[0, places[0]], before))
    return largest(moves)


def _clean_part(probe: VlmProbe) -> VlmProbe:
    part = slice(0, probe.clean_length)
    rows = {"ids": probe.ids[:, part], "image_index": probe.image_index[:, part], "rope": probe.rope[..., part]}
    return probe.changed(layout=probe.layout.part(part), **rows)


def _clean_error(probe: VlmProbe) -> float:
    """Compares the clean stream that has the noisy one after it with the clean stream alone."""
    alone, valid = _clean_part(probe).logits(), probe.layout.valid[:, : probe.clean_length]
    return spread(probe.logits()[:, : probe.clean_length][valid] - alone[valid], alone[valid])


def _direct_error(probe: VlmProbe) -> float:
    """Compares each noisy block with a forward of the stock model over the clean text before it and itself."""
    expected, numbers, worst = probe.logits()[0], native_positions(probe), 0.0
    for block in probe.noisy_blocks():
        logits, places = direct_logits(probe, block, numbers)
        worst = largest([worst, spread(logits - expected[places], expected)])
    return worst


@torch.no_grad()
def _cached(probe: VlmProbe, cache: BlockCache, past: torch.Tensor, fresh: torch.Tensor, store: bool | int) -> torch.Tensor:
    """Computes the logits of the first conversation's tokens at `fresh` over the cached ones at `past`, as the decoder asks for
    them: where nothing is stored, without a mask but for windows."""
    kept = torch.cat([past, fresh])
    layout: Layout = probe.layout.with_rows({name: row[:1, kept] for name, row in probe.layout.rows.items()})
    config, queries = probe.model.config.text_config, slice(len(past), None)
    index = probe.image_index[:1, fresh]
    shown: dict[str, Any] = {"rows": probe.rows, "image_index": index} if bool((index >= 0).any()) else {"text_only": True}
    cache.store = store
    with block_kernels(probe.source):
        output = probe.model(
            probe.ids[:1, fresh],
            attention_mask=attention_masks(config, layout, queries, torch.float32, sees_all=store is False),
            position_ids=probe.rope[..., :1, fresh],
            past_key_values=cache,
            use_cache=True,
            **shown,
        )
    return permitted(output.logits)[0]


def _decoding_error(probe: VlmProbe) -> float:
    """Compares the noisy logits of each block of the first conversation with those over a cache; see `cached_blocks_error`."""
    return cached_blocks_error(probe.layout.selected(torch.tensor([0])), probe.logits()[0], partial(_cached, probe))


def _cut_error(probe: VlmProbe) -> float:
    """Compares the clean stream in two cached forwards, the first of which ends inside an image, with one forward. A span of the
    stock model's that lies across the cut is two spans here, in both."""
    clean = _clean_part(probe)
    middle = int((clean.image_index[0] >= 0).nonzero()[0, 0]) + 1
    layout = clean.layout.part(slice(None))
    if layout.span is not None:
        layout.span = torch.where(torch.arange(layout.span.shape[1]) < middle, layout.span, layout.span + layout.span.max())
        layout.span = torch.where(clean.layout.span == 0, 0, layout.span)
    clean = clean.changed(layout=layout)
    whole, valid = clean.logits()[0], clean.layout.valid[0].nonzero()[:, 0]
    cache, nothing = BlockCache(), torch.zeros(0, dtype=torch.long)
    parts = [_cached(clean, cache, nothing, valid[:middle], True), _cached(clean, cache, valid[:middle], valid[middle:], True)]
    return spread(torch.cat(parts) - whole[valid], whole)


@torch.no_grad()
def _packing_error(probe: VlmProbe) -> float:
    """Compares the conversations side by side in one row with each in a row of its own."""
    packed = pack(probe.layout, torch.zeros(len(probe.ids), dtype=torch.long))
    row = probe.changed(
        layout=packed.layout,
        ids=packed.moved(probe.ids, 0),
        image_index=packed.moved(probe.image_index, -1),
        rope=packed.moved(probe.rope, 0),
    )
    alone, valid = probe.logits(), probe.layout.valid
    together = row.logits().flatten(0, 1)[packed.place[valid]]
    return spread(together - alone[valid], alone[valid])


@torch.no_grad()
def _rows_error(probe: VlmProbe) -> float:
    """Runs the head on some rows only, as decoding asks for it."""
    rows = probe.layout.noisy.bool() & probe.layout.valid
    some = permitted(probe.forward(logits_rows=rows).logits)
    return spread(some - probe.logits()[rows], probe.logits())


@torch.no_grad()
def _chunks_error(probe: VlmProbe) -> float:
    """Runs the head apart from the rest of the model, as the loss asks for it."""
    rows = probe.layout.noisy.bool() & probe.layout.valid
    some = probe.forward(logits_rows=rows, row_map=lambda logits, _: logits).logits
    return spread(permitted(some) - probe.logits()[rows], probe.logits())


def _gradients(probe: VlmProbe) -> Check:
    """Runs backward of the masked-token loss in training mode, with frozen vision: gradients of the text part are finite, the
    mask token gets one, vision none, and nothing moves by itself."""
    model, source, masked = probe.model, probe.source, probe.ids == MASK
    truth = torch.cat([probe.ids[:, : probe.clean_length], probe.ids[:, : probe.clean_length].gather(1, probe.stream.source)], 1)
    vision = vision_parameters(source)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    for parameter in vision.values():
        parameter.requires_grad_(False)
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            cross_entropy(permitted(probe.forward(encode=True).logits)[masked], truth[masked]).backward()
        fault = _wrong_gradients(source, vision)
        moved = [name for name, value in source.state_dict().items() if not torch.equal(value, before[name])]
        fault = fault or (f"a forward changes {', '.join(moved[:3])}" if moved else "")
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
        for parameter in vision.values():
            parameter.requires_grad_(True)
        source.load_state_dict(before)
    return Check("gradients", not fault, None, "finite", fault)


def _wrong_gradients(source: Any, vision: dict[str, torch.nn.Parameter]) -> str:
    gradients = {name: parameter.grad for name, parameter in source.named_parameters() if parameter.grad is not None}
    if bad := [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]:
        return f"not finite: {', '.join(bad[:3])}"
    if bad := sorted(set(gradients) & set(vision)):
        return f"of frozen parameters: {', '.join(bad[:3])}"
    reached = source.get_input_embeddings().weight.grad
    return "the mask token gets no gradient" if reached is None or float(reached[MASK].abs().max()) == 0.0 else ""


@torch.no_grad()
def _new_token_error(probe: VlmProbe) -> float:
    """Adds one row to the embedding table: the other logits stay, and the new token can be read."""
    before, source = probe.logits(), probe.source
    size = source.get_input_embeddings().weight.shape[0]
    source.resize_token_embeddings(size + 1, mean_resizing=False)
    error = spread(probe.logits()[..., :size] - before, before)
    read = probe.changed(ids=torch.where(probe.ids == MASK, size, probe.ids)).logits()
    return error if bool(read.isfinite().all()) and read.shape[-1] == size + 1 else float("inf")
