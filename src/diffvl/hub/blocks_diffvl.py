"""What decoding moves about: tokens that go through the trunk together, the prompt, the open block and the committed prefix.

Shapes: B batch, L prompt length, D block size, C committed tokens, n tokens of a piece, M tokens asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cache_diffvl import BlockCache
from .images_diffvl import ImageRows, is_visual, placed_images
from .layout_diffvl import Layout, Rope, block_end, block_index, segment_start
from .pixels_diffvl import joined
from .spans_diffvl import answer_cells, span_ids


@dataclass
class Piece:
    """Tokens that go through the trunk together, each [B, n]: ids, their layout, their rotary position ids, and the row of the
    image tokens that each shows or -1 (None where none does). is_block: the tokens are a whole cell of the block grid."""

    ids: torch.Tensor
    layout: Layout
    rope_ids: torch.Tensor
    image_index: torch.Tensor | None
    is_block: bool = False

    def joined(self, after: "Piece") -> "Piece":
        """This piece followed by another."""
        image_index = None
        if self.image_index is not None or after.image_index is not None:
            shown = [torch.full_like(one.ids, -1) if one.image_index is None else one.image_index for one in (self, after)]
            image_index = torch.cat(shown, 1)
        rope = torch.cat([self.rope_ids, after.rope_ids], -1)
        return Piece(torch.cat([self.ids, after.ids], 1), self.layout.joined(after.layout), rope, image_index)

    def without(self, count: int) -> "Piece":
        """The piece without its first `count` tokens."""
        image_index = None if self.image_index is None else self.image_index[:, count:]
        return Piece(self.ids[:, count:], self.layout.part(slice(count, None)), self.rope_ids[..., count:], image_index)

    def selected(self, keep: torch.Tensor) -> "Piece":
        """Some samples of the piece."""
        image_index = None if self.image_index is None else self.image_index[keep]
        return replace(
            self,
            ids=self.ids[keep],
            layout=self.layout.selected(keep),
            rope_ids=self.rope_ids[..., keep, :],
            image_index=image_index,
        )


@dataclass(frozen=True)
class Places:
    """Tokens of a piece, in row-major order: their samples and their places in the piece, int64 [M]."""

    sample: torch.Tensor
    place: torch.Tensor

    @classmethod
    def true_in(cls, mask_Bn: torch.Tensor, count: int) -> "Places":
        """Where a mask of `count` True is True. Knowing the count is what spares the device from being waited for."""
        found = torch.argsort((~mask_Bn).flatten().to(torch.int8), stable=True)[:count]
        width = mask_Bn.shape[1]
        return cls(torch.div(found, width, rounding_mode="floor"), found % width)

    @classmethod
    def last_valid(cls, layout: Layout) -> "Places":
        """The last valid token of every sample; where a sample has none, its first."""
        index = torch.arange(1, layout.valid.shape[1] + 1, device=layout.valid.device)
        last = (index * layout.valid).max(1).values - 1
        return cls(torch.arange(len(last), device=last.device), last.clamp_min(0))

    def flat(self, width: int, first: int = 0) -> torch.Tensor:
        """Indices into the flattened tokens of a piece of this width, in which these tokens' own piece begins at `first`."""
        return self.sample * width + first + self.place


# --- the open block ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenBlock:
    """The block of each sample that is being filled: a cell of the block grid, which an answer's end may have cut.

    number_B: index of the block. start_B, end_B: its cell, as indices in the sample. ids_BD: its tokens; position_BD: their
    indices. valid_BD: tokens of the cell. open_BD: tokens to predict (a first block also holds the prompt's tail).
    image_index_BD: the row of the image tokens that each token shows, or -1. span_BD: as Layout's span. rope: of the samples.
    alive_B: samples that have not ended; None while none has.
    Python's own numbers, so that nobody waits for the device: counts, how many tokens of each sample were open at first;
    is_whole, whether no cell is cut; shows_image, whether any token shows an image.
    """

    number_B: torch.Tensor
    start_B: torch.Tensor
    end_B: torch.Tensor
    ids_BD: torch.Tensor
    position_BD: torch.Tensor
    valid_BD: torch.Tensor
    open_BD: torch.Tensor
    image_index_BD: torch.Tensor
    counts: tuple[int, ...]
    rope: Rope = Rope()
    span_BD: torch.Tensor | None = None
    is_whole: bool = True
    shows_image: bool = False
    alive_B: torch.Tensor | None = None

    @classmethod
    def of_masks(
        cls,
        number_B: torch.Tensor,
        start_B: torch.Tensor,
        end_B: torch.Tensor,
        config: Any,
        counts: tuple[int, ...],
        rope: Rope,
        alive_B: torch.Tensor | None = None,
    ) -> "OpenBlock":
        """A block of mask tokens only."""
        position_BD = start_B[:, None] + torch.arange(config.block_size, device=start_B.device)[None]
        valid_BD = position_BD < end_B[:, None]
        if alive_B is not None:
            valid_BD = valid_BD & alive_B[:, None]
        ids_BD, image_index_BD = torch.full_like(position_BD, config.mask_token_id), torch.full_like(position_BD, -1)
        cell = (number_B, start_B, end_B)
        return cls(*cell, ids_BD, position_BD, valid_BD, valid_BD, image_index_BD, counts, rope, alive_B=alive_B)

    def following(self, ended: Sequence[bool], config: Any) -> "OpenBlock":
        """The next block of every sample. Samples that have ended stay where they are, with padding."""
        size, alive_B = config.block_size, None
        number_B, start_B, end_B = self.number_B + 1, self.end_B, self.end_B + size
        if any(ended):
            alive_B = ~torch.tensor(ended, device=start_B.device)
            start_B, end_B = torch.where(alive_B, start_B, self.start_B), torch.where(alive_B, end_B, self.end_B)
            number_B = torch.where(alive_B, number_B, self.number_B)
        counts = tuple(0 if done else size for done in ended) or (size,) * len(self.counts)
        return OpenBlock.of_masks(number_B, start_B, end_B, config, counts, self.rope, alive_B)

    def piece(self, context: str, noisy: int) -> Piece:
        """The block as it stands, as a noisy or a clean piece."""
        block = self.number_B[:, None].expand_as(self.position_BD)
        layout = Layout(self.position_BD, block, torch.full_like(block, noisy), self.valid_BD, torch.zeros_like(block), context)
        layout.span = self.span_BD
        image_index = self.image_index_BD if self.shows_image else None
        return Piece(self.ids_BD, layout, self.rope.at(self.position_BD), image_index, self.is_whole)

    def selected(self, keep: torch.Tensor, rows: Sequence[int]) -> "OpenBlock":
        """Some samples of the block, none of which has ended: `keep` and `rows` are their numbers."""
        tensors = {name: value[keep] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        counts = tuple(self.counts[row] for row in rows)
        return replace(self, **{**tensors, "counts": counts, "rope": self.rope.selected(keep), "alive_B": None})


# --- the prompt -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What the shapes of later forwards depend on, as Python's numbers.

    has_empty: whether a prompt has no tokens. image_tokens: of all prompts. longest_start: tokens before the first open block,
    of the sample that has most. is_ragged: whether other samples have fewer. The rest is about the first open block; see
    OpenBlock.
    """

    has_empty: bool
    image_tokens: int
    longest_start: int
    is_ragged: bool
    open_tokens: tuple[int, ...]
    cell_is_whole: bool
    image_in_block: bool


@dataclass(frozen=True)
class Prompt:
    """The prompts of a batch, each [B, L + 1] and padded right: ids, block (as in Layout) and the row of the image tokens that
    each token shows or -1. length_B: tokens of each. number_B, start_B, end_B: the cell that holds the first new token. span: as
    Layout's. rope: position ids."""

    ids: torch.Tensor
    block: torch.Tensor
    image_index: torch.Tensor
    length_B: torch.Tensor
    number_B: torch.Tensor
    start_B: torch.Tensor
    end_B: torch.Tensor
    span: torch.Tensor | None = None
    rope: Rope = Rope()

    @classmethod
    def laid_out(cls, input_ids: torch.Tensor, valid: torch.Tensor, answer_index: torch.Tensor, config: Any) -> "Prompt":
        """Moves the padding of [B, L] prompts to the right and finds the cell in which the new answer begins."""
        device = input_ids.device
        lengths = valid.sum(1)
        order = torch.argsort((~valid).long(), dim=1, stable=True)
        pad = torch.zeros(len(input_ids), 1, dtype=torch.long, device=device)
        ids = torch.cat([input_ids.gather(1, order), pad], 1)
        answers = torch.cat([answer_index.abs().gather(1, order), pad], 1)  # to decoding, an answer not trained on is one
        index = torch.arange(ids.shape[1], device=device)[None]
        # Past the prompt everything counts as the new answer.
        answers = torch.where(index >= lengths[:, None], answers.max(1, keepdim=True).values + 1, answers)
        block = block_index(answers, config.block_size, config.grid)
        at_end = lengths[:, None]
        block_of_answer = block.gather(1, at_end)
        starts = segment_start(answers, config.grid).gather(1, at_end)
        end_B = block_end(at_end, starts, config.block_size, config.grid)[:, 0]
        inside = index < lengths[:, None]
        start_B = (block < block_of_answer).sum(1)
        is_image = is_visual(ids, config) & inside
        # An image that reaches into the first open block is committed in two parts, which cannot see each other.
        span = span_ids(is_image, answers, inside, answer_cells(block, answers), config.image_attention)
        shown = placed_images(ids, config, inside)
        rope = Rope(first=config.first_position)
        return cls(ids, block, shown, lengths, block_of_answer[:, 0], start_B, end_B, span, rope)

    def counted(self, block_size: int) -> Counts:
        """Brings to Python what shapes depend on, by waiting for the device once."""
        is_image = self.image_index >= 0
        index = torch.arange(is_image.shape[1], device=is_image.device)
        last_image = torch.where(is_image, index, -1).max(1).values
        figures = torch.stack([self.length_B, self.start_B, self.end_B, last_image, is_image.sum(1)]).tolist()
        lengths, starts, ends, last_images, images = figures
        return Counts(
            has_empty=0 in lengths,
            image_tokens=sum(images),
            longest_start=max(starts),
            is_ragged=min(starts) < max(starts),
            open_tokens=tuple(end - length for length, end in zip(lengths, ends, strict=True)),
            cell_is_whole=all(end - start == block_size for start, end in zip(starts, ends, strict=True)),
            image_in_block=any(last >= start for last, start in zip(last_images, starts, strict=True)),
        )

    def first_block(self, config: Any, counts: Counts) -> OpenBlock:
        """The block in which the answer begins: the prompt's tail, if the grid cuts there, and mask tokens."""
        masks = OpenBlock.of_masks(self.number_B, self.start_B, self.end_B, config, counts.open_tokens, self.rope)
        in_prompt = (masks.position_BD < self.length_B[:, None]) & masks.valid_BD
        safe = masks.position_BD.clamp_max(self.ids.shape[1] - 1)
        return replace(
            masks,
            ids_BD=torch.where(in_prompt, self.ids.gather(1, safe), masks.ids_BD),
            image_index_BD=torch.where(in_prompt, self.image_index.gather(1, safe), -1),
            open_BD=masks.valid_BD & ~in_prompt,
            span_BD=None if self.span is None else torch.where(in_prompt, self.span.gather(1, safe), 0),
            is_whole=counts.cell_is_whole,
            shows_image=counts.image_in_block,
        )

    def beginning(self, length: int, valid: torch.Tensor, context: str, has_images: bool) -> Piece:
        """The first `length` tokens, of which `valid` [B, length] marks those that go in."""
        index = torch.arange(length, device=self.ids.device).expand(len(self.ids), length)
        layout = clean(index, self.block[:, :length], valid, context)
        layout.span = None if self.span is None else self.span[:, :length]
        image_index = self.image_index[:, :length] if has_images else None
        return Piece(self.ids[:, :length], layout, self.rope.at(index), image_index)

    def selected(self, keep: torch.Tensor) -> "Prompt":
        """Some of the prompts."""
        tensors = {name: value[keep] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, rope=self.rope.selected(keep))


def clean(position: torch.Tensor, block: torch.Tensor, valid: torch.Tensor, context: str) -> Layout:
    """The layout of clean tokens."""
    zeros = torch.zeros_like(position)
    return Layout(position, block, zeros, valid, zeros, context)


# --- the committed prefix ---------------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """What is committed: ids [B, C] and layout of the cached tokens, and the images with their rows. Of one conversation, the
    next turn goes on from it. has_gaps: whether there is padding among the tokens. used: whether a next turn has taken it."""

    ids: torch.Tensor
    layout: Layout
    cache: Any  # a BlockCache or a StaticBlockCache
    pixels: dict[str, torch.Tensor]
    rows: ImageRows | None = None
    has_gaps: bool = False
    used: bool = False

    @classmethod
    def empty(cls, input_ids: torch.Tensor, pixels: dict[str, torch.Tensor], config: Any, has_gaps: bool) -> "Prefix":
        """Nothing yet, for prompts [B, L]. has_gaps: there will be padding among the tokens."""
        nothing = input_ids[:, :0]
        layout = clean(nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), config.context)
        layout.image_attention = config.image_attention
        return cls(nothing, layout, BlockCache(), pixels, has_gaps=has_gaps)

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def append(self, piece: Piece) -> None:
        """Notes tokens whose keys and values a forward has stored."""
        self.ids, self.layout = torch.cat([self.ids, piece.ids], 1), self.layout.joined(piece.layout)

    def keep_last(self, kept: torch.Tensor) -> None:
        """Turns those of the last tokens into padding that `kept` [B, n] does not mark."""
        self.layout.valid[:, -kept.shape[1] :] = kept

    def crop_last(self, count: int) -> None:
        """Forgets the last `count` tokens of every sample."""
        if count:
            length = self.length - count
            self.ids, self.layout = self.ids[:, :length], self.layout.part(slice(length))
            self.cache.crop(-count)

    def close_gaps(self, longest: int) -> None:
        """Moves the tokens of every sample together; `longest` is the number of those that have most."""
        order = torch.argsort((~self.layout.valid).to(torch.int8), dim=1, stable=True)[:, :longest]
        self.ids = self.ids.gather(1, order)
        self.layout = self.layout.with_rows({name: row.gather(1, order) for name, row in self.layout.rows.items()})
        self.cache.rearrange(order)

    def select(self, keep: torch.Tensor) -> None:
        """Goes on with some samples only."""
        self.ids, self.layout = self.ids[keep], self.layout.selected(keep)
        self.cache.batch_select_indices(keep)

    def shared(self, ids: torch.Tensor, block: torch.Tensor) -> int:
        """How many of the cached tokens a prompt with these ids and blocks, each [1, n], begins with. Where clean tokens see
        their whole block, a block counts only if both have all of it."""
        most = min(self.length, ids.shape[1])
        own, index = self.layout, torch.arange(most, device=ids.device)
        same = (self.ids[0, :most] == ids[0, :most]) & (own.block[0, :most] == block[0, :most])
        same &= own.valid[0, :most] & (own.position[0, :most] == index)
        count = int(same.long().cumprod(0).sum())
        if own.context == "causal":
            return count
        goes_on = [0 < count < len(blocks) and bool(blocks[count] == blocks[count - 1]) for blocks in (own.block[0], block[0])]
        return int((block[0, :count] < block[0, count - 1]).sum()) if any(goes_on) else count

    def shows(self, pixels: dict[str, torch.Tensor]) -> bool:
        """Whether the images of a prompt begin with these: the same placeholders could show others."""
        return all(name in pixels and _begins_with(pixels[name], seen) for name, seen in self.pixels.items())

    def shows_all(self, pixels: dict[str, torch.Tensor]) -> bool:
        """Whether these are all the images of a prompt."""
        same = self.pixels.keys() == pixels.keys() and self.shows(pixels)
        return same and all(len(self.pixels[name]) == len(value) for name, value in pixels.items())

    def taken(self, count: int, pixels: dict[str, torch.Tensor]) -> "Prefix":
        """The first `count` tokens of it for a prompt with these images; it is used up by that.

        Raises:
            ValueError: if it was used before.
        """
        if self.used:
            raise ValueError("this prefix was used before: a turn goes on from the prefix of the turn before it, once")
        self.used = True
        self.cache.crop(count - self.length)
        return Prefix(self.ids[:, :count], self.layout.part(slice(count)), self.cache, pixels)


def _begins_with(tensor: torch.Tensor, start: torch.Tensor) -> bool:
    """Whether a tensor begins, along dim 0, with another; either may be filled up with zeros to the size of larger images."""
    first = tensor[: len(start)]
    if first.dim() != start.dim() or len(first) != len(start):
        return False
    if first.shape != start.shape:
        first, start = joined([first, start]).chunk(2)
    return torch.equal(first, start)
