"""The mode of a lossless checkpoint: gated adapters draft, and the weights themselves check what was drafted.

A forward sees clean tokens, the last known one x_n and the drafts d_1 .. d_m behind it, and masks. The adapters act on the masks
alone, so what a clean token predicts is what the parent predicts there, and checks the draft at its place (`judge_diffvl`). The
clean tokens that are kept stay in the cache; nothing of a mask does.

A mask at position p stands in for the clean token at p and predicts token p + 1. So a draft of k masks begins at the position
behind the last clean token that it sees, and says nothing of that position itself: the clean token does, for certain.

    separate  [x_n | k masks] gives token n + 1 and drafts of n + 2 ..., then [x_{n+1} d_1 .. d_k] checks them: two forwards and
              2 + a tokens, where a drafts are accepted. In the first of them the block may be denoised in several forwards.
    fused     a forward checks the drafts of the one before it and makes the next ones: k masks behind x_n and behind every d_i,
              as nobody knows yet which of them will be the last that is accepted. One forward of (k + 1) (m + 1) tokens gives
              1 + a tokens.

Both are one function, which puts masks behind all clean tokens or behind none. Every clean token is a block of its own, and a
draft has the number of the position at which it begins and a copy number of its own, so the attention rule of `layout_diffvl`
holds as it stands. Each sample accepts its own number of drafts and stands at its own position.

Shapes: B batch, m drafts that are checked, k masks of a draft, V vocabulary.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch

from .answers_diffvl import BatchAnswers, quota, settled
from .blocks_diffvl import Piece, Places, clean
from .costs_diffvl import DraftPlan, plan_of
from .decoder_diffvl import BlockDecoder
from .judge_diffvl import Drafts, Judge, Sampling
from .layout_diffvl import Layout
from .settings_diffvl import DecodeSettings

GAPS = 0.25  # share of padding in the cache that is let be


def speculate_gated(answers: BatchAnswers, settings: DecodeSettings, sampling: Sampling) -> None:
    """Decodes every sample of a batch to its end.

    Raises:
        ValueError: if a prompt is empty.
    """
    drafter = Drafter(answers, settings, Judge(sampling), plan_of(answers.decoder, settings))
    while drafter.go_on():
        pass


class Answers(Protocol):
    """Whose tokens are drafted: `BatchAnswers`, or whoever else keeps answers in its way. live: the samples, by the decoder's
    rows."""

    decoder: BlockDecoder
    live: Any

    def length(self, sample: Any) -> int: ...
    def note_prediction(self) -> None: ...
    def note_drafts(self, sample: Any, count: int, accepted: int) -> None: ...
    def extend(self, sample: Any, tokens: list[int]) -> bool: ...
    def drop(self, ended: list[bool]) -> bool: ...


class Drafter:
    """The state of a batch between two forwards.

    Attributes:
        plan: how long drafts are and when they are made. at_B: position of the last known token of each sample, known_B: its id.
        live_B: samples that have not ended. drafts: what the next forward checks; has_drafts: whether any sample has some.
        last_B: the last position whose prediction an answer may hold; by the settings, unless somebody sets it.
        fresh: whether the prompt is still to go in. filled: clean tokens of each sample in the cache.
    """

    def __init__(self, answers: Answers, settings: DecodeSettings, judge: Judge, plan: DraftPlan) -> None:
        """Raises ValueError if a prompt is empty."""
        decoder = answers.decoder
        if decoder.counts.has_empty:
            raise ValueError("mode='speculative' goes on from a prompt, but one is empty")
        self.answers, self.decoder, self.settings, self.judge, self.plan = answers, decoder, settings, judge, plan
        prompt, device = decoder.prompt, decoder.device
        self.at_B = prompt.length_B - 1
        self.known_B = prompt.ids.gather(1, self.at_B[:, None])[:, 0]
        self.last_B = prompt.length_B + settings.max_new_tokens - 2
        self.live_B = torch.ones_like(self.at_B, dtype=torch.bool)
        self.drafts = Drafts.none(len(prompt.ids), device)
        self.filled: list[int] = prompt.length_B.tolist()
        self.fresh, self.has_drafts = True, False
        self.ended = [False] * len(prompt.ids)
        decoder.committed.has_gaps = True
        decoder.asks_all = True

    # --- one forward -----------------------------------------------------------------------------------------------------------

    def go_on(self) -> bool:
        """One round: check, keep, draft. False when every sample has ended."""
        decoder = self.decoder
        # 1. One forward of clean tokens, and of masks behind each of them where drafts are to be made.
        checked = self.drafts.ids.shape[1]
        stored, asked = self._prompt() if self.fresh else self._clean()
        live = sum(not done for done in self.ended)
        masks = self.plan.prompt_masks(*stored.ids.shape) if self.fresh else self.plan.masks(self.has_drafts, live)
        read = self._masks(checked + 1, masks) if masks else None
        every = None if read is None else Places.true_in(torch.ones_like(read.layout.valid), read.ids.numel())
        of_clean, of_masks = decoder.forward(stored, read, asked, every)
        self.answers.note_prediction()
        # 2. The verdict on the drafts, and the next ones: those behind the last that is accepted.
        verdict = self.judge.verdict(of_clean.view(len(self.ended), checked + 1, -1), self.drafts, self.at_B + 1)
        drafts = Drafts.none(len(self.ended), decoder.device)
        if masks:
            row = torch.arange(len(self.ended), device=decoder.device)
            chosen = of_masks.view(len(self.ended), checked + 1, masks, -1)[row, verdict.accepted_B]
            at_B = self.at_B + verdict.accepted_B + 1
            drafts = self._refined(self.judge.drafts(chosen, at_B + 1), at_B, verdict.following_B)
            drafts = self._within(drafts, at_B)
        # 3. Here the device is waited for, once a round.
        columns = [verdict.accepted_B, verdict.following_B, self.drafts.count_B, drafts.count_B]
        accepted, following, counts, fresh_counts = torch.stack(columns).tolist()
        self._tell(accepted, following, counts)
        return self._moved(verdict.accepted_B, verdict.following_B, accepted, drafts.of_width(self._width(fresh_counts)))

    def _width(self, counts: list[int]) -> int:
        """Columns of the coming drafts: as many as the longest has, or a fixed number for a static cache."""
        most = max((count for count, done in zip(counts, self.ended, strict=True) if not done), default=0)
        self.has_drafts = most > 0
        if self.decoder.static is None:
            return most
        return self.plan.length if most or self.plan.is_fused else 0

    def _prompt(self) -> tuple[Piece, Places]:
        """The whole prompts, of which the last tokens are asked."""
        prompt, decoder = self.decoder.prompt, self.decoder
        length = max(self.filled)
        valid = torch.arange(length, device=decoder.device)[None] < prompt.length_B[:, None]
        piece = prompt.beginning(length, valid, decoder.config.context, decoder.counts.image_tokens > 0)
        return piece, Places.last_valid(piece.layout)

    def _clean(self) -> tuple[Piece, Places]:
        """The last known tokens and the drafts behind them, all of which are asked."""
        ids = torch.cat([self.known_B[:, None], self.drafts.ids], 1)
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        position = self.at_B[:, None] + place
        valid = self.live_B[:, None] & (place <= self.drafts.count_B[:, None]) & (position <= self.last_B[:, None])
        position = position.minimum(self.last_B[:, None])
        layout = clean(position, position, valid, self.decoder.config.context)
        piece = Piece(ids, layout, self.decoder.prompt.rope.at(position), None, is_block=True)
        return piece, Places.true_in(torch.ones_like(valid), valid.numel())

    def _masks(self, blocks: int, size: int) -> Piece:
        """Drafts to be filled, one behind each of the first `blocks` clean tokens, of `size` masks each: [B, blocks * size]."""
        device = self.decoder.device
        behind = torch.arange(blocks, device=device)
        start = self.at_B[:, None, None] + behind[None, :, None] + 1
        position = start + torch.arange(size, device=device)
        valid = self.live_B[:, None, None] & (behind[None, :, None] <= self.drafts.count_B[:, None, None])
        valid = (valid & (position <= self.last_B[:, None, None])).flatten(1)
        return self._piece(position, start.expand_as(position), behind[:, None].expand_as(position[0]) + 1, valid)

    def _piece(self, position: torch.Tensor, block: torch.Tensor, copy: torch.Tensor, valid: torch.Tensor) -> Piece:
        """Masks [B, blocks, size] as a piece; what lies behind an answer's end is no token, and has no place there."""
        position = position.flatten(1).minimum(self.last_B[:, None])
        copies = copy.expand(len(position), *copy.shape).flatten(1)
        layout = Layout(position, block.flatten(1), copies, valid, torch.zeros_like(position), self.decoder.config.context)
        ids = torch.full_like(position, self.decoder.config.mask_token_id)
        return Piece(ids, layout, self.decoder.prompt.rope.at(position), None, is_block=True)

    # --- drafts ----------------------------------------------------------------------------------------------------------------

    def _refined(self, drafts: Drafts, at_B: torch.Tensor, following_B: torch.Tensor) -> Drafts:
        """The drafts behind the tokens `following_B` at `at_B` after further forwards of their block alone, in which the tokens
        that have settled stand in it.

        Greedily the surest settle first. In sampling they settle from the left: only then is each drawn from the distribution
        that it is judged by, whatever the others became.
        """
        steps = min(self.settings.denoising_steps or 1, drafts.ids.shape[1])
        if steps == 1:
            return drafts
        order = self.settings if self.judge.sampling.is_greedy else replace(self.settings, remasking="sequential")
        size = drafts.ids.shape[1]
        position = at_B[:, None] + torch.arange(size, device=at_B.device)[None]
        block, one = at_B[:, None].expand_as(position), torch.ones(size, dtype=torch.long, device=at_B.device)
        read = self._piece(position, block, one, self.live_B[:, None] & (position <= self.last_B[:, None]))
        every = Places.true_in(torch.ones_like(read.layout.valid), position.numel())
        open_Bk = torch.ones_like(position, dtype=torch.bool)
        found = drafts
        for step in range(steps):
            if step:
                # A token settles at the position behind the mask that predicts it; the first is known.
                behind = torch.where(open_Bk, self.decoder.config.mask_token_id, drafts.ids)[:, :-1]
                read = replace(read, ids=torch.cat([following_B[:, None], behind], 1))
                logits = self.decoder.forward(None, read, None, every)[1]
                found = self.judge.drafts(logits.view(len(position), size, -1), at_B + 1)
            quota_B = torch.full_like(at_B, quota(size, step, steps))
            chosen = settled(order, quota_B, open_Bk, found.certainty)
            drafts = _merged(drafts, found, chosen)
            open_Bk = open_Bk & ~chosen
        return drafts

    def _within(self, drafts: Drafts, at_B: torch.Tensor) -> Drafts:
        """The drafts up to where an answer may go, and to the first that is not certain enough."""
        count_B = drafts.count_B.minimum((self.last_B + 1 - at_B).clamp_min(0))
        if self.settings.draft_threshold is not None:
            sure = (drafts.certainty >= self.settings.draft_threshold).long().cumprod(1).sum(1)
            count_B = count_B.minimum(sure)
        return replace(drafts, count_B=count_B)

    # --- what becomes of a round -----------------------------------------------------------------------------------------------

    def _tell(self, accepted: list[int], following: list[int], counts: list[int]) -> None:
        """Gives the answers their tokens, and the plan what was accepted."""
        drafted = self.drafts.ids.tolist()
        for row, sample in enumerate(self.answers.live):
            if not self.ended[row]:
                final = [*drafted[row][: accepted[row]], following[row]]
                self.answers.note_drafts(sample, counts[row], accepted[row])
                before = self.answers.length(sample)
                self.ended[row] = self.answers.extend(sample, final)
                # What was drafted behind an answer's end has saved nothing, however right it was.
                self.plan.note(counts[row], min(accepted[row], self.answers.length(sample) - before))

    def _moved(self, accepted_B: torch.Tensor, following_B: torch.Tensor, accepted: list[int], drafts: Drafts) -> bool:
        """Puts every sample where its last known token stands now; False if none is left."""
        committed, checked = self.decoder.committed, self.drafts.ids.shape[1]
        if not self.fresh:
            place = torch.arange(checked + 1, device=self.decoder.device)[None]
            committed.keep_last((place <= accepted_B[:, None]) & self.live_B[:, None])
            going = [row for row, done in enumerate(self.ended) if not done]
            for row in going:
                self.filled[row] += 1 + accepted[row]
            committed.crop_last(checked - max((accepted[row] for row in going), default=checked))
        self.fresh = False
        self.at_B = torch.where(self.live_B, self.at_B + accepted_B + 1, self.at_B)
        self.known_B, self.drafts = following_B, drafts
        self.live_B = ~torch.tensor(self.ended, device=self.decoder.device)
        self._tidy()
        return self.leave()

    def leave(self) -> bool:
        """Lets go of samples that have ended, when it is time; False if none is left."""
        kept = [row for row, done in enumerate(self.ended) if not done]
        before = len(self.ended)
        if self.answers.drop(self.ended):
            return False
        if len(self.ended) < before:
            self._select(kept)
        return True

    def _tidy(self) -> None:
        """Closes the gaps in the cache where they cost more than closing them, or where a static one has no more room."""
        committed, longest = self.decoder.committed, max(self.filled)
        if self.decoder.static is None:
            due = committed.length > (1 + GAPS) * longest
        else:
            due = committed.length + 2 * self.plan.most_rows > self.decoder.static.cache.capacity
        if due and committed.length > longest:
            committed.close_gaps(longest)

    def _select(self, rows: list[int]) -> None:
        """Goes on with some samples only."""
        keep = torch.tensor(rows, device=self.decoder.device)
        self.at_B, self.known_B, self.last_B = self.at_B[keep], self.known_B[keep], self.last_B[keep]
        self.live_B, self.drafts = self.live_B[keep], self.drafts.selected(keep)
        self.filled = [self.filled[row] for row in rows]


def _merged(drafts: Drafts, found: Drafts, chosen: torch.Tensor) -> Drafts:
    """The drafts with those of `found` that are chosen, bool [B, k]."""
    kept: Any = None
    if drafts.kept is not None and found.kept is not None:
        kept = torch.where(chosen[..., None], found.kept, drafts.kept)
    certainty = torch.where(chosen, found.certainty, drafts.certainty)
    return Drafts(torch.where(chosen, found.ids, drafts.ids), certainty, kept, drafts.count_B)
