"""Where randomness comes from: a seed, the optimiser step and the sample, and nothing else."""

import hashlib

import torch


def sample_generator(seed: int, step: int, sample: int) -> torch.Generator:
    """A CPU generator for one sample in one optimiser step. Its seed is a hash, so that neighbours do not correlate."""
    digest = hashlib.sha256(f"{seed}/{step}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
