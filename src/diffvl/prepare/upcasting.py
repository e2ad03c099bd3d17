"""Arithmetic in fp32 on weights that stay as their files hold them: what a module holds is upcast when it begins to run, and
dropped when it has ended.

Place in the flow: proofs compare logits in fp32, since rounding to bf16 would drown what they look for. An fp32 copy of a whole
model takes twice the size of its checkpoint; this takes one layer, or one table. Every kernel sees the same fp32 values, so the
figures are the same.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

log = logging.getLogger(__name__)
T = TypeVar("T")


def in_fp32(model: nn.Module, work: Callable[[], T], throughout: Callable[[nn.Module], bool] = lambda _: False) -> T:
    """Gives what `work` gives when the model computes in fp32. Where its code looks at the dtype of weights that are not upcast
    at the time, `work` is done again with all of them in fp32.

    Args:
        throughout: tells of a module outside of layers whether its weights are in fp32 all the time, because others look at them.
    """
    try:
        with _upcast(model, throughout):
            return work()
    except RuntimeError as error:
        if "type" not in str(error) or not _is_lower(model):
            raise
        log.info("%s: proofs need all its weights in fp32 at once, twice the memory of bf16", type(model).__name__)
    with _upcast(model, lambda _: True):
        return work()


def _is_lower(model: nn.Module) -> bool:
    return any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in model.parameters())


@contextmanager
def _upcast(model: nn.Module, throughout: Callable[[nn.Module], bool]) -> Iterator[None]:
    with ExitStack() as stack:
        for modules in _units(model):
            held = _Upcast(modules)
            if throughout(modules[0]):
                stack.callback(held.drop)
                held.take()
                continue
            stack.callback(modules[0].register_forward_pre_hook(held.take).remove)
            # Also where its forward fails: the model must be what it was.
            stack.callback(modules[0].register_forward_hook(held.drop, always_call=True).remove)
        yield


def _units(module: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that are upcast together, led by the one whose run they are upcast for: a layer with all that is in it, and
    outside of layers each module alone."""
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield list(child.modules())
        else:
            yield [child]
            yield from _units(child)


class _Upcast:
    """The tensors of some modules, which `take` replaces by ones in fp32 and `drop` puts back."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._stored: list[tuple[dict[str, Any], str, torch.Tensor]] = []

    def take(self, *_: Any) -> None:
        for module in self._modules:
            for place in (module.__dict__["_parameters"], module.__dict__["_buffers"]):
                for name, tensor in place.items():
                    if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
                        self._stored.append((place, name, tensor))
                        place[name] = _in_kind(tensor.detach().float(), tensor)

    def drop(self, *_: Any) -> None:
        while self._stored:
            place, name, tensor = self._stored.pop()
            place[name] = tensor


def _in_kind(upcast: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return nn.Parameter(upcast, requires_grad=False) if isinstance(tensor, nn.Parameter) else upcast
