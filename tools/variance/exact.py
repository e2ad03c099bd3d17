"""Exact variance and bias of loss and gradient on a model so small that every mask can be enumerated.

The model fills in answers of tokens -1 and 1. The log-odds of a masked token are a bias plus, for every visible token of its
block, that token times a weight which depends on their distance. So all blocks share their parameters, and the more of its
block is visible, the more certain a token is, as in a trunk. Cross-entropy and gradient of a block are computed for each of
its 2^D masks. Every distribution of t then gives expectation and variance as sums over masks and over quantiles of t, without
sampling.

Each answer is a sample of its own; their variances and squared means are summed over the answers.

Shapes: A answers, B blocks of an answer, D block size, S = 2^D masks, P components (parameters, or 1 for the loss), N = D + 1
numbers of masked tokens, T quantiles of t, K strata.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from diffvl.config.objectives import Noise
from diffvl.objective.noise import mask_ratios

QUANTILES = 2**13  # of the distribution of t; a multiple of the numbers of blocks, which the strata need
REPEATS = 0.8  # probability with which a token of the answer repeats the one before
COUPLING = {"untrained": 0.0, "fitted": 0.8}  # log-odds from a visible neighbour
DECAY = 0.6  # the part of it that remains one token further away


@dataclass(frozen=True)
class Enumerated:
    """Sums over the masks of each block with m masked tokens, m = 0 to D, of G: the block's cross-entropy or its gradient.

    total [A, B, N, P]: of G. square [A, B, N]: of |G|^2. cross [A, B, N]: of the inner product of G with that of the opposite
    mask.
    """

    block_size: int
    total: torch.Tensor
    square: torch.Tensor
    cross: torch.Tensor

    def bound(self) -> torch.Tensor:
        """Returns G of the bound on each answer's log-likelihood (the integral over t of 1/t times the masked cross-entropy),
        [A, P]: the mean over m = 1 to D of D / m times the mean G with m masked tokens."""
        size = self.block_size
        share_N = torch.tensor([0.0] + [1 / (m * math.comb(size, m)) for m in range(1, size + 1)], dtype=torch.float64)
        return torch.einsum("n,abnp->ap", share_N, self.total)


@dataclass(frozen=True)
class Estimator:
    """The weight that each number of masked tokens gets in expectation: under a distribution of t, a way to draw t for the blocks
    of a sample, and a loss weight.

    mean [T, N]: at each quantile of t, the expected weight of each single mask with m masked tokens. square, cross [N]: of the
    squared weight, and of twice the product of both copies' weights, in the expected squared norm.
    masked_share, blocks_without_mask: of a forward, over all noisy copies together.
    """

    draws: str
    mean: torch.Tensor
    square: torch.Tensor
    cross: torch.Tensor
    masked_share: float
    blocks_without_mask: float


@dataclass(frozen=True)
class Moments:
    """Noise and bias of an estimate. noise_to_signal: trace of the covariance over the squared norm of the mean. scale, cosine:
    the mean against that of the bound: its length along it, and the angle."""

    noise_to_signal: float
    scale: float
    cosine: float


def enumerate_masks(state: str, block_size: int, answers: int, answer_tokens: int, seed: int) -> tuple[Enumerated, Enumerated]:
    """Sums over all masks of all blocks of random answers: for the gradient, and for the loss. `state` names one of COUPLING."""
    token_ABD = random_answers(answers, answer_tokens, seed).view(answers, -1, block_size)
    masked_SD = ((torch.arange(2**block_size)[:, None] >> torch.arange(block_size)) & 1).double()
    count_S = masked_SD.sum(1).long()
    known: dict[tuple[float, ...], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    sums = []
    for token_D in token_ABD.flatten(0, 1):
        name = tuple(token_D.tolist())
        if name not in known:
            gradient, loss = _gradient_and_loss(token_D, masked_SD, COUPLING[state])
            known[name] = (_sums(gradient, count_S), _sums(loss, count_S))
        sums.append(known[name])
    gradient, loss = (
        Enumerated(block_size, *(torch.stack(column).unflatten(0, token_ABD.shape[:2]) for column in zip(*part, strict=True)))
        for part in zip(*sums, strict=True)
    )
    return gradient, loss


def random_answers(answers: int, answer_tokens: int, seed: int) -> torch.Tensor:
    """Draws answers of -1 and 1, [A, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    flips = torch.rand(answers, answer_tokens, generator=generator) > REPEATS
    return 1.0 - 2.0 * (flips.long().cumsum(1) % 2).double()


def _sums(value_SP: torch.Tensor, count_S: torch.Tensor) -> list[torch.Tensor]:
    """Sums the values of one block's masks by their number of masked tokens: total [N, P], square [N], cross [N]."""
    # Flipping the order of the masks turns each into its opposite.
    columns = [value_SP, (value_SP**2).sum(1), (value_SP * value_SP.flip(0)).sum(1)]
    num_counts = int(count_S.max()) + 1
    return [torch.zeros(num_counts, *column.shape[1:], dtype=torch.float64).index_add_(0, count_S, column) for column in columns]


def _gradient_and_loss(token_D: torch.Tensor, masked_SD: torch.Tensor, coupling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the summed cross-entropy of the masked tokens at each mask: its gradient [S, P], for the bias, then for the
    weights of the tokens d places after and d places before, d = 1 to D - 1; and the cross-entropy itself, [S, 1]."""
    size = len(token_D)
    place = torch.arange(size)
    distance_DD = (place[:, None] - place).abs()
    weight_DD = torch.where(distance_DD > 0, coupling * DECAY ** (distance_DD - 1.0), 0.0).double()
    visible_SD = (1 - masked_SD) * token_D
    log_odds = visible_SD @ weight_DD
    residual_SD = (torch.sigmoid(log_odds) - (token_D + 1) / 2) * masked_SD
    columns = [residual_SD.sum(1)]
    for distance in range(1, size):
        columns.append((residual_SD[:, :-distance] * visible_SD[:, distance:]).sum(1))
        columns.append((residual_SD[:, distance:] * visible_SD[:, :-distance]).sum(1))
    loss_S = (functional.softplus(-token_D * log_odds) * masked_SD).sum(1)
    return torch.stack(columns, 1), loss_S[:, None]


def quantiles(noise: Noise, progress: float) -> torch.Tensor:
    """Returns quantiles of the distribution of t, rising, [T]; `noise.draws` must be "stratified"."""
    index = torch.arange(QUANTILES)
    return mask_ratios(noise, index, QUANTILES, progress, torch.Generator().manual_seed(0)).sort().values


def estimator(t_T: torch.Tensor, block_size: int, draws: str, weight: str) -> Estimator:
    """Computes the expected weights of the masks of a block of this size.

    Args:
        draws: as `noise.draws`, or "complementary" for independent draws and a second copy with the opposite masks.
        weight: as in `block_weights` (objective/weights.py).
    """
    m = torch.arange(block_size + 1, dtype=torch.float64)
    share_TN = t_T[:, None] ** m * (1 - t_T[:, None]) ** (block_size - m)  # of each single mask with m masked tokens
    weight_TN = _weights(weight, t_T, m, block_size)
    mean_TN, square_N = share_TN * weight_TN, (share_TN * weight_TN**2).mean(0)
    if draws != "complementary":
        empty = float((1 - t_T).pow(block_size).mean())
        return Estimator(draws, mean_TN, square_N, torch.zeros_like(square_N), float(t_T.mean()), empty)
    # The opposite mask has D - m masked tokens, each with probability 1 - t; flipping puts it under its own number.
    other_TN = _weights(weight, 1 - t_T, block_size - m, block_size)
    mean_TN = (mean_TN + (share_TN * other_TN).flip(1)) / 2
    square_N = (square_N + (share_TN * other_TN**2).mean(0).flip(0)) / 4
    return Estimator(draws, mean_TN, square_N, (share_TN * weight_TN * other_TN / 2).mean(0), 1.0, 0.0)


def moments(masks: Enumerated, weights: Estimator) -> Moments:
    """Computes noise and bias of the sum over an answer's blocks."""
    mean_ABP = torch.einsum("n,abnp->abp", weights.mean.mean(0), masks.total)
    second = float((weights.square * masks.square + weights.cross * masks.cross).sum())
    variance = second - float((mean_ABP**2).sum()) + _between_blocks(masks, weights)
    mean_AP, bound_AP = mean_ABP.sum(1), masks.bound()
    along = float((mean_AP * bound_AP).sum())
    return Moments(
        noise_to_signal=max(variance, 0.0) / float((mean_AP**2).sum()),
        scale=along / float((bound_AP**2).sum()),
        cosine=along / float(mean_AP.norm() * bound_AP.norm()),
    )


def _weights(kind: str, p_T: torch.Tensor, m: torch.Tensor, size: int) -> torch.Tensor:
    """Returns the loss weight of a block with m masked tokens, [T, N]."""
    if kind == "none":
        return torch.ones(len(p_T), len(m), dtype=torch.float64)
    if kind == "1/t":
        return (1 / p_T)[:, None].expand(-1, len(m))
    return (size / m.clamp_min(1)).expand(len(p_T), -1)


def _between_blocks(masks: Enumerated, weights: Estimator) -> float:
    """Sums over pairs of different blocks the covariance of what they add. It comes from the draws of t alone.

    synchronous: the means at the same t. stratified: the means over two different strata, any two alike.
    """
    if weights.draws in ("independent", "complementary"):
        return 0.0
    mean_TN, blocks = weights.mean, masks.total.shape[1]
    unrelated = _pairs(torch.einsum("n,abnp->abp", mean_TN.mean(0), masks.total)[:, :, None])
    if weights.draws == "synchronous":
        moment_NN = mean_TN.T @ mean_TN / len(mean_TN)
        sum_ANP = masks.total.sum(1)
        together = torch.einsum("anp,amp->nm", sum_ANP, sum_ANP) - torch.einsum("abnp,abmp->nm", masks.total, masks.total)
        return float((moment_NN * together).sum()) - unrelated
    strata_KN = mean_TN.view(blocks, -1, mean_TN.shape[1]).mean(1)
    strata_ABKP = torch.einsum("kn,abnp->abkp", strata_KN, masks.total)
    any_two = _pairs(strata_ABKP.sum(2, keepdim=True)) - _pairs(strata_ABKP)
    return any_two / (blocks * (blocks - 1)) - unrelated


def _pairs(x_ABKP: torch.Tensor) -> float:
    """Sums inner products over pairs of different blocks of an answer, at equal k."""
    return float((x_ABKP.sum(1) ** 2).sum() - (x_ABKP**2).sum())
