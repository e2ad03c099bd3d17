"""Where randomness comes from: a seed, the optimiser step and the sample (or the process), and nothing else."""

import hashlib

import torch


def sample_generator(seed: int, step: int, sample: int) -> torch.Generator:
    """Makes a CPU generator for one sample in one optimiser step. Its seed is a hash, so that neighbours do not correlate."""
    return torch.Generator().manual_seed(_hashed(f"{seed}/{step}/{sample}"))


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Sets the generators that a model's own dropout draws from, at the beginning of a step in one process."""
    torch.manual_seed(_hashed(f"dropout/{seed}/{step}/{rank}"))


def batch_seed(seed: int, batch: int, turn: int) -> int:
    """Gives the seed of what is drawn for one batch of prompts, in one of their turns."""
    return _hashed(f"answers/{seed}/{batch}/{turn}")


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") % 2**63
