"""The state of a batch between the forwards of block decoding: what is committed, what waits to be, and the open block.

A finished block is not stored by a forward of its own. It waits, and the first denoising step of the next block takes it along:
one forward over [finished block | masks] stores the former and predicts the latter. So d denoising steps per block cost d
forwards. The attention of every forward comes from the same `Layout` rule as in training: tests/test_invariant_decoding.py
holds the two against each other.

Shapes: B batch, L prompt length, D block size, P waiting tokens, Q = P + D, M masked tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .cache_diffvl import BlockCache
from .layout_diffvl import Layout, attention_masks, block_end, block_index, segment_start


@dataclass
class Piece:
    """Tokens that go through the trunk together, each [B, n]: ids, their layout, and the image token that each shows or -1."""

    ids: torch.Tensor
    rows: Layout
    image: torch.Tensor

    def joined(self, after: "Piece") -> "Piece":
        return Piece(torch.cat([self.ids, after.ids], 1), self.rows.joined(after.rows), torch.cat([self.image, after.image], 1))

    def behind(self, count: int) -> "Piece":
        """Without the first so many tokens."""
        rows = {name: row[:, count:] for name, row in self.rows.rows.items()}
        return Piece(self.ids[:, count:], Layout(**rows, context=self.rows.context), self.image[:, count:])

    def selected(self, keep: torch.Tensor) -> "Piece":
        return Piece(self.ids[keep], rows_of(self.rows, keep), self.image[keep])


def rows_of(layout: Layout, keep: torch.Tensor) -> Layout:
    """Some samples of a layout."""
    return Layout(**{name: row[keep] for name, row in layout.rows.items()}, context=layout.context)


@dataclass
class Prefix:
    """What a decoder has committed for one conversation, for the next turn to go on from: ids [1, C] and layout of the cached
    tokens, and the pictures [N, 3, S, S] with their features."""

    ids: torch.Tensor
    rows: Layout
    cache: BlockCache
    pixel_values: torch.Tensor | None
    image_features: torch.Tensor | None

    def shared(self, ids: torch.Tensor, block: torch.Tensor) -> int:
        """How many of the cached tokens a prompt with these ids and blocks, each [1, n], begins with. Where clean tokens see
        their whole block, a block counts only if both have all of it."""
        most = min(self.ids.shape[1], ids.shape[1])
        own, index = self.rows, torch.arange(most, device=ids.device)
        same = (self.ids[0, :most] == ids[0, :most]) & (own.block[0, :most] == block[0, :most])
        same &= own.valid[0, :most] & (own.position[0, :most] == index)
        count = int(same.long().cumprod(0).sum())
        if self.rows.context == "causal":
            return count
        goes_on = [False, False]
        for number, blocks in enumerate((own.block[0], block[0])):
            goes_on[number] = 0 < count < len(blocks) and bool(blocks[count] == blocks[count - 1])
        return int((block[0, :count] < block[0, count - 1]).sum()) if any(goes_on) else count


class BlockDecoder:
    """Opens blocks, predicts their masks and commits them, for a batch of prompts of any lengths.

    Attributes:
        ids_BD: the open block; position_BD, valid_BD, open_BD: positions, tokens of the grid cell, tokens to predict (a first
            block also holds the prompt's tail).
        forwards: passes of the trunk so far.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        answer_index: torch.Tensor,
        pixel_values: torch.Tensor | None,
        prefix: Prefix | None = None,
    ) -> None:
        """`valid` [B, L] marks prompt tokens; `answer_index` [B, L] the earlier answers in the prompt (see block_index). `prefix`
        is what an earlier turn of the same conversation left, for one prompt; it is used up."""
        self.model, self.config = model, model.config
        self.cache = BlockCache()
        self.layout: Layout | None = None
        self.waiting: Piece | None = None
        self.stored_ids = input_ids[:, :0]
        self.reused = 0
        self.last_logits: torch.Tensor | None = None
        self.forwards = 0
        self.pixel_values = pixel_values
        self.image_features: torch.Tensor | None = None  # encoded when they are first shown
        self._lay_out_prompt(input_ids, valid, answer_index)
        pictures, found = 0 if pixel_values is None else len(pixel_values), int((self.image_index >= 0).sum())
        if found != pictures * self.config.image_tokens:
            raise ValueError(f"{pictures} pictures give {pictures * self.config.image_tokens} image tokens, the text has {found}")
        if prefix is not None:
            self._reuse(prefix)

    def _lay_out_prompt(self, input_ids: torch.Tensor, valid: torch.Tensor, answer_index: torch.Tensor) -> None:
        """Rows of the prompt, right-padded, with the first token of the new answer behind it to find its block."""
        device = input_ids.device
        lengths = valid.sum(1)
        order = torch.argsort((~valid).long(), dim=1, stable=True)
        pad = torch.zeros(len(input_ids), 1, dtype=torch.long, device=device)
        self.prompt_ids = torch.cat([input_ids.gather(1, order), pad], 1)
        answers = torch.cat([answer_index.gather(1, order), pad], 1)
        index = torch.arange(self.prompt_ids.shape[1], device=device)[None]
        # Past the prompt everything counts as the new answer.
        answers = torch.where(index >= lengths[:, None], answers.max(1, keepdim=True).values + 1, answers)
        self.prompt_block = block_index(answers, self.config.block_size, self.config.grid)
        at_end = lengths[:, None]
        block_of_answer = self.prompt_block.gather(1, at_end)
        self.prompt_length = lengths
        self.block_number = block_of_answer[:, 0]
        self.start = (self.prompt_block < block_of_answer).sum(1)
        starts = segment_start(answers, self.config.grid).gather(1, at_end)
        self.end = block_end(at_end, starts, self.config.block_size, self.config.grid)[:, 0]
        is_image = (self.prompt_ids == self.config.image_token_id) & (index < lengths[:, None])
        self.image_index = torch.where(is_image, is_image.flatten().long().cumsum(0).view_as(is_image) - 1, -1)

    def _reuse(self, prefix: Prefix) -> None:
        """Goes on with the cache of an earlier turn as far as the prompt begins with what is in it."""
        if len(self.prompt_ids) != 1:
            raise ValueError(f"a prefix takes one prompt, got {len(self.prompt_ids)}")
        seen, given = prefix.pixel_values, self.pixel_values
        if seen is not None and (given is None or len(given) < len(seen) or not torch.equal(given[: len(seen)], seen)):
            return  # other pictures stand behind the same placeholders
        start = int(self.start[0])
        # A shifted target reads the first open token where the last committed one goes in, which must be seen again then.
        most = start - 1 if self.config.target == "shift" else start
        count = prefix.shared(self.prompt_ids[:, : max(most, 0)], self.prompt_block[:, : start + 1])
        if count == 0:
            return
        self.cache, self.reused = prefix.cache, count
        self.cache.crop(count - prefix.ids.shape[1])
        self.stored_ids = prefix.ids[:, :count]
        rows = {name: row[:, :count] for name, row in prefix.rows.rows.items()}
        self.layout = Layout(**rows, context=prefix.rows.context)
        if seen is not None and given is not None and len(seen) == len(given):
            self.image_features = prefix.image_features

    def prefix(self) -> Prefix | None:
        """What is committed, for the next turn; None where nothing is."""
        if self.layout is None:
            return None
        return Prefix(self.stored_ids, self.layout, self.cache, self.pixel_values, self.image_features)

    # --- a block's life --------------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Takes in the prompt up to the first open block. Under a causal context in one pass of the trunk's own attention,
        without any mask; else it waits for the first denoising step, which needs a mask anyway."""
        longest = int(self.start.max())
        if longest == self.reused:
            return
        index = torch.arange(longest, device=self.start.device).expand(len(self.start), longest)
        rows = Layout(
            position=index,
            block=self.prompt_block[:, :longest],
            noisy=torch.zeros_like(index),
            valid=index < self.start[:, None],
            document=torch.zeros_like(index),
            context=self.config.context,
        )
        whole = Piece(self.prompt_ids[:, :longest], rows, self.image_index[:, :longest])
        self.waiting = whole.behind(self.reused)
        if self.config.context == "causal":
            self.flush()

    def open_block(self) -> None:
        """Lays out the next block: on the first call the prompt's tail (if the grid cuts there) and mask tokens."""
        size = self.config.block_size
        offset = torch.arange(size, device=self.start.device)[None]
        self.position_BD = self.start[:, None] + offset
        self.valid_BD = self.position_BD < self.end[:, None]
        in_prompt = self.position_BD < self.prompt_length[:, None]
        safe = self.position_BD.clamp_max(self.prompt_ids.shape[1] - 1)
        mask_id = torch.full_like(self.position_BD, self.config.mask_token_id)
        self.ids_BD = torch.where(in_prompt, self.prompt_ids.gather(1, safe), mask_id)
        self.image_BD = torch.where(in_prompt, self.image_index.gather(1, safe), -1)
        self.open_BD = self.valid_BD & ~in_prompt

    def predict(self, masked_BD: torch.Tensor) -> torch.Tensor:
        """Logits of the masked tokens, [M, V] in fp32 in row-major order; commits what waits on the way.

        Raises:
            ValueError: if the first token of an empty prompt is to be predicted from the one before it.
        """
        if self.config.target == "same":
            return self.forward(self.waiting, self.block_piece(noisy=1), None, masked_BD)[1]
        if bool((self.open_BD[:, 0] & (self.start == 0)).any()):
            raise ValueError("target 'shift' predicts a token from the one before it, but the prompt is empty")
        # Each token is read where the one before it stands: in the block, or where the last committed one was read.
        asked = torch.zeros_like(masked_BD)
        asked[:, :-1] = masked_BD[:, 1:]
        reads = self.block_piece(noisy=1) if bool(asked.any()) else None
        inside = self._commit_with(reads, asked)
        sample, place = masked_BD.nonzero(as_tuple=True)
        line = asked.flatten().long().cumsum(0).view_as(asked) - 1
        first = place == 0
        if not bool(first.any()):
            return inside[line[sample, place - 1]]
        # Nothing is committed before a first block that holds the whole prompt; its first token is then given, not predicted.
        assert self.last_logits is not None
        logits = self.last_logits[sample]
        if not bool(first.all()):
            logits[~first] = inside[line[sample[~first], place[~first] - 1]]
        return logits

    def block_logits(self) -> torch.Tensor:
        """`predict` for every open token of the block, [B, D, V]; zeros elsewhere."""
        logits = self.predict(self.open_BD)
        full = logits.new_zeros(*self.open_BD.shape, logits.shape[-1])
        full[self.open_BD] = logits
        return full

    def commit(self) -> None:
        """Lets the finished block wait for the next forward, and moves on."""
        self.flush()
        self.waiting = self.block_piece(noisy=0)
        self.start = self.end
        self.end = self.end + self.config.block_size
        self.block_number = self.block_number + 1

    def flush(self) -> None:
        """Commits what waits, by a forward of its own."""
        if self.waiting is not None:
            self._commit_with(None, None)

    def select(self, keep: torch.Tensor) -> None:
        """Goes on with some samples only; `keep` [B'] are their numbers, rising."""
        for name in ("prompt_ids", "prompt_block", "prompt_length", "block_number", "start", "end", "image_index"):
            setattr(self, name, getattr(self, name)[keep])
        if self.layout is not None:
            self.layout, self.stored_ids = rows_of(self.layout, keep), self.stored_ids[keep]
            self.cache.batch_select_indices(keep)
        if self.waiting is not None:
            self.waiting = self.waiting.selected(keep)
        if self.last_logits is not None:
            self.last_logits = self.last_logits[keep]

    # --- forwards --------------------------------------------------------------------------------------------------------------

    def block_piece(self, noisy: int) -> Piece:
        """The open block as it stands, as a noisy or a clean piece."""
        block = self.block_number[:, None].expand_as(self.position_BD)
        flags = torch.full_like(block, noisy)
        rows = Layout(self.position_BD, block, flags, self.valid_BD, torch.zeros_like(block), self.config.context)
        return Piece(self.ids_BD, rows, self.image_BD)

    def _commit_with(self, read: Piece | None, asked_read: torch.Tensor | None) -> torch.Tensor:
        """One forward that commits what waits and reads a block, where there is either; remembers what the last committed token
        of each sample predicts, if a shifted target will ask for it. Returns the logits of `asked_read`."""
        stored, last = self.waiting, None
        if stored is None and read is None:
            return torch.empty(0)
        if stored is not None and self.config.target == "shift":
            last = last_tokens(stored.rows)
        of_stored, of_read = self.forward(stored, read, last, asked_read)
        if last is not None:
            has_one = last.any(1)
            if self.last_logits is None:
                self.last_logits = of_stored.new_zeros(len(has_one), of_stored.shape[-1])
            self.last_logits[has_one] = of_stored
        return of_read

    def forward(
        self,
        stored: Piece | None,
        read: Piece | None,
        asked_stored: torch.Tensor | None,
        asked_read: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of [stored | read], at least one of them; the keys and values of `stored` stay.

        Args:
            asked_stored, asked_read: bool masks of the tokens whose logits are wanted; None for none of them.
        Returns:
            logits of `asked_stored` and of `asked_read`, each [.., V] in fp32 in row-major order.
        """
        pieces = [piece for piece in (stored, read) if piece is not None]
        masks = [
            torch.zeros_like(piece.rows.valid) if asked is None else asked
            for piece, asked in ((stored, asked_stored), (read, asked_read))
            if piece is not None
        ]
        piece = pieces[0] if len(pieces) == 1 else pieces[0].joined(pieces[1])
        asked = torch.cat(masks, 1)
        count = 0 if stored is None else stored.ids.shape[1]
        logits = self._trunk(piece, count, asked)
        if stored is not None:
            self.layout = stored.rows if self.layout is None else self.layout.joined(stored.rows)
            self.stored_ids = torch.cat([self.stored_ids, stored.ids], 1)
        self.waiting = None
        in_stored = (torch.arange(asked.shape[1], device=asked.device) < count).expand_as(asked)[asked]
        return logits[in_stored], logits[~in_stored]

    def _trunk(self, piece: Piece, stored: int, asked: torch.Tensor) -> torch.Tensor:
        past = 0 if self.layout is None else self.layout.position.shape[1]
        layout = piece.rows if self.layout is None else self.layout.joined(piece.rows)
        self.cache.store = stored
        arguments: dict[str, Any] = {"attention_mask": None, "position_ids": None}
        if bool((piece.image >= 0).any()):
            if self.image_features is None:
                self.image_features = self.model.image_features(self.pixel_values)
            arguments |= {"image_features": self.image_features, "image_index": piece.image}
        if past or stored < piece.ids.shape[1] or layout.context != "causal":
            dtype = self.model.get_input_embeddings().weight.dtype
            masks = attention_masks(self.model.language_model.config, layout, slice(past, None), dtype)
            arguments |= {"attention_mask": masks, "position_ids": piece.rows.position}
        self.forwards += 1
        return self.model(
            piece.ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_rows=asked,
            **arguments,
        ).logits.float()


def last_tokens(rows: Layout) -> torch.Tensor:
    """bool [B, n]: the last valid token of each sample."""
    index = torch.arange(rows.valid.shape[1], device=rows.valid.device)
    last = torch.where(rows.valid, index, -1).max(1, keepdim=True).values
    return (index[None] == last) & rows.valid
