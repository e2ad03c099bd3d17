"""What the loss of an optimiser step is divided by, over all processes and accumulation steps.

`tokens`: the answer tokens of the step, so that each counts alike. `samples`: each sample's loss is divided by its own answer
tokens, and the step's by its samples, so that a sample counts alike however short its answer (DiffusionVL).

Shapes: S samples, L clean length.
"""

import torch

from diffvl.config.objectives import BlockDiffusionObjective, Objective
from diffvl.data.samples import IGNORED


def by_samples(objective: Objective) -> bool:
    """Tells whether samples count alike, and not tokens."""
    return isinstance(objective, BlockDiffusionObjective) and objective.normaliser == "samples"


def divisor(objective: Objective, labels_SL: torch.Tensor) -> int:
    """Counts what a batch adds to the number by which the step's loss is divided."""
    answers_SL = labels_SL != IGNORED
    return int(answers_SL.any(1).sum() if by_samples(objective) else answers_SL.sum())


def shares(objective: Objective, answer_SL: torch.Tensor) -> torch.Tensor:
    """Gives the factor on the weights of each sample's tokens, [S, 1] in fp64; answer_SL: > 0 where a token is trained on."""
    tokens_S1 = (answer_SL > 0).sum(1, keepdim=True).clamp_min(1).to(torch.float64)
    return 1 / tokens_S1 if by_samples(objective) else torch.ones_like(tokens_S1)
