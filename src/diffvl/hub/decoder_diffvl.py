"""The state of a batch between the forwards of block decoding: what is committed, what waits to be, and the open block.

A finished block is not stored by a forward of its own. It waits, and the first denoising step of the next block takes it along:
one forward over [finished block | masks] stores the former and predicts the latter. So d denoising steps per block cost d
forwards. The attention of every forward comes from the same `Layout` rule as in training: tests/test_invariant_decoding.py
holds the two against each other.

What decides about shapes (how many tokens are masked, whether anything is hidden) is counted here in Python's numbers, so that a
denoising step never waits for the device: tests/hub/test_static.py.

Shapes: B batch, L prompt length, D block size, P waiting tokens, Q = P + D, M masked tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .cache_diffvl import BlockCache, StaticBlockCache
from .layout_diffvl import Layout, attention_masks, block_end, block_index, image_rows, segment_start
from .pieces_diffvl import Piece, Places, rows_of
from .prefix_diffvl import Prefix
from .static_diffvl import StaticTrunk


class BlockDecoder:
    """Opens blocks, predicts their masks and commits them, for a batch of prompts of any lengths.

    Attributes:
        ids_BD: the open block; position_BD, valid_BD, open_BD: positions, tokens of the grid cell, tokens to predict (a first
            block also holds the prompt's tail).
        open_count: tokens to predict of each sample.
        gaps: whether the committed tokens have padding among them.
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
        static: StaticTrunk | None = None,
    ) -> None:
        """`valid` [B, L] marks prompt tokens; `answer_index` [B, L] the earlier answers in the prompt (see block_index). `prefix`
        is what an earlier turn of the same conversation left, for one prompt; it is used up. `static`, empty and large enough,
        takes over from a cache that grows once the prompt is in.

        Raises:
            ValueError: if pictures and placeholders do not match in number.
        """
        self.model, self.config, self.static = model, model.config, static
        self.cache: Any = BlockCache()
        self.layout: Layout | None = None
        self.waiting: Piece | None = None
        self.alive: torch.Tensor | None = None  # bool [B], samples that have not ended; None while none has
        self.stored_ids = input_ids[:, :0]
        self.waiting_is_whole = False  # whether what waits is a block whose cell the grid did not cut
        self.reused = 0
        self.last_logits: torch.Tensor | None = None
        self.forwards = 0
        self.pixel_values = pixel_values
        self.image_features: torch.Tensor | None = None  # encoded when they are first shown
        self._masks: Any = None  # of the open block read alone, which every step but the first does
        self._lay_out_prompt(input_ids, valid, answer_index)
        found = self._count()
        pictures = 0 if pixel_values is None else len(pixel_values)
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
        answers = torch.cat([answer_index.abs().gather(1, order), pad], 1)  # to decoding, an answer not trained on is one
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
        self.image_index = image_rows(is_image)

    def _count(self) -> int:
        """Brings to Python what later shapes depend on, by waiting for the device once; returns the number of image tokens."""
        is_image = self.image_index >= 0
        index = torch.arange(is_image.shape[1], device=is_image.device)
        last_image = torch.where(is_image, index, -1).max(1).values
        figures = torch.stack([self.prompt_length, self.start, self.end, last_image, is_image.sum(1)]).tolist()
        lengths, starts, ends, last_images, images = figures
        self.has_empty = 0 in lengths
        self.longest_start = max(starts)
        self.gaps = min(starts) < self.longest_start
        self.open_count = [end - length for length, end in zip(lengths, ends, strict=True)]
        self.cell_is_whole = all(end - start == self.config.block_size for start, end in zip(starts, ends, strict=True))
        self.image_in_block = any(last >= start for last, start in zip(last_images, starts, strict=True))
        self.has_images = any(images)
        return sum(images)

    def _reuse(self, prefix: Prefix) -> None:
        """Goes on with the cache of an earlier turn as far as the prompt begins with what is in it."""
        if len(self.prompt_ids) != 1:
            raise ValueError(f"a prefix takes one prompt, got {len(self.prompt_ids)}")
        if not prefix.shows(self.pixel_values):
            return
        # A shifted target reads the first open token where the last committed one goes in, which must be seen again then.
        most = self.longest_start - 1 if self.config.target == "shift" else self.longest_start
        count = prefix.shared(self.prompt_ids[:, : max(most, 0)], self.prompt_block[:, : self.longest_start + 1])
        if count == 0:
            return
        begun = prefix.begun(count)
        self.cache = begun.cache
        self.reused, self.stored_ids, self.layout = count, begun.ids, begun.rows
        seen, given = begun.pixel_values, self.pixel_values
        if seen is not None and given is not None and len(seen) == len(given):
            self.image_features = begun.image_features

    def prefix(self) -> Prefix | None:
        """What is committed, for the next turn; None where nothing is."""
        if self.layout is None:
            return None
        cache = self.cache.snapshot() if isinstance(self.cache, StaticBlockCache) else self.cache
        return Prefix(self.stored_ids, self.layout, cache, self.pixel_values, self.image_features)

    # --- a block's life --------------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Takes in the prompt up to the first open block. Under a causal context in one pass of the trunk's own attention,
        without any mask; else it waits for the first denoising step, which needs a mask anyway.

        Raises:
            ValueError: if the first token of an empty prompt is to be predicted from the one before it.
        """
        if self.config.target == "shift" and self.has_empty:
            raise ValueError("target 'shift' predicts a token from the one before it, but the prompt is empty")
        longest = self.longest_start
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
        image = self.image_index[:, :longest] if self.has_images else None
        whole = Piece(self.prompt_ids[:, :longest], rows, image)
        self.waiting = whole.behind(self.reused)
        if self.config.context == "causal":
            self.flush()

    def open_block(self) -> None:
        """Lays out the next block: on the first call the prompt's tail (if the grid cuts there) and mask tokens."""
        size = self.config.block_size
        offset = torch.arange(size, device=self.start.device)[None]
        self.position_BD = self.start[:, None] + offset
        self.valid_BD = self.position_BD < self.end[:, None]
        if self.alive is not None:
            self.valid_BD = self.valid_BD & self.alive[:, None]
        in_prompt = (self.position_BD < self.prompt_length[:, None]) & self.valid_BD
        safe = self.position_BD.clamp_max(self.prompt_ids.shape[1] - 1)
        mask_id = torch.full_like(self.position_BD, self.config.mask_token_id)
        self.ids_BD = torch.where(in_prompt, self.prompt_ids.gather(1, safe), mask_id)
        self.image_BD = torch.where(in_prompt, self.image_index.gather(1, safe), -1)
        self.open_BD = self.valid_BD & ~in_prompt
        self._masks = None

    def predict(self, masked: Places) -> torch.Tensor:
        """Logits of masked tokens of the block, [M, V] in fp32; commits what waits on the way."""
        if self.config.target == "same":
            return self.forward(self.waiting, self.block_piece(noisy=1), None, masked)[1]
        # Each token is read where the one before it stands: in the block, or where the last committed one was read.
        before = Places(masked.sample, (masked.place - 1).clamp_min(0))
        alone = self.config.block_size == 1
        inside = self._commit_with(None if alone else self.block_piece(noisy=1), before)
        # Nothing is committed before a first block that holds the whole prompt; its first token is then given, not predicted.
        if self.last_logits is None:
            return inside
        after = self.last_logits[masked.sample]
        return after if alone else torch.where((masked.place == 0)[:, None], after, inside)

    def block_logits(self) -> torch.Tensor:
        """`predict` for every open token of the block, [B, D, V]; zeros elsewhere."""
        logits = self.predict(Places.of(self.open_BD, sum(self.open_count)))
        full = logits.new_zeros(*self.open_BD.shape, logits.shape[-1])
        full[self.open_BD] = logits
        return full

    def commit(self, ended: Sequence[bool] = ()) -> None:
        """Lets the finished block wait for the next forward, and moves on; samples that have ended stay where they are, with
        padding for their next blocks."""
        self.flush()
        self.waiting, self.waiting_is_whole = self.block_piece(noisy=0), self.cell_is_whole
        self.gaps = self.gaps or not self.cell_is_whole or self.alive is not None
        size = self.config.block_size
        self.alive = ~torch.tensor(ended, device=self.start.device) if any(ended) else None
        start, end, number = self.end, self.end + size, self.block_number + 1
        if self.alive is not None:
            start, end = torch.where(self.alive, start, self.start), torch.where(self.alive, end, self.end)
            number = torch.where(self.alive, number, self.block_number)
        self.start, self.end, self.block_number = start, end, number
        self.open_count = [0 if done else size for done in ended] or [size] * len(self.open_count)
        self.cell_is_whole, self.image_in_block = True, False

    def flush(self) -> None:
        """Commits what waits, by a forward of its own."""
        if self.waiting is not None:
            self._commit_with(None, None)

    def select(self, rows: list[int]) -> None:
        """Goes on with some samples only, none of which has ended; `rows` are their numbers, rising."""
        self._masks, self.alive = None, None
        self.open_count = [self.open_count[row] for row in rows]
        keep = torch.tensor(rows, device=self.start.device)
        names = ("prompt_ids", "prompt_block", "prompt_length", "block_number", "start", "end", "image_index", "stored_ids")
        for name in names:
            setattr(self, name, getattr(self, name)[keep])
        self.cache.batch_select_indices(keep)
        if self.layout is not None:
            self.layout = rows_of(self.layout, keep)
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
        return Piece(self.ids_BD, rows, self.image_BD if self.image_in_block else None)

    def _commit_with(self, read: Piece | None, asked_read: Places | None) -> torch.Tensor:
        """One forward that commits what waits and reads a block, where there is either; remembers what the last committed token
        of each sample predicts, if a shifted target will ask for it. Returns the logits of `asked_read`."""
        stored, last = self.waiting, None
        if stored is None and read is None:
            return torch.empty(0)
        if stored is not None and self.config.target == "shift":
            last = Places.last_of(stored.rows)
        of_stored, of_read = self.forward(stored, read, last, asked_read if read is not None else None)
        if stored is not None and last is not None:
            has_one = stored.rows.valid.any(1, keepdim=True)
            before = torch.zeros_like(of_stored) if self.last_logits is None else self.last_logits
            self.last_logits = torch.where(has_one, of_stored, before)
        return of_read

    def forward(
        self, stored: Piece | None, read: Piece | None, asked_stored: Places | None, asked_read: Places | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward of [stored | read], at least one of them; the keys and values of `stored` stay.

        Args:
            asked_stored, asked_read: the tokens of each whose logits are wanted; None for none of them.
        Returns:
            logits of `asked_stored` and of `asked_read`, each [.., V] in fp32.
        """
        pieces = [piece for piece in (stored, read) if piece is not None]
        piece = pieces[0] if len(pieces) == 1 else pieces[0].joined(pieces[1])
        count = 0 if stored is None else stored.ids.shape[1]
        width = piece.ids.shape[1]
        rows = [asked.flat(width, first) for asked, first in ((asked_stored, 0), (asked_read, count)) if asked is not None]
        logits = self._trunk(piece, count, torch.cat(rows) if rows else piece.ids.new_empty(0))
        if stored is not None:
            self.layout = stored.rows if self.layout is None else self.layout.joined(stored.rows)
            self.stored_ids = torch.cat([self.stored_ids, stored.ids], 1)
            self._masks = None
        self.waiting = None
        of_stored = 0 if asked_stored is None else len(asked_stored.sample)
        return logits[:of_stored], logits[of_stored:]

    def _trunk(self, piece: Piece, stored: int, rows: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens at `rows` of the flattened piece, whose first `stored` tokens stay in the cache."""
        self.forwards += 1
        in_shape = self._has_fixed_shape(piece, stored)
        if in_shape and isinstance(self.cache, BlockCache):
            assert self.static is not None
            self.static.cache.load(self.cache)
            self.cache = self.static.cache
        if isinstance(self.cache, BlockCache):
            self.cache.store = stored
            return self._pass(piece, stored, rows)
        logits = self._compiled_pass(piece, stored, rows) if in_shape else self._pass(piece, stored, rows)
        self.cache.advance(stored)
        return logits

    def _has_fixed_shape(self, piece: Piece, stored: int) -> bool:
        """Whether a forward is one of those that a static trunk is compiled for: [masks], [finished block], or both; behind
        something that is committed."""
        size, read = self.config.block_size, piece.ids.shape[1] - stored
        in_shape = read in (0, size) and (stored == 0 or (stored == size and self.waiting_is_whole))
        return self.static is not None and self.layout is not None and piece.image is None and in_shape

    def _pass(self, piece: Piece, stored: int, rows: torch.Tensor) -> torch.Tensor:
        """A forward of any shape, with the head on the asked rows only."""
        arguments: dict[str, Any] = {"attention_mask": None, "position_ids": None, "text_only": piece.image is None}
        if piece.image is not None:
            if self.image_features is None:
                self.image_features = self.model.image_features(self.pixel_values)
            arguments |= {"image_features": self.image_features, "image_index": piece.image}
        # The beginning of a causal prompt needs no mask: the trunk's own attention is right.
        if self.layout is not None or stored < piece.ids.shape[1] or self.config.context != "causal":
            arguments |= {"attention_mask": self._masks_of(piece, stored), "position_ids": piece.rows.position}
        return self.model(piece.ids, past_key_values=self.cache, use_cache=True, logits_rows=rows, **arguments).logits.float()

    def _compiled_pass(self, piece: Piece, stored: int, rows: torch.Tensor) -> torch.Tensor:
        """A forward of a fixed shape on the static trunk; its head runs on all tokens of the open block, and on the one before
        them where a shifted target reads it."""
        assert self.static is not None
        tokens = piece.ids.shape[1]
        before = stored > 0 and self.config.target == "shift"
        keep = max(tokens - stored + before, 1)
        embeds = self.model.get_input_embeddings()(piece.ids)
        logits = self.static.logits(embeds, self._masks_of(piece, stored), piece.rows.position, keep)
        sample = torch.div(rows, tokens, rounding_mode="floor")
        place = (rows % tokens - (tokens - keep)).clamp_min(0)  # a sample that has ended has no last token
        return logits.flatten(0, 1)[sample * keep + place].float()

    def _masks_of(self, piece: Piece, stored: int) -> Any:
        """Who sees whom in a forward, as the trunk takes it; kept from step to step of a block, where only ids change."""
        if stored == 0 and self._masks is not None:
            return self._masks
        past = 0 if self.layout is None else self.layout.position.shape[1]
        layout = piece.rows if self.layout is None else self.layout.joined(piece.rows)
        queries = slice(past, past + piece.ids.shape[1])
        whole = not self.gaps and self.cell_is_whole and self.alive is None
        is_static = isinstance(self.cache, StaticBlockCache)
        sees_all = stored == 0 and whole and not is_static
        if is_static:
            layout = layout.padded(self.cache.capacity)
        dtype = self.model.get_input_embeddings().weight.dtype
        masks = attention_masks(self.model.language_model.config, layout, queries, dtype, sees_all)
        if stored == 0:
            self._masks = masks
        return masks
