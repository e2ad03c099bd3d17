"""The state of a batch between the forwards of block decoding: what is committed, what waits to be, and the open block.

A finished block is not stored by a forward of its own. It waits, and the first denoising step of the next block takes it along:
one forward over [finished block | masks] stores the former and predicts the latter. So d denoising steps per block cost d
forwards. The attention of every forward comes from the same `Layout` rule as in training.

Invariant: what decides about shapes (how many tokens are masked, whether anything is hidden) is counted in Python's numbers, so
that a denoising step never waits for the device.

Shapes: B batch, L prompt length, D block size, P waiting tokens, Q = P + D, M masked tokens, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from .blocks_diffvl import Counts, Piece, Places, Prefix, Prompt
from .cache_diffvl import BlockCache, StaticBlockCache, StaticTrunk
from .clock_diffvl import moment
from .images_diffvl import ImageRows, Shown
from .masks_diffvl import attention_masks


class BlockDecoder:
    """Opens blocks, predicts their masks and commits them, for a batch of prompts of any lengths.

    Attributes:
        begun: the moment at which the work began, before images are encoded. prompt, counts: the prompts, and what was counted of
        them on the way in.
        block: the open block of every sample. A caller puts another one in its place as tokens settle.
        committed: the tokens in the cache. waiting: tokens that the next forward commits, if any.
        last_logits: [B, V], what the last committed token of each sample predicts, where a shifted target asks for it.
        reused: tokens of the prompt that an earlier turn had computed. forwards: passes of the trunk so far.
        asks_all: whether the logits of every token of a fixed shape are asked for, not only those of an open block.
    """

    def __init__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        answer_index: torch.Tensor,
        pixels: dict[str, torch.Tensor],
        prefix: Prefix | None = None,
        static: StaticTrunk | None = None,
    ) -> None:
        """`valid` [B, L] marks prompt tokens; `answer_index` [B, L] the earlier answers in the prompt (see block_index). `prefix`
        is what an earlier turn of the same conversation left, for one prompt; it is used up. `static`, empty and large enough,
        takes over from a cache that grows once the prompt is in.

        Raises:
            ValueError: if images and placeholders do not match in number.
        """
        self.begun = moment(input_ids.device)
        self.model, self.config, self.static = model, model.config, static
        self.prompt = Prompt.laid_out(input_ids, valid, answer_index, self.config)
        self.counts = self._count()
        rows = self._encoded(pixels, prefix)
        if model.images.has_axes:
            shown = Shown.in_text(input_ids, valid, rows, self.config)
            self.prompt = replace(self.prompt, rope=model.images.rope(input_ids, valid, pixels, shown))
        self.block = self.prompt.first_block(self.config, self.counts)
        self.committed = replace(Prefix.empty(input_ids, pixels, self.config, self.counts.is_ragged), rows=rows)
        self.waiting: Piece | None = None
        self.last_logits: torch.Tensor | None = None
        self.reused = self.forwards = 0
        self.asks_all = False
        self._masks: Any = None  # of the open block read alone, which every step but the first does
        if prefix is not None:
            self._reuse(prefix)

    @property
    def has_plain_attention(self) -> bool:
        """Whether the beginning of a prompt may be left to the trunk's own attention and position ids."""
        return self.config.context == "causal" and self.prompt.span is None and self.prompt.rope.table is None

    @property
    def device(self) -> torch.device:
        return self.prompt.ids.device

    def _count(self) -> Counts:
        return self.prompt.counted(self.config.block_size)

    def _encoded(self, pixels: dict[str, torch.Tensor], prefix: Prefix | None) -> ImageRows | None:
        """The rows of the prompts' images; those that an earlier turn has encoded are taken over.

        Raises:
            ValueError: if images and placeholders do not match in number.
        """
        if prefix is not None and prefix.rows is not None and prefix.shows_all(pixels):
            rows: ImageRows | None = prefix.rows
        else:
            rows = self.model.images.encode(pixels) if pixels else None
        (rows or ImageRows(None, ())).require(self.counts.image_tokens)
        return rows

    def _reuse(self, prefix: Prefix) -> None:
        """Goes on with the cache of an earlier turn as far as the prompt begins with what is in it."""
        if len(self.prompt.ids) != 1:
            raise ValueError(f"a prefix takes one prompt, got {len(self.prompt.ids)}")
        pixels, rows, longest = self.committed.pixels, self.committed.rows, self.counts.longest_start
        if not prefix.shows(pixels):
            return
        # A shifted target reads the first open token where the last committed one goes in, which must be seen again then.
        most = longest - 1 if self.config.target == "shift" else longest
        count = prefix.shared(self.prompt.ids[:, : max(most, 0)], self.prompt.block[:, : longest + 1])
        if count:
            self.committed, self.reused = replace(prefix.taken(count, pixels), rows=rows), count

    def prefix(self) -> Prefix | None:
        """What is committed, for the next turn; None where nothing is."""
        if not self.committed.length:
            return None
        cache = self.committed.cache
        return replace(self.committed, cache=cache.snapshot() if isinstance(cache, StaticBlockCache) else cache)

    # --- a block's life --------------------------------------------------------------------------------------------------------

    def prefill(self) -> None:
        """Takes in the prompt up to the first open block. Under a causal context in one pass of the trunk's own attention,
        without any mask; else it waits for the first denoising step, which needs a mask anyway.

        Raises:
            ValueError: if the first token of an empty prompt is to be predicted from the one before it.
        """
        if self.config.target == "shift" and self.counts.has_empty:
            raise ValueError("target 'shift' predicts a token from the one before it, but the prompt is empty")
        longest = self.counts.longest_start
        if longest == self.reused:
            return
        valid = torch.arange(longest, device=self.device)[None] < self.prompt.start_B[:, None]
        whole = self.prompt.beginning(longest, valid, self.config.context, self.counts.image_tokens > 0)
        self.waiting = whole.without(self.reused)
        if self.config.context == "causal":
            self.flush()

    def predict(self, masked: Places) -> torch.Tensor:
        """Logits of masked tokens of the block, [M, V] in fp32; commits what waits on the way."""
        read = self.block.piece(self.config.context, noisy=1)
        if self.config.target == "same":
            return self.forward(self.waiting, read, None, masked)[1]
        # Each token is read where the one before it stands: in the block, or where the last committed one was read.
        before = Places(masked.sample, (masked.place - 1).clamp_min(0))
        alone = self.config.block_size == 1
        inside = self._commit_with(None if alone else read, before)
        # Nothing is committed before a first block that holds the whole prompt; its first token is then given, not predicted.
        if self.last_logits is None:
            return inside
        after = self.last_logits[masked.sample]
        return after if alone else torch.where((masked.place == 0)[:, None], after, inside)

    def block_logits(self) -> torch.Tensor:
        """`predict` for every open token of the block, [B, D, V]; zeros elsewhere."""
        open_BD = self.block.open_BD
        logits = self.predict(Places.true_in(open_BD, sum(self.block.counts)))
        full = logits.new_zeros(*open_BD.shape, logits.shape[-1])
        full[open_BD] = logits
        return full

    def commit(self, ended: Sequence[bool] = ()) -> None:
        """Lets the finished block wait for the next forward, and opens the next; samples that have ended stay where they are."""
        self.flush()
        self.waiting = self.block.piece(self.config.context, noisy=0)
        if not self.block.is_whole or self.block.alive_B is not None:
            self.committed.has_gaps = True
        self.block, self._masks = self.block.following(ended, self.config), None

    def flush(self) -> None:
        """Commits what waits, by a forward of its own."""
        if self.waiting is not None:
            self._commit_with(None, None)

    def select(self, rows: list[int]) -> None:
        """Goes on with some samples only, none of which has ended; `rows` are their numbers, rising."""
        keep = torch.tensor(rows, device=self.device)
        self.prompt = self.prompt.selected(keep)
        self.block, self._masks = self.block.selected(keep, rows), None
        self.committed.select(keep)
        if self.waiting is not None:
            self.waiting = self.waiting.selected(keep)
        if self.last_logits is not None:
            self.last_logits = self.last_logits[keep]

    # --- forwards --------------------------------------------------------------------------------------------------------------

    def _commit_with(self, read: Piece | None, asked_read: Places | None) -> torch.Tensor:
        """One forward that commits what waits and reads a block, where there is either; remembers what the last committed token
        of each sample predicts, if a shifted target will ask for it. Returns the logits of `asked_read`."""
        stored, last = self.waiting, None
        if stored is None and read is None:
            return torch.empty(0)
        if stored is not None and self.config.target == "shift":
            last = Places.last_valid(stored.layout)
        of_stored, of_read = self.forward(stored, read, last, asked_read if read is not None else None)
        if stored is not None and last is not None:
            has_one = stored.layout.valid.any(1, keepdim=True)
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
        compiled = self._has_fixed_shape(piece, count, stored is None or stored.is_block)
        logits = self._trunk(piece, count, torch.cat(rows) if rows else piece.ids.new_empty(0), compiled)
        if stored is not None:
            self.committed.append(stored)
            self._masks = None
        self.waiting = None
        of_stored = 0 if asked_stored is None else len(asked_stored.sample)
        return logits[:of_stored], logits[of_stored:]

    def _has_fixed_shape(self, piece: Piece, stored: int, is_block: bool) -> bool:
        """Whether a forward is one of those that a static trunk is compiled for: of blocks [masks], [finished block], or both; of
        drafts, all; after something that is committed."""
        if self.static is None or not self.committed.length or piece.image_index is not None or not is_block:
            return False
        size, read = self.config.block_size, piece.ids.shape[1] - stored
        return self.asks_all or (read in (0, size) and stored in (0, size))

    def _trunk(self, piece: Piece, stored: int, rows: torch.Tensor, compiled: bool) -> torch.Tensor:
        """Logits of the tokens at `rows` of the flattened piece, whose first `stored` tokens stay in the cache."""
        self.forwards += 1
        if compiled and isinstance(self.committed.cache, BlockCache):
            assert self.static is not None
            self.static.cache.load(self.committed.cache)
            self.committed.cache = self.static.cache
        cache = self.committed.cache
        if isinstance(cache, BlockCache):
            cache.store = stored
            return self._pass(piece, stored, rows)
        logits = self._compiled_pass(piece, stored, rows) if compiled else self._pass(piece, stored, rows)
        cache.advance(stored)
        return logits

    def _pass(self, piece: Piece, stored: int, rows: torch.Tensor) -> torch.Tensor:
        """A forward of any shape, with the head on the asked rows only."""
        committed = self.committed
        arguments: dict[str, Any] = {"attention_mask": None, "position_ids": None, "text_only": piece.image_index is None}
        if piece.image_index is not None:
            arguments |= {"rows": committed.rows, "image_index": piece.image_index}
        # The beginning of a causal prompt needs no mask: the trunk's own attention is right.
        if committed.length or stored < piece.ids.shape[1] or not self.has_plain_attention:
            arguments |= {"attention_mask": self._masks_of(piece, stored), "position_ids": piece.rope_ids}
        if (noisy := self._noisy(piece, stored)) is not None:
            arguments["noisy"] = noisy
        return self.model(
            piece.ids, past_key_values=committed.cache, use_cache=True, logits_rows=rows, **arguments
        ).logits.float()

    def _compiled_pass(self, piece: Piece, stored: int, rows: torch.Tensor) -> torch.Tensor:
        """A forward of a fixed shape on the static trunk; its head runs on all tokens of the open block, and on the one before
        them where a shifted target reads it."""
        assert self.static is not None
        tokens = piece.ids.shape[1]
        before = stored > 0 and self.config.target == "shift"
        keep = tokens if self.asks_all else max(tokens - stored + before, 1)
        masks, gate = self._masks_of(piece, stored), self.model.gate
        with nullcontext() if gate is None else gate.opened(self._noisy(piece, stored)):
            logits = self.static.logits(piece.ids, masks, piece.rope_ids, keep)
        sample = torch.div(rows, tokens, rounding_mode="floor")
        place = (rows % tokens - (tokens - keep)).clamp_min(0)  # a sample that has ended has no last token
        return logits.flatten(0, 1)[sample * keep + place].float()

    def _noisy(self, piece: Piece, stored: int) -> torch.Tensor | None:
        """The tokens that gated adapters act on, bool [B, n]; None where the model has none, or all tokens are clean."""
        return None if self.model.gate is None or stored == piece.ids.shape[1] else piece.layout.noisy.bool()

    def _masks_of(self, piece: Piece, stored: int) -> Any:
        """Who sees whom in a forward, as the trunk takes it; kept from step to step of a block, where only ids change."""
        if stored == 0 and self._masks is not None:
            return self._masks
        past, block = self.committed.length, self.block
        layout = self.committed.layout.joined(piece.layout)
        queries = slice(past, past + piece.ids.shape[1])
        whole = not self.committed.has_gaps and block.is_whole and block.alive_B is None
        is_static = isinstance(self.committed.cache, StaticBlockCache)
        sees_all = stored == 0 and whole and not is_static
        if is_static:
            layout = layout.padded(self.committed.cache.capacity)
        dtype = self.model.get_input_embeddings().weight.dtype
        masks = attention_masks(self.config.text_config, layout, queries, dtype, sees_all)
        if stored == 0:
            self._masks = masks
        return masks
