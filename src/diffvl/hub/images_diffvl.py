"""The pixel tensors of images, under the names that a model takes them by."""

from collections.abc import Sequence

import torch

Pixels = dict[str, torch.Tensor]


def join_pixels(parts: Sequence[Pixels]) -> Pixels:
    """Joins the tensors of several images, or of several samples, in order: {} for none.

    They are joined along dimension 0. Where they differ in another one (tiles, height and width), they are filled up with zeros,
    as the processors of such models do themselves: a mask, a size or the zeros themselves tell those models what is real.

    Raises:
        ValueError: if the parts do not have the same names.
    """
    parts = [part for part in parts if part]
    if not parts:
        return {}
    for part in parts:
        if part.keys() != parts[0].keys():
            raise ValueError(f"images of other kinds cannot be joined: {sorted(parts[0])} and {sorted(part)}")
    return {name: _joined([part[name] for part in parts]) for name in parts[0]}


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) == 1:
        return torch.cat(tensors)
    sizes = [max(sizes) for sizes in zip(*shapes, strict=True)]
    joined = tensors[0].new_zeros(sum(len(tensor) for tensor in tensors), *sizes)
    first = 0
    for tensor in tensors:
        place = (slice(first, first + len(tensor)), *(slice(size) for size in tensor.shape[1:]))
        joined[place] = tensor
        first += len(tensor)
    return joined
