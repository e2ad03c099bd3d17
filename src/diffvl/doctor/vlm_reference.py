"""What the references of the checks run: a stock vision-language model, called without anything of ours.

Masks are written out again here, from positions and spans; position ids are those that the stock model makes by itself.

Shapes: L clean tokens of the first conversation, n tokens of a reference, V vocabulary, A rotary axes.
"""

from typing import Any

import torch

from diffvl.doctor.vlm_probe import VlmProbe, permitted, token_types
from diffvl.hub.masks_diffvl import for_layers, masks_for


@torch.no_grad()
def native_pass(source: Any, ids: torch.Tensor, answer: torch.Tensor, pixels: dict[str, torch.Tensor]) -> Any:
    """Runs the stock model by itself on [1, L] tokens: logits [1, L, V], and the position ids that it gave its text part, [1, L]
    or [A, 1, L], None where it leaves them to that part."""
    seen: dict[str, Any] = {}
    hook = source.get_decoder().register_forward_pre_hook(lambda _, given, named: seen.update(named), with_kwargs=True)
    try:
        output = source(input_ids=ids, **pixels, **token_types(source, ids, answer), use_cache=False)
    finally:
        hook.remove()
    return permitted(output.logits), seen.get("position_ids")


@torch.no_grad()
def native_positions(probe: VlmProbe) -> torch.Tensor:
    """Gives the position ids of the first conversation's clean tokens as the stock model numbers them, [1, L] or [A, 1, L]."""
    valid = probe.layout.valid[0, : probe.clean_length]
    ids = probe.ids[:1, : probe.clean_length][:, valid]
    _, numbers = native_pass(probe.source, ids, torch.zeros_like(ids), probe.pixels)
    if numbers is None:
        return torch.arange(ids.shape[1])[None]
    if numbers.dim() == 3 and probe.rope.dim() == 3:
        return numbers[-len(probe.rope) :]  # some put the index before the axes
    return numbers if numbers.dim() == 2 else numbers[0]


@torch.no_grad()
def direct_logits(probe: VlmProbe, block: int, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the stock model on the clean text before a noisy block and that block, one stream, nothing twice.

    Args:
        numbers: from `native_positions`.
    Returns:
        logits of the block's tokens [n, V], and where these stand in the probe.
    """
    layout, noisy = probe.layout, probe.layout.noisy[0].bool()
    before = layout.valid[0] & ~noisy & (layout.block[0] < block)
    own = probe.own_block(block)[0]
    kept = torch.cat([before.nonzero()[:, 0], own.nonzero()[:, 0]])
    source_place = torch.cat([torch.arange(probe.clean_length), probe.stream.source[0]])[kept]
    after = layout.position[0, kept] - source_place  # padding stops stand behind the token that they repeat
    ids, index = probe.ids[:1, kept], probe.image_index[0, kept]
    given = {"mm_encoder_outputs": {"image": probe.rows.gathered(index[index >= 0])}} if bool((index >= 0).any()) else {}
    with masks_for(probe.source, _masks(probe, kept), probe.model.config.masks_at) as masks:
        output = probe.source(
            input_ids=ids,
            **given,
            **token_types(probe.source, ids, torch.zeros_like(ids)),
            attention_mask=masks,
            position_ids=numbers[..., source_place] + after,
            use_cache=False,
        )
    return permitted(output.logits)[0, int(before.sum()) :], own.nonzero()[:, 0]


def _masks(probe: VlmProbe, kept: torch.Tensor) -> Any:
    """Who sees whom among the tokens of a reference, for every kind of layer."""
    layout, config = probe.layout, probe.model.config.text_config
    place, block, noisy = layout.position[0, kept], layout.block[0, kept], layout.noisy[0, kept].bool()
    span = torch.zeros_like(place) if layout.span is None else layout.span[0, kept]
    one_block = block[:, None] == block[None]
    whole = one_block if layout.context == "block" else one_block & noisy[:, None] & noisy[None]
    sees = (place[None] <= place[:, None]) | whole
    image = (span[:, None] == span[None]) & (span[None] > 0)

    def mask(window: int | None, chunk: int | None) -> torch.Tensor:
        near = torch.ones_like(sees) if window is None else place[None] > place[:, None] - window
        if chunk is not None:
            near = near & (place[None] // chunk == place[:, None] // chunk)
        rule = layout.image_attention
        if rule in ("runs_beyond_window", "prompt"):
            allowed = (sees & near) | image
        elif rule == "runs_sliding" and window is None:
            allowed = sees
        else:
            allowed = (sees | image) & near
        allowed = allowed[None, None]
        return allowed if config._attn_implementation != "eager" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)

    return for_layers(config, mask)
