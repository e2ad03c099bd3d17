"""Before anything is timed: ours and the published form do the same work.

A step that computes something else may be as fast as it likes. Training: the same loss and gradient for the same draw of noise,
in fp32. The trunk is small and its weights are large, so that logits depend visibly on what each token may attend to; with the
usual 0.02 attention is nearly uniform and every mask looks right. Decoding: the same tokens, in fp32, where rounding does not
decide which token is likelier.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffvl.bench.decoders import DECODERS, Prompts
from diffvl.bench.random_model import TrunkSize, build_model
from diffvl.bench.training_forms import Shape, Step, TrainingSample, choose_attention, make_sample, ours, published
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.errors import TrainingError
from diffvl.hub.configuration_diffvl import never_predicted
from diffvl.objective.losses import Draw
from diffvl.prepare.attention_proof import largest

CHECKED_TRUNK = TrunkSize(hidden=128, layers=2, heads=2, kv_heads=1, intermediate=256, vocabulary=512)
WEIGHT_STD = 0.15
SHORTEST = 96  # tokens of the checked sample, or four blocks where these are longer
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3  # relative, fp32


# --- training --------------------------------------------------------------------------------------------------------------


def prove_same_training(objective: BlockDiffusionObjective, device: torch.device, seed: int) -> dict[str, float]:
    """Compares loss and gradient of `ours` and `published`; returns the largest relative differences.

    Raises:
        TrainingError: if they differ by more than the tolerances.
    """
    model = build_model(CHECKED_TRUNK, device, torch.float32, seed, std=WEIGHT_STD)
    forbidden = never_predicted(model.config, CHECKED_TRUNK.vocabulary, device)
    length = max(SHORTEST, 4 * objective.block_size)
    worst = {"loss": 0.0, "gradient": 0.0}
    # The second sample ends inside a block, which both forms fill with stop tokens.
    for number, shape in enumerate([Shape(length, length // 3 + 1), Shape(length + 1, length // 2)]):
        sample = make_sample(shape, objective, CHECKED_TRUNK.vocabulary, device, seed + number)
        for name, difference in _differences(model, sample, Draw(seed, number, 0.0), forbidden).items():
            worst[name] = largest([worst[name], difference])
    if not (worst["loss"] <= LOSS_TOLERANCE and worst["gradient"] <= GRADIENT_TOLERANCE):
        raise TrainingError(
            f"ours and the published form do not train the same thing here (fp32, {device.type}): relative difference of the "
            f"loss {worst['loss']:.2g} (allowed {LOSS_TOLERANCE:.0e}), of the gradient {worst['gradient']:.2g} (allowed "
            f"{GRADIENT_TOLERANCE:.0e}). Figures of their speed would mean nothing and are not printed. This is a fault of "
            "diffvl or of the installed torch: run tests/bench/test_bench_train.py and report it"
        )
    return worst


def _differences(model: Any, sample: TrainingSample, draw: Draw, forbidden_V: torch.Tensor) -> dict[str, float]:
    """Relative differences of loss and gradient between the two forms."""
    choose_attention(model, "published")
    loss, gradient = _loss_and_gradient(model, published(model, sample, draw, forbidden_V))
    choose_attention(model, "ours")
    our_loss, our_gradient = _loss_and_gradient(model, ours(model, sample, draw))
    return {
        "loss": abs(our_loss - loss) / abs(loss),
        "gradient": float((our_gradient - gradient).norm() / gradient.norm()),
    }


def _loss_and_gradient(model: Any, step: Step) -> tuple[float, torch.Tensor]:
    """Runs one step; returns the loss, and the gradient of all parameters as one vector."""
    model.zero_grad(set_to_none=True)
    loss = step()
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.trunk.parameters()]
    return float(loss.detach()), torch.cat(gradients)


# --- decoding --------------------------------------------------------------------------------------------------------------


def prove_same_tokens(model: Any, single: Sequence[Prompts], steps: Sequence[int]) -> dict[str, int]:
    """Decodes single prompts with the published loop and with ours at each number of steps, in fp32; returns how many tokens were
    compared, and how many different ones there were.

    Raises:
        TrainingError: if the answers differ.
    """
    num_compared, different = 0, set()
    with in_fp32(model):
        for prompts, count in itertools.product(single, steps):
            expected = DECODERS["published"](model, prompts, count, None).answers[0]
            own = DECODERS["ours"](model, prompts, count, None).answers[0]
            if own != expected:
                place = next((at for at, pair in enumerate(zip(own, expected, strict=False)) if pair[0] != pair[1]), len(own))
                raise TrainingError(
                    f"ours and the published loop do not give the same tokens here ({count} steps, greedy, fp32): from token "
                    f"{place} on, ours {own[place : place + 8]}, published {expected[place : place + 8]}. Figures of their speed "
                    "would compare different work and are not printed. With another --seed (or other data) it may have been a "
                    "tie between two tokens; if it is not, it is a fault of diffvl: run tests/bench/test_published_decoder.py "
                    "and report it"
                )
            num_compared += len(own)
            different |= set(own)
    return {"equal_tokens": num_compared, "different_tokens": len(different)}


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Makes the weights fp32 in the block; after it they are what they were, bit by bit. Buffers stay as they are."""
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)
