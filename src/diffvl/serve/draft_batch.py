"""The batch of a lossless checkpoint: drafts that the model checks itself, of samples that join and leave between two rounds.

A round is one forward of `drafts_diffvl`: each sample gains the drafts that were accepted and the token behind them. How long
drafts are goes by the clock and by what is accepted, for the batch as a whole; no answer depends on it, greedy or sampled
(`coupling.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature

from diffvl.hub.costs_diffvl import DraftPlan, PayingPlan
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.drafts_diffvl import Drafter
from diffvl.hub.few_rows_diffvl import few_rows
from diffvl.hub.masks_diffvl import block_kernels
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.coupling import CoupledJudge, PositionDraws
from diffvl.serve.joining import join_drafters
from diffvl.serve.sample import Sample, inputs_of


class DraftBatch:
    """As `BlockBatch`: the same calls, and the same promise. `drafted`, `accepted`: tokens of drafts since the start."""

    def __init__(self, model: Any, pad_token_id: int, most: int) -> None:
        """most: samples that are decoded together. Times forwards of the model, which takes some seconds."""
        self.model, self.pad_token_id = model, pad_token_id
        self.forwards = self.drafted = self.accepted = 0
        self._drafter: Drafter | None = None
        with block_kernels(model.trunk), few_rows(model.trunk):
            self.plan = PayingPlan(model, model.config.block_size, None, most, steps=1)

    @property
    def samples(self) -> list[Sample]:
        return [] if self._drafter is None else self._drafter.answers.live

    def clear(self) -> None:
        """Lets all samples go."""
        self._drafter = None

    @torch.no_grad()
    def take_in(self, samples: Sequence[Sample]) -> tuple[Drafter, list[Sample]]:
        """Takes in the prompts of some samples, by a round of their own; `add` then lets those join that are still there."""
        device, config = self.model.device, self.model.config
        for sample in samples:
            if not sample.settings.is_greedy:
                sample.coupling = PositionDraws(sample.settings, device, config)
        with block_kernels(self.model.trunk), few_rows(self.model.trunk):
            decoder = BlockDecoder(self.model, *inputs_of(samples, self.pad_token_id, device))
            answers = _Answers(decoder, list(samples))
            judge = CoupledJudge(lambda: [sample.coupling for sample in answers.live], device, config)
            plan = (
                self.plan
                if self._drafter is None
                else _JoiningPlan(self.plan, self._drafter.drafts.ids.shape[1], len(self.samples))
            )
            drafter = Drafter(answers, DecodeSettings(), judge, plan)
            new_B = torch.tensor([sample.settings.max_new_tokens for sample in samples], device=device)
            drafter.last_B = decoder.prompt.length_B + new_B - 2
            self._go_on(drafter)
        for sample in samples:
            sample.inputs = BatchFeature()
        decoder.committed.pixels, decoder.committed.rows = {}, None  # all images are in the cache
        return drafter, answers.live

    def add(self, drafter: Drafter, samples: Sequence[Sample]) -> None:
        """Lets samples join, whose prompts `take_in` has taken in."""
        if not samples:
            return
        drafter.plan = self.plan
        if self._drafter is None:
            self._drafter = drafter
        else:
            join_drafters(self._drafter, drafter)

    @torch.no_grad()
    def drop(self, gone: Sequence[Sample]) -> None:
        """Lets some samples go, wherever they are."""
        drafter = self._drafter
        if drafter is None:
            return
        drafter.ended = [sample in gone for sample in self.samples]
        if not drafter.leave():
            self._drafter = None

    @torch.no_grad()
    def decode_block(self) -> list[Sample]:
        """Decodes one round of every sample. Returns those that ended in it; they have left."""
        before = list(self.samples)
        assert self._drafter is not None
        with block_kernels(self.model.trunk), few_rows(self.model.trunk):
            self._go_on(self._drafter)
        if not self.samples:
            self._drafter = None
        return [sample for sample in before if sample.ended]

    def _go_on(self, drafter: Drafter) -> None:
        """One round, and what it has cost and given."""
        before, samples = drafter.decoder.forwards, list(drafter.answers.live)
        drafted, accepted = (sum(getattr(sample, name) for sample in samples) for name in ("drafted", "accepted"))
        drafter.go_on()
        made = drafter.decoder.forwards - before
        self.forwards += made
        self.drafted += sum(sample.drafted for sample in samples) - drafted
        self.accepted += sum(sample.accepted for sample in samples) - accepted
        for sample in samples:
            sample.blocks += 1
            sample.forwards += made


class _JoiningPlan(DraftPlan):
    """How samples draft as their prompts go in: as many tokens as the batch of `batch` samples checks in its next round, where
    that pays. By a choice of their own that round would be longer for everybody, or the batch would not draft in it."""

    def __init__(self, plan: PayingPlan, length: int, batch: int) -> None:
        super().__init__(length, "separate")
        self._plan, self._batch = plan, batch

    def prompt_masks(self, rows: int, tokens: int) -> int:
        return self.length if self._plan.pays_in_prompt(self.length, rows, tokens, self._batch + rows) else 0


class _Answers:
    """Samples as the answers of a drafter: they leave as soon as they have ended."""

    def __init__(self, decoder: BlockDecoder, samples: list[Sample]) -> None:
        self.decoder, self.live = decoder, samples

    def length(self, sample: Sample) -> int:
        return len(sample.answer)

    def note_prediction(self) -> None:
        """Nobody asks when that was."""

    def note_drafts(self, sample: Sample, count: int, accepted: int) -> None:
        sample.drafted += count
        sample.accepted += accepted

    def extend(self, sample: Sample, tokens: list[int]) -> bool:
        sample.extend(tokens)
        if sample.ended is not None:
            sample.coupling = None  # its noise is as large as some logits, and a client may take long to read
        return sample.ended is not None

    def drop(self, ended: list[bool]) -> bool:
        if any(ended):
            keep = [row for row, done in enumerate(ended) if not done]
            self.live = [self.live[row] for row in keep]
            if keep:
                self.decoder.select(keep)
            ended[:] = [False] * len(keep)
        return not self.live
