"""What a vision-language model shows of itself only when it runs: two facts that its masks and position ids depend on.

Place in the flow: `native` and `doctor` ask a loaded model (or its tiny copy) before anything else is measured on it.
"""

from typing import Any

import torch

from diffvl.hub.layout_diffvl import clean_layout
from diffvl.hub.masks_diffvl import attention_masks


@torch.no_grad()
def source_traits(source: Any) -> dict[str, Any]:
    """Gives `masks_at` and `first_position`, as `DiffVLConfig` takes them."""
    return {"masks_at": _masks_at(source), "first_position": _first_position(source)}


def _masks_at(source: Any) -> str:
    """Tells where the model takes a mask for each kind of its layers. Some forwards take one for all, as a tensor, although
    their own layers differ; the text part inside takes what the language model takes."""
    text_config = source.config.get_text_config(decoder=True)
    ids = torch.zeros(1, 2, dtype=torch.long, device=source.device)
    layout = clean_layout(ids, torch.ones_like(ids, dtype=torch.bool), "causal")
    masks = attention_masks(text_config, layout, slice(None), source.dtype)
    if not isinstance(masks, dict):
        return "forward"
    try:
        source(input_ids=ids, attention_mask=masks, position_ids=layout.position, use_cache=False)
    except (AttributeError, TypeError):  # a dict has nothing of a tensor
        return "text_part"
    return "forward"


def _first_position(source: Any) -> int:
    """Reads the position id that the model gives the first token of a text; 0 where it leaves that to its text part."""
    seen: dict[str, Any] = {}
    hook = source.get_decoder().register_forward_pre_hook(lambda _, given, named: seen.update(named), with_kwargs=True)
    try:
        source(input_ids=torch.zeros(1, 2, dtype=torch.long, device=source.device), use_cache=False)
    finally:
        hook.remove()
    numbers = seen.get("position_ids")
    return 0 if numbers is None else int(numbers.min())
