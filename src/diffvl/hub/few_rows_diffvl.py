"""Linear layers on a few tokens, where a CPU multiplies few rows slowly.

An open block is a product of a few rows with every weight of the trunk. To read the weights is most of the work, so it should
take as long as one row does. In fp32 without AVX512, MKL takes twice as long. With the weight as the first factor and the tokens
as columns the sums are the same, and it does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

MOST_ROWS = 8  # with more, rows are as fast


@contextmanager
def few_rows(trunk: Any, everywhere: bool = False) -> Iterator[None]:
    """In the block, linear layers of a trunk take a few tokens as columns, where that is faster. Layers that are others' own
    (quantised ones), or that have a forward of their own already, stay as they are. everywhere: on any CPU, to measure it."""
    layers = [one for one in trunk.modules() if _is_ours(one)] if everywhere or has_slow_rows() else []
    for layer in layers:
        layer.forward = partial(linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def has_slow_rows() -> bool:
    """Tells whether products of few rows in fp32 are slow on this CPU. Measured with AVX2, on an AMD EPYC."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _is_ours(layer: Any) -> bool:
    """Whether a layer is torch's own, as it is, and computes in fp32 on the CPU."""
    if type(layer) is not torch.nn.Linear or "forward" in vars(layer):
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32


def linear(layer: torch.nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """What the layer gives for rows [..., in]: [..., out], contiguous."""
    count = rows.shape[:-1].numel()
    if not 1 < count <= MOST_ROWS or rows.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu"):
        return torch.nn.functional.linear(rows, layer.weight, layer.bias)
    columns = rows.reshape(count, -1).t()
    weight, bias = layer.weight, layer.bias
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t().reshape(*rows.shape[:-1], -1).contiguous()
