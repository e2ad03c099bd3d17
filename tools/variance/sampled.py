"""Variance and bias of the gradient estimate of a small trunk, sampled through the objective that is trained.

A few answers are noised again and again; every sample of a batch is one of them under another draw. One backward pass gives the
gradient of each sample: samples do not mix, so a projection's gradient for a sample is the product of its input and of the
gradient of its output. Measured are the projections of all layers, attention and MLP. Variances and squared means are those of
one answer's gradient, averaged over the answers.

Shapes: A answers, G batches, P parameters, B samples of a batch, T tokens, I and O widths in and out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from diffvl.bench.random_model import NUM_SPECIAL, TrunkSize, build_model
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.data.samples import Batch, Sample, collate
from diffvl.objective.losses import Draw, block_diffusion

BATCH = 64  # samples of a batch, a multiple of the answers
TRUNK = TrunkSize(hidden=32, layers=2, heads=2, kv_heads=2, intermediate=64, vocabulary=28)
STD = TRUNK.hidden**-0.5  # of the random weights; transformers' 0.02 would make the attention of every token the same
PROMPT = 16  # tokens before the answer
FOLLOWS = 0.8  # probability that a token is followed by its own successor
FIT_STEPS, FIT_BATCH, FIT_RATE = 150, 16, 3e-3


class Texts:
    """Random samples in which every token has one likely successor, the same in all of them: something can be learned."""

    def __init__(self, answer_tokens: int, seed: int) -> None:
        self.answer_tokens = answer_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.num_ordinary = TRUNK.vocabulary - NUM_SPECIAL
        self.successor = torch.randperm(self.num_ordinary, generator=self.generator)

    def sample(self) -> Sample:
        """Draws the next sample."""
        length = PROMPT + self.answer_tokens
        surprise = torch.randint(0, self.num_ordinary, (length,), generator=self.generator)
        follows = torch.rand(length, generator=self.generator) < FOLLOWS
        ids = [int(surprise[0])]
        for place in range(1, length):
            ids.append(int(self.successor[ids[-1]]) if follows[place] else int(surprise[place]))
        return Sample(ids, [0] * PROMPT + [1] * self.answer_tokens, None, 0)


def random_trunk(seed: int) -> Any:
    """Builds the small model with random weights."""
    return build_model(TRUNK, torch.device("cpu"), torch.float32, seed, std=STD)


def fit(model: Any, texts: Texts, objectives: list[BlockDiffusionObjective]) -> float:
    """Trains the model a little, under each objective in turn; returns the loss per answer token of the last step."""
    optimiser = torch.optim.Adam(model.parameters(), lr=FIT_RATE)
    loss = 0.0
    for step in range(FIT_STEPS):
        batch = batch_of([texts.sample() for _ in range(FIT_BATCH)])
        output = block_diffusion(model, model.config, batch, objectives[step % len(objectives)], Draw(0, step, 0.0))
        mean = output.loss / (FIT_BATCH * texts.answer_tokens)
        mean.backward()
        optimiser.step()
        optimiser.zero_grad()
        loss = float(mean.detach())
    return loss


def batch_of(samples: list[Sample]) -> Batch:
    """Collates samples, numbered, so that each has its own noise."""
    numbered = [[replace(sample, index=number)] for number, sample in enumerate(samples)]
    return collate(numbered, pad_token_id=0)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Gradients:
    """Sums over the samples of each answer in each batch: gradient [A, G, P], squared norm [A, G]. draws: samples of one answer
    in a batch. masked, tokens: of a sample, on average."""

    sums: torch.Tensor
    squares: torch.Tensor
    draws: int
    masked: float
    tokens: float

    def without(self, number: int) -> "Gradients":
        """Leaves one batch out."""
        keep = torch.arange(self.sums.shape[1]) != number
        return replace(self, sums=self.sums[:, keep], squares=self.squares[:, keep])

    @property
    def count(self) -> int:
        return self.draws * self.sums.shape[1]

    def mean(self) -> torch.Tensor:
        """Returns the mean gradient of each answer, [A, P]."""
        return self.sums.sum(1) / self.count

    def variance(self) -> float:
        """Returns the trace of the covariance."""
        return float((self.squares.sum(1) - self.count * (self.mean() ** 2).sum(1)).mean()) / (self.count - 1)

    def signal(self) -> float:
        """Returns the squared norm of the expectation, without what the scatter of the draws adds to it."""
        return float((self.mean() ** 2).sum(1).mean()) - self.variance() / self.count

    def noise_to_signal(self) -> float:
        return self.variance() / self.signal()

    def standard_error(self) -> float:
        """Estimates the error of `noise_to_signal` by leaving out one batch at a time."""
        count = self.sums.shape[1]
        without = torch.tensor([self.without(number).noise_to_signal() for number in range(count)])
        return float(((count - 1) * without.var(correction=0)).sqrt())


def sample_gradients(
    model: Any, answers: list[Sample], objective: BlockDiffusionObjective, progress: float, seed: int, batches: int
) -> Gradients:
    """Draws gradients of the loss of each answer, under BATCH / A draws of noise in each batch."""
    draws = BATCH // len(answers)
    batch = batch_of([answer for answer in answers for _ in range(draws)])
    sums, squares, masked, tokens = [], [], 0, 0
    for number in range(batches):
        with _sample_gradients(model) as gradients:
            output = block_diffusion(model, model.config, batch, objective, Draw(seed, number, progress))
            output.loss.backward()
        gradient_ABP = torch.cat([gradients[name] for name in sorted(gradients)], 1).double().unflatten(0, (len(answers), draws))
        sums.append(gradient_ABP.sum(1))
        squares.append((gradient_ABP**2).sum((1, 2)))
        masked, tokens = masked + int(output.sums["predicted"]), tokens + output.tokens
        model.zero_grad()
    drawn = batches * draws * len(answers)
    return Gradients(torch.stack(sums, 1), torch.stack(squares, 1), draws, masked / drawn, tokens / drawn)


@contextmanager
def _sample_gradients(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Collects, in a backward pass in the block, the gradient of each projection for each sample, {name: [B, O * I]}."""
    gradients: dict[str, torch.Tensor] = {}

    def watch(name: str, module: nn.Module) -> Any:
        def forward(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = arguments[0].detach()

            def backward(gradient: torch.Tensor) -> None:
                gradients[name] = torch.einsum("bti,bto->boi", inputs, gradient).flatten(1)

            output.register_hook(backward)

        return module.register_forward_hook(forward)

    layers = [(name, module) for name, module in model.language_model.named_modules() if ".layers." in name]
    hooks = [watch(name, module) for name, module in layers if isinstance(module, nn.Linear)]
    try:
        yield gradients
    finally:
        for hook in hooks:
            hook.remove()
