"""What one process holds at the worst moment of a step: from the counted stretches (`step`) and the sizes of the weights, for
one process or for several that share the model.

AdamW has two fp32 moments for each parameter that trains. A model in parts (`train.sharding`) has a share of weights, gradients
and moments in each process; beside it stand, whole, the root (embedding, head, connector) and what of its gradient is there,
the unit that runs, the one that is fetched meanwhile and the buffer it arrives in, and in the backward pass a unit's gradients
twice, as they are made and as they are sent. Under data parallelism each process has everything, and the buckets in which
gradients travel.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from diffvl.config.recipe import Stage
from diffvl.estimate.step import ACTIVATIONS, CASTS, LOGITS, StepCount, Stretch
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.train.four_bits import is_in_four_bits
from diffvl.train.sharding import decoder_layers, units

MARGIN = 0.2  # by which an estimate may be too low: kernels' own room and an allocator's gaps are not in it
MOMENTS = 8  # bytes of AdamW for each parameter that trains
# NF4 in blocks of 64 with an 8-bit scale, 256 of which share one fp32 scale (QLoRA, arXiv 2305.14314, section 3).
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its worst moment. whole: what is gathered of a model in parts, and on its way."""

    weights: int
    optimiser: int
    gradients: int
    activations: int
    logits: int
    casts: int
    whole: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def most(self) -> int:
        """With the margin on top."""
        return int(self.total * (1 + MARGIN))


@dataclass(frozen=True)
class _Sizes:
    """Bytes of some weights as they lie in a whole model, and how many of their elements train."""

    stored: int
    trained: int

    @classmethod
    def of(cls, parameters: Iterable[torch.nn.Parameter]) -> "_Sizes":
        own = list({id(parameter): parameter for parameter in parameters}.values())
        trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        return cls(sum(parameter.nbytes for parameter in own), trained)


def memory_of(model: DiffVLForConditionalGeneration, stage: Stage, count: StepCount, processes: int) -> Memory:
    """Gives the worst moment of a step.

    Args:
        model: without numbers, fitted to the stage. processes: of the run.
    """
    if stage.sharding in ("full", "full_bf16"):
        return _in_parts(model, stage, count, processes)
    everything = _Sizes.of(model.parameters())
    stretch, gradients = _worst(count, lambda one: _all_of(count) if stage.accumulation > 1 else sum(one.gradients.values()))
    buckets = 4 * everything.trained if processes > 1 else 0
    return Memory(
        weights=everything.stored - _saved_by_packing(model, stage),
        optimiser=MOMENTS * everything.trained,
        gradients=gradients,
        activations=stretch.alive.get(ACTIVATIONS, 0),
        logits=stretch.alive.get(LOGITS, 0),
        casts=stretch.alive.get(CASTS, 0) + _unpacked(model, stage),
        whole=buckets,
    )


def _in_parts(model: DiffVLForConditionalGeneration, stage: Stage, count: StepCount, processes: int) -> Memory:
    everything = _Sizes.of(model.parameters())
    cut = units(model)
    inside = {id(parameter) for unit in cut for parameter in unit.parameters()}
    root = _Sizes.of(parameter for parameter in model.parameters() if id(parameter) not in inside)
    of_units = [_Sizes.of(unit.parameters()) for unit in cut]
    unit = max(of_units, key=lambda one: one.stored, default=_Sizes(0, 0))
    of_root = {name for name, parameter in model.named_parameters() if id(parameter) not in inside}

    def gradients(stretch: Stretch) -> int:
        """Those of the root stay whole to the end of the backward pass, where they are sent: then they are there twice."""
        own = sum(size for name, size in stretch.gradients.items() if name in of_root)
        done = len(stretch.gradients) == len(count.stretches[-1].gradients)
        others = _all_of(count) if stage.accumulation > 1 else sum(stretch.gradients.values()) - own
        return own * (2 if done else 1) + others // processes

    stretch, held = _worst(count, gradients)
    gathered = root.stored + 3 * unit.stored
    sent = 2 * max((4 * one.trained for one in of_units), default=0)
    return Memory(
        weights=everything.stored // processes,
        optimiser=MOMENTS * everything.trained // processes,
        gradients=held,
        activations=stretch.alive.get(ACTIVATIONS, 0),
        logits=stretch.alive.get(LOGITS, 0),
        casts=stretch.alive.get(CASTS, 0),
        whole=gathered + sent,
    )


def _all_of(count: StepCount) -> int:
    return sum(count.stretches[-1].gradients.values())


def _worst(count: StepCount, gradients: Callable[[Stretch], int]) -> tuple[Stretch, int]:
    """The stretch in which gradients and activations together are most, and its gradients."""
    found = max(count.stretches, key=lambda one: gradients(one) + sum(one.alive.values()))
    return found, gradients(found)


# --- 4 bits ----------------------------------------------------------------------------------------------------------------


def _packed_weights(model: DiffVLForConditionalGeneration) -> list[torch.nn.Parameter]:
    """The weights that `train.four_bits` packs: those of the linear layers inside the decoder's layers, adapters apart."""
    modules = (module for layer in decoder_layers(model) for module in layer.modules())
    linears = [module for module in modules if isinstance(module, torch.nn.Linear)]
    return [linear.get_parameter("weight") for linear in linears if not linear.weight.requires_grad]


def _saved_by_packing(model: DiffVLForConditionalGeneration, stage: Stage) -> int:
    if not is_in_four_bits(stage):
        return 0
    return sum(int(weight.nbytes - PACKED * weight.numel()) for weight in _packed_weights(model))


def _unpacked(model: DiffVLForConditionalGeneration, stage: Stage) -> int:
    """The weight that is unpacked, in bf16, while it is used."""
    if not is_in_four_bits(stage):
        return 0
    return max((2 * weight.numel() for weight in _packed_weights(model)), default=0)
