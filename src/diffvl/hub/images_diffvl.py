"""Images as rows: what a batch's images are turned into, and which of these rows a token shows.

Both kinds of model look at images the same way. They encode them once, in the order in which the text shows them, and get rows:
one for each image token. `image_index` says of every token which row it shows, -1 for text. Rows are gathered, never computed
again: a noisy copy of an image token, or a part of an image in another forward, names the row of its clean counterpart.

* `OwnImages`: a stock tower and our connector; rows go into the trunk as embeddings.
* `NativeImages`: a whole stock vision-language model. Its own vision part makes the rows and its own forward places them
  (`mm_encoder_outputs`), with whatever it adds besides: features for several layers, say. Its own position ids hold too.

A video is rows too. Where a model has a token of its own for videos, images and videos are counted each by themselves; which of
them a token shows is told by its id.

Shapes: B batch, T tokens, N images, P tokens of an image, H trunk width, A rotary axes.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from .layout_diffvl import Rope, image_rows
from .pixels_diffvl import VIDEO_FRAMES, Pixels
from .tiling_diffvl import tiled_rows

# What a stock vision part gives with one row for each image token; the other fields of its output are left alone.
ROW_FIELDS = ("pooler_output", "deepstack_features")


@dataclass(frozen=True)
class ImageRows:
    """The rows of a batch's images, and what else came out of the vision part (None: there are no images). counts: rows of each
    image. videos: the same of its videos."""

    output: Any
    counts: tuple[int, ...]
    videos: "ImageRows | None" = None

    @property
    def total(self) -> int:
        return sum(self.counts)

    def require(self, tokens: int) -> None:
        """Raises ValueError unless there is a row for each of the placeholders of a text."""
        videos = self.videos or ImageRows(None, ())
        if tokens != self.total + videos.total:
            clips = f" and {len(videos.counts)} videos" if videos.counts else ""
            raise ValueError(
                f"{len(self.counts)} images{clips} give {self.total + videos.total} image tokens, the text has {tokens}"
            )

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


def _joined_rows(outputs: Sequence[Any], counts: Sequence[int]) -> Any:
    """The outputs of a vision part for several videos as that for all of them."""
    joined = copy.copy(outputs[0])
    for name in _row_fields(joined):
        rows = [_flat(output[name], count) for output, count in zip(outputs, counts, strict=True)]
        joined[name] = torch.cat(rows)[None]
    return joined


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


class OwnImages:
    """A tower and a connector of ours."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    has_axes = False

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name says what the images are."""
        return name in self.config.image_inputs

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

    def rope(self, ids: torch.Tensor, valid: torch.Tensor, pixels: Pixels, shown: "Shown") -> Rope:
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

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name says what the images are, of all images or of some."""
        return name in inspect.signature(self._encoder("get_image_features")).parameters

    def encode(self, pixels: Pixels) -> ImageRows:
        """Images and videos as the source's own vision part sees them; without a graph if it is frozen."""
        videos = {name: pixels[name] for name in self.config.video_inputs if name in pixels}
        images = {name: value for name, value in pixels.items() if name not in videos}
        seen = ImageRows(None, ())
        if images:
            output = self._features("get_image_features", images)
            seen = ImageRows(output, _counts(output))
        return replace(seen, videos=self._encoded_videos(videos)) if videos else seen

    def _encoded_videos(self, videos: Pixels) -> ImageRows:
        """Videos that stand in one tensor are encoded with those of as many frames."""
        frames = videos.get(VIDEO_FRAMES)
        if frames is None or len(set(frames.tolist())) == 1:
            output = self._features("get_video_features", videos)
            return ImageRows(output, _counts(output))
        parts = []
        for number, count in enumerate(frames.tolist()):
            own = {name: value[number : number + 1, :count] for name, value in videos.items() if value.dim() > 1}
            parts.append(self._features("get_video_features", own))
        counts = tuple(sum(_counts(part)) for part in parts)
        return ImageRows(_joined_rows(parts, counts), counts)

    def _encoder(self, method: str) -> Any:
        return getattr(self.body, method, None) or getattr(stock(self.source), method)

    def _features(self, method: str, pixels: Pixels) -> Any:
        encoder = self._encoder(method)
        known = inspect.signature(encoder).parameters
        dtype = self.source.get_input_embeddings().weight.dtype
        given = {
            name: value.to(dtype) if value.is_floating_point() and name.startswith("pixel") else value
            for name, value in pixels.items()
            if name in known
        }
        trains = any(parameter.requires_grad for parameter in vision_parameters(self.source).values())
        with nullcontext() if trains else torch.no_grad():
            return encoder(**given, return_dict=True)

    def arguments(self, ids: torch.Tensor, rows: ImageRows | None, image_index: torch.Tensor | None) -> dict[str, Any]:
        """What the source is called with: ids, the rows of their placeholders, and which ids are placeholders where it asks."""
        arguments: dict[str, Any] = {"input_ids": ids}
        outputs = {}
        if rows is not None and image_index is not None:
            of_video = None if self.config.video_token_id is None else ids == self.config.video_token_id
            shown = image_index[image_index >= 0] if of_video is None else image_index[(image_index >= 0) & ~of_video]
            if len(shown):
                outputs["image"] = rows.gathered(shown)
            if of_video is not None and rows.videos is not None and len(shown := image_index[(image_index >= 0) & of_video]):
                outputs["video"] = rows.videos.gathered(shown)
        if outputs:
            arguments["mm_encoder_outputs"] = outputs
        return arguments | self._token_types(ids)

    def _token_types(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        config = self.config
        return token_types(stock(self.source), ids, config.image_token_id, config.video_token_id, config.token_types)

    def prompt(self, ids: torch.Tensor, pixels: Pixels, rows: ImageRows | None) -> dict[str, Any]:
        """What the source's own `generate` is called with for prompts [B, T]; they come back before the answer. It gets the rows,
        and of the pixels what it numbers its tokens by."""
        arguments: dict[str, Any] = {"input_ids": ids, **self._token_types(ids)}
        if rows is not None:
            outputs = {"image": rows.output, "video": None if rows.videos is None else rows.videos.output}
            arguments["mm_encoder_outputs"] = {name: output for name, output in outputs.items() if output is not None}
            known = inspect.signature(self.body.get_rope_index).parameters if self.has_axes else {}
            arguments |= {name: value for name, value in pixels.items() if name in known}
        return arguments

    def rope(self, ids: torch.Tensor, valid: torch.Tensor, pixels: Pixels, shown: "Shown") -> Rope:
        """Position ids as the source numbers its tokens, sample by sample: some families count images over a whole batch.

        Args:
            ids, valid: clean tokens [B, T], of any padding. shown: how many images and videos each sample shows.
        """
        if not self.has_axes:
            return Rope(first=self.config.first_position)
        number = self.body.get_rope_index
        known = inspect.signature(number).parameters
        tables = []
        facts = [(name, counts) for name, counts in _facts_of_rope(shown) if name in known and name in pixels]
        first = dict.fromkeys((name for name, _ in facts), 0)
        for line, (own_ids, own_valid) in enumerate(zip(ids, valid, strict=True)):
            sample = own_ids[own_valid][None]
            given: dict[str, Any] = {}
            if "mm_token_type_ids" in known:
                given["mm_token_type_ids"] = _types(sample, self.config.image_token_id, self.config.video_token_id)
            for name, counts in facts:
                if counts[line]:
                    given[name] = pixels[name][first[name] : first[name] + counts[line]]
                first[name] += counts[line]
            tables.append(number(sample, **given)[0][:, 0])
        lengths = valid.sum(1)
        table = torch.zeros(len(tables[0]), len(ids), max(int(lengths.max()), 1), dtype=torch.long, device=ids.device)
        for line, entries in enumerate(tables):
            table[:, line, : entries.shape[1]] = entries
        return Rope(table, lengths)


# Names under which stock forwards ask which tokens are images.
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


def token_types(
    source: Any, ids: torch.Tensor, image_id: int, video_id: int | None = None, marks: str = "images"
) -> dict[str, torch.Tensor]:
    """Which ids of a prompt are image tokens (1) or video tokens (2), or none where `marks` says that answers are marked, under
    the names by which a stock forward asks for it."""
    known = inspect.signature(source.forward).parameters
    types = _types(ids, image_id, video_id) if marks == "images" else torch.zeros_like(ids)
    return {name: types for name in TOKEN_TYPES if name in known}


def _types(ids: torch.Tensor, image_id: int, video_id: int | None) -> torch.Tensor:
    types = (ids == image_id).long()
    return types if video_id is None else types + 2 * (ids == video_id).long()


def is_visual(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """True at tokens that show a part of an image or a video."""
    is_image = ids == config.image_token_id
    return is_image if config.video_token_id is None else is_image | (ids == config.video_token_id)


@dataclass(frozen=True)
class Shown:
    """How many images and videos each sample shows."""

    images: Sequence[int]
    videos: Sequence[int]

    @classmethod
    def in_batch(cls, batch: Mapping[str, Any]) -> "Shown":
        """As a batch of samples says it."""
        none = [0] * len(batch["input_ids"])
        images, videos = (batch[name].tolist() if name in batch else none for name in ("images", "videos"))
        return cls(images, videos)

    @classmethod
    def in_text(cls, ids: torch.Tensor, valid: torch.Tensor, rows: ImageRows | None, config: Any) -> "Shown":
        """As tokens [B, T] and rows say it.

        Raises:
            ValueError: if a sample ends inside an image.
        """
        rows = rows or ImageRows(None, ())
        images = images_of_samples((ids == config.image_token_id) & valid, rows.counts)
        if config.video_token_id is None:
            return cls(images, [0] * len(ids))
        is_video = (ids == config.video_token_id) & valid
        return cls(images, images_of_samples(is_video, () if rows.videos is None else rows.videos.counts))


def _facts_of_rope(shown: Shown) -> list[tuple[str, Sequence[int]]]:
    """What a source asks for to number its tokens, with one row an image or video."""
    videos = shown.videos
    return [("image_grid_thw", shown.images), ("video_grid_thw", videos), ("second_per_grid_ts", videos)]


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


def placed_images(ids: torch.Tensor, config: Any, valid: torch.Tensor | None = None) -> torch.Tensor:
    """For each token the row that it shows, of images or of videos, each counted over the batch in reading order; -1 for text;
    [B, T]."""
    inside = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    images = image_rows((ids == config.image_token_id) & inside)
    if config.video_token_id is None:
        return images
    is_video = (ids == config.video_token_id) & inside
    return torch.where(is_video, image_rows(is_video), images)
