"""Tiny models with gated adapters of random weights, which draft nonsense; and drafts that are right as often as a test wants."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_fixtures import Loaded

from diffvl.config.recipe import Lora
from diffvl.hub.drafts_diffvl import Drafter
from diffvl.hub.judge_diffvl import Drafts
from diffvl.store.checkpoint import load_checkpoint
from diffvl.train.gated import add_gated_adapters

LONGEST = 4  # masks of a draft


def gated_model(directory: Path) -> Loaded:
    """A prepared model, with adapters that change what masks say and nothing else."""
    model, processor = load_checkpoint(directory)
    model.eval().requires_grad_(False)
    model.config.set_decoding("blocks", LONGEST, "causal", "response", "shift")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft says that it sets it, for gpt2's layers
        torch.manual_seed(1)
        add_gated_adapters(model, Lora(rank=4), "all-linear")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3)
    return model, processor


def gated_models(prepared: Callable[[str], Path]) -> Callable[[str], Loaded]:
    return cache(lambda model_type: gated_model(prepared(model_type)))


def guess_well(
    patch: pytest.MonkeyPatch, truths: list[list[int]], rate: float = 0.7, numbers: dict[Any, int] | None = None
) -> None:
    """Lets drafts be the true answers of a batch, but for some of their tokens. numbers: which answer is whose, where samples are
    not their own numbers."""
    longest = max(map(len, truths)) + LONGEST + 2
    truth = torch.tensor([answer + [0] * (longest - len(answer)) for answer in truths])
    generator = torch.Generator().manual_seed(0)

    def told(self: Drafter, drafts: Drafts, at_B: torch.Tensor, following_B: torch.Tensor) -> Drafts:
        prompt: Any = self.decoder.prompt
        first = at_B + 1 - prompt.length_B
        place = (first[:, None] + torch.arange(drafts.ids.shape[1])).clamp(0, longest - 1)
        rows = [one if numbers is None else numbers[one] for one in self.answers.live]
        ids = truth[rows].gather(1, place)
        wrong = torch.rand(ids.shape, generator=generator) > rate
        return replace(drafts, ids=torch.where(wrong, (ids + 1) % 200, ids))

    patch.setattr(Drafter, "_refined", told)
