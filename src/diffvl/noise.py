"""The forward process: a mask ratio t for every block, then a mask for every eligible token. Absorbing masks only.

Asynchronous block-wise noise (SDAR-VL, arXiv 2512.14068, Eq. 3): t is independent from block to block, so it cannot depend
on a block's place in the sequence. (The public DiffusionVL code lays stratified draws out in block order, which makes t a
ramp over the sequence; here stratified draws are permuted.) Every draw comes from a generator seeded by (seed, step,
sample): the same after a resume and on any number of processes.

Shapes: K blocks of one sample, R noisy tokens of one sample.
"""

import hashlib

import torch

from diffvl.config import BetaNoise, FullNoise, Noise, UniformNoise


def sample_generator(seed: int, step: int, sample: int) -> torch.Generator:
    """A CPU generator for one sample in one optimiser step. Its seed is a hash, so that neighbours do not correlate."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def mask_ratios(noise: Noise, blocks: int, progress: float, generator: torch.Generator) -> torch.Tensor:
    """t for each block of one sample, [K] in fp64.

    Args:
        progress: optimiser steps done / steps of the stage, 0 to 1; moves the Beta curriculum.
    """
    if isinstance(noise, FullNoise):
        return torch.ones(blocks, dtype=torch.float64)
    if isinstance(noise, UniformNoise):
        u = _uniform(blocks, noise.stratified, generator)
        return noise.t_min + (noise.t_max - noise.t_min) * u
    mean, concentration = beta_curriculum(noise, progress)
    return _beta(mean, concentration, blocks, noise.stratified, generator).clamp(noise.t_min, 1.0)


def beta_curriculum(noise: BetaNoise, progress: float) -> tuple[float, float]:
    """Mean and concentration at a point of the stage (SDAR-VL's progressive Beta noise curriculum, linear in progress)."""
    progress = min(max(progress, 0.0), 1.0)
    mean = noise.mean_start + (noise.mean_end - noise.mean_start) * progress
    concentration = noise.concentration_start + (noise.concentration_end - noise.concentration_start) * progress
    return mean, concentration


def masked_tokens(t_K: torch.Tensor, block_R: torch.Tensor, eligible_R: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Masks each eligible token with its block's probability t; bool [R], True = masked.

    Args:
        block_R: index into t_K for each token.
    """
    u = torch.rand(len(block_R), generator=generator, dtype=torch.float64)
    return (u < t_K[block_R]) & eligible_R


def _uniform(count: int, stratified: bool, generator: torch.Generator) -> torch.Tensor:
    """U(0, 1) draws; stratified: one in each of `count` equal strata, in random order."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if not stratified:
        return u
    return (torch.randperm(count, generator=generator) + u) / max(count, 1)


# Points of the grid on which the Beta law is inverted; the error of a draw is below 1e-4.
_BETA_GRID = 20_001


def _beta(mean: float, concentration: float, count: int, stratified: bool, generator: torch.Generator) -> torch.Tensor:
    """Beta(mean C, (1 - mean) C) draws through the inverse of its distribution function, because torch's own Beta takes no
    generator and cannot be stratified. The integral runs over theta with x = sin^2(theta), which is finite at both ends for
    shapes of a half and more and still mild below."""
    alpha, beta = mean * concentration, (1 - mean) * concentration
    theta = torch.linspace(0, torch.pi / 2, _BETA_GRID, dtype=torch.float64)
    middle = (theta[1:] + theta[:-1]) / 2
    log_density = (2 * alpha - 1) * middle.sin().log() + (2 * beta - 1) * middle.cos().log()
    mass = (log_density - log_density.max()).exp()
    distribution = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    distribution = distribution / distribution[-1]
    u = _uniform(count, stratified, generator)
    right = torch.searchsorted(distribution, u, right=True).clamp(1, _BETA_GRID - 1)
    low, high = distribution[right - 1], distribution[right]
    part = (u - low) / (high - low).clamp_min(1e-300)
    return (theta[right - 1] + part * (theta[right] - theta[right - 1])).sin() ** 2
