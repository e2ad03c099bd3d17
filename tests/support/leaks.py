"""Whether a block's prediction moves with its own clean tokens, in a chat with images."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import objective
from shared_fixtures import Loaded
from train_and_decode import training_sample

from diffvl.data.samples import Sample, collate
from diffvl.hub import layout_diffvl
from diffvl.objective.losses import Draw, block_diffusion


def require_no_leak(loaded: Loaded, chat: list[dict[str, Any]], context: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prediction moves; and one does where a rule is built that lets a noisy block see its clean copy."""
    assert leak(loaded, chat, context) == 0.0
    rule = layout_diffvl.attends

    def leaking(q: dict[str, torch.Tensor], k: dict[str, torch.Tensor], *more: Any) -> torch.Tensor:
        own = q["noisy"].bool() & ~k["noisy"].bool() & (k["block"] == q["block"]) & (k["document"] == q["document"])
        return rule(q, k, *more) | own

    monkeypatch.setattr(layout_diffvl, "attends", leaking)
    assert leak(loaded, chat, context) > 0.01


def leak(loaded: Loaded, chat: list[dict[str, Any]], context: str) -> float:
    """How far the loss terms of the first answer's blocks move when a clean token of a later block changes."""
    sample = training_sample(loaded[1], chat, 3)
    last = max(place for place, mark in enumerate(sample.answer) if mark)  # in the last block, whatever its size
    changed = [*sample.ids[:last], (sample.ids[last] + 1) % 200, *sample.ids[last + 1 :]]
    logits = [noisy_logits(loaded[0], replace(sample, ids=ids), context) for ids in (sample.ids, changed)]
    return float((logits[0] - logits[1]).abs().max())


@torch.no_grad()
def noisy_logits(model: Any, sample: Sample, context: str) -> torch.Tensor:
    """Training's logits of a sample of which all answers are masked."""
    settings = objective(block_size=4, context=context, grid="response", noise={"schedule": "full"})
    batch: Any = collate([[sample]], pad_token_id=0)
    seen: list[torch.Tensor] = []

    def spy(**given: Any) -> Any:
        judge = given.pop("row_map")
        output = model(**given)
        seen.append(output.logits)
        output.logits = judge(output.logits, slice(0, len(output.logits)))
        return output

    spy.images = model.images  # type: ignore[attr-defined]
    block_diffusion(spy, model.config, batch, settings, Draw(1, 0, 0.0))
    return seen[0]
