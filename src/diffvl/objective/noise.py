"""The forward process: a mask ratio t for every block, then a mask for every eligible token. Absorbing masks only.

Asynchronous block-wise noise (SDAR-VL, arXiv 2512.14068, Eq. 3): t is independent from block to block, so it cannot depend
on a block's place in the sequence. (The public DiffusionVL code lays stratified draws out in block order, which makes t a
ramp over the sequence; here stratified draws are permuted, and `ramp` is there to reproduce it.) Every draw comes from a
generator seeded by (seed, step, sample): the same after a resume and on any number of processes.

Equations with their sources and tests: docs/objective.md. Shapes: K noisy blocks and R noisy tokens of one sample.
"""

import math
from functools import lru_cache

import torch

from diffvl.config.objectives import BetaNoise, ClampNoise, FullNoise, Noise, RampNoise


def mask_ratios(
    noise: Noise, index_K: torch.Tensor, num_blocks: int, progress: float, generator: torch.Generator
) -> torch.Tensor:
    """Draws t for each noisy block of one sample, [K] in fp64.

    Args:
        index_K: the numbers of the noisy blocks among the blocks of the whole sample; only their count matters, but for ramp.
        num_blocks: of the whole sample.
        progress: optimiser steps done / steps of the stage, 0 to 1; moves the Beta curriculum.
    """
    count = len(index_K)
    if isinstance(noise, FullNoise):
        return torch.ones(count, dtype=torch.float64)
    if isinstance(noise, RampNoise):
        u = (index_K + torch.rand(count, generator=generator, dtype=torch.float64)) / max(num_blocks, 1)
        return noise.t_min + (noise.t_max - noise.t_min) * u
    u = _shares(count, noise.draws, generator)
    if isinstance(noise, BetaNoise):
        return _beta_quantiles(*beta_curriculum(noise, progress), u).clamp(noise.t_min, 1.0)
    if isinstance(noise, ClampNoise):
        return u.clamp(noise.t_min, noise.t_max)
    return noise.t_min + (noise.t_max - noise.t_min) * u


def beta_curriculum(noise: BetaNoise, progress: float) -> tuple[float, float]:
    """Gives mean and concentration at a point of the stage (SDAR-VL's progressive Beta noise curriculum)."""
    way = min(max(progress / noise.until, 0.0), 1.0)
    if noise.curve == "cosine":
        way = (1 - math.cos(math.pi * way)) / 2
    mean = noise.mean_start + (noise.mean_end - noise.mean_start) * way
    concentration = noise.concentration_start + (noise.concentration_end - noise.concentration_start) * way
    return mean, concentration


def noise_state(noise: Noise, progress: float) -> dict[str, float]:
    """Tells what a checkpoint records of the law of t at a point of the stage; empty for a law that does not move."""
    if not isinstance(noise, BetaNoise) or not noise.moves:
        return {}
    mean, concentration = beta_curriculum(noise, progress)
    return {"mean": mean, "concentration": concentration}


def mask_probabilities(t_K: torch.Tensor, block_R: torch.Tensor, eligible_R: torch.Tensor, position_bias: float) -> torch.Tensor:
    """Computes the probability with which each token is masked, [R] in fp64: t of its block, or with a bias

        p_i = sigmoid(logit(t) + c + position_bias * u_i)

    where u_i runs from -1/2 to 1/2 over the eligible tokens of the block and c is such that their mean p_i is t. A positive
    bias masks later tokens more often. What is not eligible keeps t.

    Args:
        block_R: index into t_K for each token, never falling.
    """
    p_R = t_K[block_R]
    if position_bias == 0.0 or len(t_K) == 0:
        return p_R
    blocks, kind = len(t_K), {"dtype": torch.float64, "device": t_K.device}
    eligible = eligible_R.to(torch.float64)
    count_K = torch.zeros(blocks, **kind).index_add_(0, block_R, eligible)
    before_K = count_K.cumsum(0) - count_K
    rank_R = eligible.cumsum(0) - 1 - before_K[block_R]
    # A block's only eligible token stands in the middle: it is masked with t.
    u_R = torch.where(count_K[block_R] > 1, rank_R / (count_K[block_R] - 1).clamp_min(1) - 0.5, 0.0)
    at_R = torch.logit(p_R) + position_bias * u_R
    # The mean rises with c, and |position_bias| / 2 either way is too far, so halving that interval finds c to the last bit.
    low_K, high_K = torch.full((blocks,), -abs(position_bias) / 2, **kind), torch.full((blocks,), abs(position_bias) / 2, **kind)
    for _ in range(_HALVINGS):
        c_K = (low_K + high_K) / 2
        sum_K = torch.zeros(blocks, **kind).index_add_(0, block_R, torch.sigmoid(at_R + c_K[block_R]) * eligible)
        too_low_K = sum_K < t_K * count_K
        low_K, high_K = torch.where(too_low_K, c_K, low_K), torch.where(too_low_K, high_K, c_K)
    return torch.where(eligible_R, torch.sigmoid(at_R + low_K[block_R]), p_R)


def masked_tokens(p_R: torch.Tensor, eligible_R: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Masks each eligible token with its own probability; bool [R], True = masked."""
    u = torch.rand(len(p_R), generator=generator, dtype=torch.float64)
    return (u < p_R) & eligible_R


_HALVINGS = 56  # of an interval of at most 8: down to the rounding of fp64


def _shares(count: int, draws: str, generator: torch.Generator) -> torch.Tensor:
    """Makes `count` draws from U(0, 1): independent, one in each of `count` equal strata in random order, or one for all."""
    if draws == "synchronous":
        return torch.rand(1, generator=generator, dtype=torch.float64).repeat(count)
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if draws == "independent":
        return u
    return (torch.randperm(count, generator=generator) + u) / max(count, 1)


# Cells of the grid on which the Beta law is inverted; the error of a draw is below 1e-4.
_BETA_CELLS = 20_000


def _beta_quantiles(mean: float, concentration: float, u: torch.Tensor) -> torch.Tensor:
    """Finds where the distribution function of Beta(mean C, (1 - mean) C) is u: its inverse, because torch's own Beta draws take
    no generator and cannot be stratified."""
    theta, distribution = _beta_distribution(mean, concentration)
    right = torch.searchsorted(distribution, u, right=True).clamp(1, len(theta) - 1)
    low, high = distribution[right - 1], distribution[right]
    part = (u - low) / (high - low).clamp_min(1e-300)
    return (theta[right - 1] + part * (theta[right] - theta[right - 1])).sin() ** 2


@lru_cache(maxsize=8)
def _beta_distribution(mean: float, concentration: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges of cells in theta, with x = sin^2(theta), and the distribution function there. The same for all samples of a step.

    In theta the density is sin^(2 alpha - 1) cos^(2 beta - 1), which is infinite at an end whose shape is below a half. So the
    integral runs from both ends to the middle, and over each cell the power of the distance from the end is taken exactly.
    """
    alpha, beta = mean * concentration, (1 - mean) * concentration
    edges = torch.linspace(0, torch.pi / 4, _BETA_CELLS // 2 + 1, dtype=torch.float64)
    log_mass = torch.cat([_log_cells(edges, 2 * alpha, 2 * beta), _log_cells(edges, 2 * beta, 2 * alpha).flip(0)])
    mass = (log_mass - log_mass.max()).exp()
    distribution = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    return torch.cat([edges, torch.pi / 2 - edges[:-1].flip(0)]), distribution / distribution[-1]


def _log_cells(edges: torch.Tensor, near: float, far: float) -> torch.Tensor:
    """Computes the log of the integral of sin^(near - 1) cos^(far - 1) over each cell of [0, pi / 4]."""
    left, right = edges[:-1], edges[1:]
    middle = (left + right) / 2
    power = near * right.log() + torch.log1p(-((left / right) ** near)) - math.log(near)
    return power + (near - 1) * (middle.sin() / middle).log() + (far - 1) * middle.cos().log()
