"""Variance and bias of the gradient estimate of a small trunk, sampled through the objective that is trained.

One answer is noised again and again; every row of a batch is the same sample under another draw. One backward pass gives the
gradient of each row: rows do not mix, so a projection's gradient for a row is the product of what went in and what came back.
Looked at are the projections of all layers, attention and MLP.

Shapes: N draws, P parameters, B rows of a batch, T tokens, I and O widths in and out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffvl.config import BlockDiffusionObjective, UniformNoise
from diffvl.data.chat import Sample
from diffvl.data.collate import Batch, collate
from diffvl.objective import Draw, block_diffusion

ROWS = 64  # of a batch


@dataclass(frozen=True)
class Gradients:
    """Sums over the draws of each batch: gradient [G, P], squared norm [G], and counts over all draws."""

    sums: torch.Tensor
    squares: torch.Tensor
    masked: int

    @property
    def draws(self) -> int:
        return ROWS * len(self.sums)

    def without(self, batch: int) -> "Gradients":
        keep = torch.arange(len(self.sums)) != batch
        return replace(self, sums=self.sums[keep], squares=self.squares[keep])

    def mean(self) -> torch.Tensor:
        return self.sums.sum(0) / self.draws

    def variance(self) -> float:
        """Trace of the covariance."""
        return float(self.squares.sum() - self.draws * (self.mean() ** 2).sum()) / (self.draws - 1)

    def signal(self) -> float:
        """Squared norm of the expectation, without what the draws' scatter adds to it."""
        return float((self.mean() ** 2).sum()) - self.variance() / self.draws


def sample_gradients(model: Any, batch: Batch, objective: BlockDiffusionObjective, progress: float, seed: int, draws: int) -> Gradients:
    """Of the loss of one sample, under `draws` draws of noise, a multiple of ROWS."""
    sums, squares, masked = [], [], 0
    for number in range(draws // ROWS):
        with _row_gradients(model) as rows:
            output = block_diffusion(model, model.config, batch, objective, Draw(seed, number, progress))
            output.loss.backward()
        gradient_BP = torch.cat([rows[name] for name in sorted(rows)], 1).double()
        sums.append(gradient_BP.sum(0))
        squares.append((gradient_BP**2).sum())
        masked += int(output.sums["predicted"])
    model.zero_grad()
    return Gradients(torch.stack(sums), torch.stack(squares), masked)


@contextmanager
def _row_gradients(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, every backward pass leaves the gradient of each projection for each row, {name: [B, O * I]}."""
    found: dict[str, torch.Tensor] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            given = arguments[0].detach()
            output.register_hook(
                lambda gradient: found.__setitem__(name, torch.einsum("bti,bto->boi", given, gradient).flatten(1))
            )

        hooks.append(module.register_forward_hook(forward))

    for name, module in model.language_model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            watch(name, module)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
