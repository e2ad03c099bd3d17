"""The tensors that say what the images and videos of a batch are, by name, as a processor gives and a vision part takes them.

How the tensors of several images are joined is told by their shapes alone, whatever they mean to a model.
"""

from collections.abc import Sequence

import torch

Pixels = dict[str, torch.Tensor]

VIDEO_FRAMES = "video_frames"  # [N], frames of each video, where they stand in one tensor [N, T, ...] that is filled up


def join_pixels(parts: Sequence[Pixels]) -> Pixels:
    """Joins the pixels of several images, videos or samples, in order, each tensor over those that have it; {} for none.

    Tensors are joined along dim 0 and filled up with zeros where other dims differ (tiles, height and width), as the processors
    of such models do themselves: a size, a mask or the zeros tell those models what is real. What an image does not have (small
    ones are not cut into tiles by some processors) adds nothing: a count tells such models whose it is.

    Raises:
        ValueError: if tensors of a name have other numbers of dims.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: joined([part[name] for part in parts if name in part]) for name in names}


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors along dim 0, filled up with zeros where other dims differ.

    Raises:
        ValueError: if they have other numbers of dims.
    """
    if len({tensor.dim() for tensor in tensors}) > 1:
        raise ValueError(f"pixels of the shapes {[tuple(tensor.shape) for tensor in tensors]} cannot be joined")
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, pads) if any(missing) else tensor)
    return torch.cat(padded)
