"""Images as rows: what a batch's images are turned into, and which of these rows a token shows.

Both kinds of model look at images the same way. They encode them once, in the order in which the text shows them, and get rows:
one for each image token. `image_index` says of every token which row it shows, -1 for text. Rows are gathered, never computed
again: a noisy copy of an image token, or a part of an image in another forward, names the row of its clean counterpart.

* `OwnImages`: a stock tower and our connector; rows go into the trunk as embeddings.
* `NativeImages`: a whole stock vision-language model. Its own vision part makes the rows and its own forward places them
  (`mm_encoder_outputs`), with whatever it adds besides: features for several layers, say. Its own position ids hold too.

Shapes: B batch, T tokens, N images, P tokens of an image, H trunk width, A rotary axes.
"""

import copy
import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .layout_diffvl import Rope, image_rows
from .tiling_diffvl import tiled_rows

Pixels = dict[str, torch.Tensor]

# What a stock vision part gives with one row for each image token; the other fields of its output are left alone.
ROW_FIELDS = ("pooler_output", "deepstack_features")


@dataclass(frozen=True)
class ImageRows:
    """The rows of a batch's images, and what else came out of the vision part. counts: rows of each image."""

    output: Any
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.counts)

    def gathered(self, index: torch.Tensor) -> Any:
        """The output with the rows at `index` [n] only, in that order."""
        if isinstance(self.output, torch.Tensor):
            return self.output[index]
        taken = copy.copy(self.output)
        for name in _row_fields(self.output):
            taken[name] = _rows_at(self.output[name], index, self.total)
        return taken


def _row_fields(output: Any) -> tuple[str, ...]:
    found = tuple(name for name in ROW_FIELDS if output.get(name) is not None)
    return found or ("last_hidden_state",)


def _rows_at(value: Any, index: torch.Tensor, total: int) -> Any:
    """Rows of a field: a tensor with one row for each image token in its leading dimensions, a list of such parts, or a list of
    such tensors (one for each layer that they go into)."""
    if isinstance(value, torch.Tensor):
        flat = _flat(value, total)
        # Some forwards take such a tensor apart into images: it keeps its form, all rows in one.
        return flat[index].view(*[1] * (value.dim() - flat.dim()), -1, *flat.shape[1:])
    if all(isinstance(part, torch.Tensor) for part in value) and sum(_leading(part) for part in value) == total:
        return [torch.cat([part.flatten(0, -2) for part in value])[index]]
    taken = [part if isinstance(part, int) else _rows_at(part, index, total) for part in value]
    return tuple(taken) if isinstance(value, tuple) else taken


def _flat(value: torch.Tensor, total: int) -> torch.Tensor:
    """[total, ...] of a tensor whose leading dimensions have that many entries."""
    for end in range(1, value.dim()):
        if math.prod(value.shape[:end]) == total:
            return value.flatten(0, end - 1)
    raise ValueError(f"image features of the shape {tuple(value.shape)} have no row for each of {total} image tokens")


def _leading(value: torch.Tensor) -> int:
    return math.prod(value.shape[:-1])


def _counts(output: Any) -> tuple[int, ...]:
    """Rows of each image in the output of a stock vision part; one figure for all where it does not tell them apart."""
    value = output[_row_fields(output)[0]]
    while not isinstance(value, torch.Tensor):
        if all(isinstance(part, torch.Tensor) for part in value):
            return tuple(_leading(part) for part in value)
        value = next(part for part in value if not isinstance(part, int))  # the first layer, or (layer, rows)
    return (math.prod(value.shape[1:-1]),) * len(value) if value.dim() > 2 else (len(value),)


def join_pixels(parts: Sequence[Pixels]) -> Pixels:
    """Joins the pixels of several images or samples, in order; {} for none.

    Tensors are joined along dim 0 and filled up with zeros where other dims differ (tiles, height and width), as the processors
    of such models do themselves: a size, a mask or the zeros tell those models what is real.

    Raises:
        ValueError: if the parts have other keys, or tensors of other numbers of dims.
    """
    parts = [part for part in parts if part]
    if not parts:
        return {}
    names = list(parts[0])
    if any(set(part) != set(names) for part in parts):
        raise ValueError(f"pixels with other keys cannot be joined: {sorted({key for part in parts for key in part})}")
    return {name: _joined([part[name] for part in parts]) for name in names}


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    if len({tensor.dim() for tensor in tensors}) > 1:
        raise ValueError(f"pixels of the shapes {[tuple(tensor.shape) for tensor in tensors]} cannot be joined")
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
        pads = [amount for size in reversed(missing) for amount in (0, size)]
        padded.append(torch.nn.functional.pad(tensor, pads) if any(missing) else tensor)
    return torch.cat(padded)


class OwnImages:
    """A tower and a connector of ours."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    has_axes = False

    def encode(self, pixels: Pixels) -> ImageRows:
        """Images [N, 3, S, S] -> their rows [N * P, H]; with tiles see `tiled_rows`."""
        if (tiling := self.config.tiles) is not None:
            return ImageRows(*tiled_rows(tiling, pixels, self.model.image_newline, self.model.image_features))
        features = self.model.image_features(pixels["pixel_values"])
        return ImageRows(features.flatten(0, 1), (features.shape[1],) * len(features))

    def arguments(self, ids: torch.Tensor, rows: ImageRows | None, image_index: torch.Tensor | None) -> dict[str, Any]:
        """What the trunk is called with: token embeddings with the images in them. `image_index` [B, T]: see the module."""
        embeds = self.model.get_input_embeddings()(ids)
        if rows is not None and image_index is not None:
            spliced = rows.gathered(image_index.clamp_min(0)).to(embeds.dtype)
            embeds = torch.where((image_index >= 0)[..., None], spliced, embeds)
        return {"inputs_embeds": embeds}

    def prompt(self, ids: torch.Tensor, pixels: Pixels, rows: ImageRows | None) -> dict[str, Any]:
        """What the trunk's own `generate` is called with for prompts [B, T]; the answer alone comes back."""
        return self.arguments(ids, rows, placed_images(ids, self.config))

    def rope(self, ids: torch.Tensor, valid: torch.Tensor, pixels: Pixels, images: Sequence[int]) -> Rope:
        """Position ids: the index of each token."""
        return Rope()


class NativeImages:
    """A whole stock vision-language model."""

    def __init__(self, model: Any) -> None:
        self.source, self.config = model.source, model.config
        self.body = getattr(stock(self.source), "model", stock(self.source))

    @property
    def has_axes(self) -> bool:
        """Whether the source numbers its tokens by a rule of its own (M-RoPE)."""
        return hasattr(self.body, "get_rope_index")

    def encode(self, pixels: Pixels) -> ImageRows:
        """The images as the source's own vision part sees them; without a graph if it is frozen."""
        encoder = getattr(self.body, "get_image_features", None) or stock(self.source).get_image_features
        known = inspect.signature(encoder).parameters
        dtype = self.source.get_input_embeddings().weight.dtype
        given = {
            name: value.to(dtype) if value.is_floating_point() and name.startswith("pixel") else value
            for name, value in pixels.items()
            if name in known
        }
        trains = any(parameter.requires_grad for parameter in vision_parameters(self.source).values())
        with nullcontext() if trains else torch.no_grad():
            output = encoder(**given, return_dict=True)
        return ImageRows(output, _counts(output))

    def arguments(self, ids: torch.Tensor, rows: ImageRows | None, image_index: torch.Tensor | None) -> dict[str, Any]:
        """What the source is called with: ids, the rows of their placeholders, and which ids are placeholders where it asks."""
        arguments: dict[str, Any] = {"input_ids": ids}
        if rows is not None and image_index is not None:
            shown = image_index[image_index >= 0]
            if len(shown):
                arguments["mm_encoder_outputs"] = {"image": rows.gathered(shown)}
        return arguments | token_types(stock(self.source), ids, self.config.image_token_id)

    def prompt(self, ids: torch.Tensor, pixels: Pixels, rows: ImageRows | None) -> dict[str, Any]:
        """What the source's own `generate` is called with for prompts [B, T]; they come back before the answer."""
        return {"input_ids": ids, **pixels, **token_types(stock(self.source), ids, self.config.image_token_id)}

    def rope(self, ids: torch.Tensor, valid: torch.Tensor, pixels: Pixels, images: Sequence[int]) -> Rope:
        """Position ids as the source numbers its tokens, sample by sample: some families count images over a whole batch.

        Args:
            ids, valid: clean tokens [B, T], of any padding. images: how many images each sample shows.
        """
        if not self.has_axes:
            return Rope()
        number = self.body.get_rope_index
        known = inspect.signature(number).parameters
        grids, first, tables = pixels.get("image_grid_thw"), 0, []
        for own_ids, own_valid, count in zip(ids, valid, images, strict=True):
            sample = own_ids[own_valid][None]
            types = (sample == self.config.image_token_id).long()
            given: dict[str, Any] = {"mm_token_type_ids": types} if "mm_token_type_ids" in known else {}
            if count and grids is not None:
                given["image_grid_thw"] = grids[first : first + count]
            tables.append(number(sample, **given)[0][:, 0])
            first += count
        lengths = valid.sum(1)
        table = torch.zeros(len(tables[0]), len(ids), max(int(lengths.max()), 1), dtype=torch.long, device=ids.device)
        for line, entries in enumerate(tables):
            table[:, line, : entries.shape[1]] = entries
        return Rope(table, lengths)


# Names under which stock forwards ask which tokens are images.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


def token_types(source: Any, ids: torch.Tensor, image_id: int) -> dict[str, torch.Tensor]:
    """Which ids are image tokens, under the names by which a stock forward asks for it."""
    known = inspect.signature(source.forward).parameters
    return {name: (ids == image_id).long() for name in TOKEN_TYPES if name in known}


def stock(model: Any) -> Any:
    """A stock model without the adapters around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vision_parameters(source: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a stock vision-language model outside its text part: tower, connector, newline tokens."""
    text = {id(parameter) for parameter in source.get_decoder().parameters()}
    for table in (source.get_input_embeddings(), source.get_output_embeddings()):
        text |= {id(parameter) for parameter in table.parameters()}
    return {name: parameter for name, parameter in source.named_parameters() if id(parameter) not in text}


def settle_frozen(module: torch.nn.Module, text: set[Any]) -> None:
    """Puts the largest parts without a trainable parameter in `eval`, except the modules in `text` and what holds them."""
    for child in module.children():
        inside = set(child.modules())
        if child in text:
            continue
        state = [*child.parameters(), *child.buffers()]
        if inside & text or any(tensor.requires_grad for tensor in state):
            settle_frozen(child, text)
        elif state:
            child.eval()


def images_of_samples(is_image: torch.Tensor, counts: Sequence[int]) -> list[int]:
    """How many images each sample shows.

    Args:
        is_image: image tokens, [B, T]. counts: rows of each image of the batch, in order.
    Raises:
        ValueError: if a sample ends inside an image.
    """
    rest, numbers = list(counts), []
    for tokens in is_image.sum(1).tolist():
        found = number = 0
        while found < tokens and rest:
            found += rest.pop(0)
            number += 1
        if found != tokens:
            raise ValueError("images and image tokens do not match: a prompt ends inside an image")
        numbers.append(number)
    return numbers


def answer_cells(block: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """True at the first token of every block that holds tokens of an answer, [B, L]."""
    first = block != torch.roll(block, 1, 1)
    first[:, 0] = True
    number = first.long().cumsum(1) - 1
    holds = torch.zeros_like(answer).scatter_add_(1, number, (answer > 0).long())
    return first & (holds.gather(1, number) > 0)


def span_ids(
    is_image: torch.Tensor, answer: torch.Tensor, valid: torch.Tensor, cut: torch.Tensor, image_attention: str
) -> torch.Tensor | None:
    """The span of each clean token, [B, T]: 0 for none, else counted from 1; None where no tokens see each other so.

    Args:
        is_image: image tokens. answer: 0 outside, k in the k-th answer. cut: True where a span may not reach across, at the
            first token of a block that holds answer tokens: what stands before it is committed before it in decoding.
    """
    if image_attention == "causal":
        return None
    inside = valid & (answer == 0) if image_attention == "prompt" else valid & is_image
    before = torch.roll(inside, 1, 1)
    before[:, 0] = False
    if image_attention.startswith("runs"):
        begins = inside & ~before
    else:  # one span from answer to answer
        turn = (answer != torch.roll(answer, 1, 1)).long()
        turn[:, 0] = 0
        turn = turn.cumsum(1)
        begins = inside & (turn != _before(turn, inside))
    return torch.where(inside, (begins | (inside & cut)).long().cumsum(1), 0)


def _before(value: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """At every token the value of the last token inside before it; -1 where there is none."""
    marked = torch.where(inside, value, -1)
    latest = marked.cummax(1).values
    shifted = torch.roll(latest, 1, 1)
    shifted[:, 0] = -1
    return shifted


def placed_images(ids: torch.Tensor, config: Any, valid: torch.Tensor | None = None) -> torch.Tensor:
    """For each token the row of the image tokens that it shows, counted over the batch in reading order, -1 for text; [B, T]."""
    is_image = ids == config.image_token_id
    return image_rows(is_image if valid is None else is_image & valid)
