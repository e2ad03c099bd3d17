"""The memory of one training step, by taking it with a model without numbers (`empty`) and counting what is alive.

What is alive beside the weights moves as autograd says: activations grow in the forward pass, gradients take their place in the
backward pass. So the count is kept in stretches between one gradient and the next, from which the peak follows for any number
of processes that share the gradients (`sharded`).
"""

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffvl.config.recipe import Stage
from diffvl.estimate.empty import fake_inputs, stand_in_attention
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.objective.losses import Draw, loss_of

ACTIVATIONS, LOGITS, CASTS = "activations", "logits", "bf16 copies of weights"


@dataclass(frozen=True)
class Stretch:
    """gradients: bytes of those that are there, by parameter name. alive: bytes of everything else at the worst moment, by
    kind."""

    gradients: dict[str, int]
    alive: dict[str, int]


@dataclass(frozen=True)
class StepCount:
    """stretches: of one micro-step. flops: of its matrix products, attention scores left out."""

    stretches: list[Stretch]
    flops: int


class _Alive(TorchDispatchMode):
    """Counts the bytes of fake tensors made in the block that are still held by someone."""

    def __init__(self, model: DiffVLForConditionalGeneration) -> None:
        super().__init__()
        self.vocabulary = model.config.text_config.vocab_size
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.weights |= {buffer.untyped_storage()._cdata for buffer in model.buffers()}
        self.now: Counter[str] = Counter()
        self.total = self.flops = 0
        self.worst: tuple[int, dict[str, int]] = (0, {})
        self.kinds: dict[int, tuple[str, int]] = {}
        self.gradients: dict[str, int] = {}
        self.stretches: list[Stretch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if (counted := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += counted(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._note(func, args, tensor)
        return result

    def _note(self, func: Any, args: Any, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.kinds or key in self.weights or not size:  # a view of something known
            return
        kind = ACTIVATIONS
        if tensor.shape[-1:] == (self.vocabulary,) and tensor.is_floating_point():
            kind = LOGITS
        elif func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            kind = CASTS
        self.kinds[key] = (kind, size)
        weakref.finalize(storage, self._gone, key)
        self.now[kind] += size
        self.total += size
        if self.total > self.worst[0]:
            self.worst = (self.total, dict(self.now))

    def _gone(self, key: int) -> None:
        kind, size = self.kinds.pop(key)
        if kind:
            self.now[kind] -= size
            self.total -= size

    def is_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Takes a finished gradient out of the count, and begins a new stretch."""
        storage = gradient.untyped_storage()
        kind, size = self.kinds.get(storage._cdata, ("", storage.nbytes()))
        if kind:
            self.kinds[storage._cdata] = ("", size)
            self.now[kind] -= size
            self.total -= size
        self.end_stretch()
        self.gradients[name] = size

    def end_stretch(self) -> None:
        if self.worst[0]:
            self.stretches.append(Stretch(dict(self.gradients), self.worst[1]))
        self.worst = (self.total, dict(self.now))


def count_step(model: DiffVLForConditionalGeneration, stage: Stage, batch: dict[str, Any], bf16: bool) -> StepCount:
    """Takes a micro-step of a model without numbers.

    Args:
        batch: as the collator gives it, with real numbers. bf16: whether training would run under autocast.
    Raises:
        UncountableError: the architecture asks for numbers on the way.
    """
    sharded = stage.sharding in ("full", "full_bf16")
    alive = _Alive(model)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: alive.is_gradient(name, parameter.grad))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and stage.sharding != "full_bf16", cache_enabled=not sharded)
    try:
        with stand_in_attention(), alive:
            with autocast:
                loss = loss_of(model, model.config, fake_inputs(model, batch), stage.objective, Draw(0, 0, 1.0)).loss  # type: ignore[arg-type]
            loss.backward()
            alive.end_stretch()
    except RuntimeError as error:
        raise UncountableError(str(error)) from error
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return StepCount(alive.stretches, alive.flops)


class UncountableError(Exception):
    """An architecture whose step cannot be taken without numbers."""
