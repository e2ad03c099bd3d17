"""Before anything is timed: ours and the published form train the same thing, on the same draw, in fp32.

A step that computes something else may be as fast as it likes. The trunk is small and its weights are large, so that logits
depend visibly on what each token may attend to; with the usual 0.02 attention is nearly uniform and every mask looks right.
"""

from typing import Any

import torch

from diffvl.bench.forms import Shape, Step, TrunkSize, Work, build_model, choose_attention, make_work, ours, published
from diffvl.config.recipe import BlockDiffusionObjective
from diffvl.errors import TrainingError
from diffvl.hub.sampling_diffvl import never_predicted
from diffvl.objective.losses import Draw
from diffvl.prepare.attention_proof import largest

CHECKED_TRUNK = TrunkSize(hidden=128, layers=2, heads=2, kv_heads=1, intermediate=256, vocabulary=512)
WEIGHT_STD = 0.15
SHORTEST = 96  # tokens of the checked sample, or four blocks where these are longer
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative, fp32


def prove_equal(objective: BlockDiffusionObjective, device: torch.device, seed: int) -> dict[str, float]:
    """Compares loss and gradient of `ours` and `published`; gives the largest relative differences seen.

    Raises:
        TrainingError: if they differ by more than the tolerances.
    """
    model = build_model(CHECKED_TRUNK, device, torch.float32, seed, std=WEIGHT_STD)
    forbidden = never_predicted(model.config, CHECKED_TRUNK.vocabulary, device)
    length = max(SHORTEST, 4 * objective.block_size)
    worst = {"loss": 0.0, "gradient": 0.0}
    # The second sample leaves its last block open, which both forms fill with stop tokens.
    for number, shape in enumerate([Shape(length, length // 3 + 1), Shape(length + 1, length // 2)]):
        work = make_work(shape, objective, CHECKED_TRUNK.vocabulary, device, seed + number)
        for name, difference in _differences(model, work, Draw(seed, number, 0.0), forbidden).items():
            worst[name] = largest([worst[name], difference])
    if not (worst["loss"] <= LOSS_TOLERANCE and worst["gradient"] <= GRADIENT_TOLERANCE):
        raise TrainingError(
            f"ours and the published form do not train the same thing here (fp32, {device.type}): relative difference of the "
            f"loss {worst['loss']:.2g} (allowed {LOSS_TOLERANCE:.0e}), of the gradient {worst['gradient']:.2g} (allowed "
            f"{GRADIENT_TOLERANCE:.0e}). Figures of their speed would mean nothing and are not printed. This is a fault of "
            "diffvl or of the installed torch: run tests/test_bench_train.py and report it"
        )
    return worst


def _differences(model: Any, work: Work, draw: Draw, forbidden_V: torch.Tensor) -> dict[str, float]:
    """Relative differences of loss and gradient between the two forms."""
    choose_attention(model, "published")
    theirs, gradient = _loss_and_gradient(model, published(model, work, draw, forbidden_V))
    choose_attention(model, "ours")
    own, own_gradient = _loss_and_gradient(model, ours(model, work, draw))
    return {
        "loss": abs(own - theirs) / abs(theirs),
        "gradient": float((own_gradient - gradient).norm() / gradient.norm()),
    }


def _loss_and_gradient(model: Any, step: Step) -> tuple[float, torch.Tensor]:
    """One step: the loss, and the gradient of all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    loss = step()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.language_model.parameters()]
    return float(loss.detach()), torch.cat(gradients)
