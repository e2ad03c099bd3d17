"""The batch that is being decoded: samples that join and leave it at block borders, each with settings of its own.

Invariants: what a sample answers does not depend on its neighbours, greedy or sampled: every rule looks at its own rows, and a
sample that draws has a generator of its own. Nothing here knows of clients; `engine.py` decides who joins.

Shapes: B batch, D block size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from diffvl.hub.answers_diffvl import Picker, picker
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.few_rows_diffvl import few_rows
from diffvl.hub.judge_diffvl import Sampling
from diffvl.hub.masks_diffvl import block_kernels
from diffvl.serve.denoising import Group, Step, denoise
from diffvl.serve.joining import join
from diffvl.serve.sample import Sample, inputs_of


class BlockBatch:
    """Samples that are decoded together.

    Attributes:
        samples: in the order of the decoder's rows.
        forwards: passes of the trunk since the start.
    """

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.samples: list[Sample] = []
        self.forwards = 0
        self._decoder: BlockDecoder | None = None
        self._greedy: dict[bool, Picker] = {}  # by whether it gives entropies

    def clear(self) -> None:
        """Lets all samples go."""
        self.samples, self._decoder = [], None

    @torch.no_grad()
    def take_in(self, samples: Sequence[Sample]) -> tuple[BlockDecoder, list[Sample]]:
        """Takes in the prompts of some samples, by a forward of their own; `add` then lets those join that are still there.

        A sample whose first open block shows an image is decoded up to the next block here: the rows of its image are not
        known to the batch.
        """
        for sample in samples:
            sample.draw = None  # of a prompt that is taken in once more, after a fault
            self._picker(sample, self.model.device)  # a setting that nothing can be drawn by fails here, and not the whole batch
        with block_kernels(self.model.trunk), few_rows(self.model.trunk):
            decoder = BlockDecoder(self.model, *inputs_of(samples, self.pad_token_id, self.model.device))
            decoder.prefill()
            decoder.flush()
            going_on = list(samples)
            if decoder.block.shows_image:
                going_on = self._finish_block(decoder, going_on)
                if going_on:
                    decoder.flush()
        self._count(decoder, samples, 0)
        for sample in samples:
            sample.inputs = BatchFeature()
        decoder.committed.pixels, decoder.committed.rows = {}, None  # no token that is still to come shows an image
        return decoder, going_on

    @torch.no_grad()
    def add(self, decoder: BlockDecoder, samples: Sequence[Sample]) -> None:
        """Lets samples join, whose prompts `take_in` has taken in."""
        if not samples:
            return
        if self._decoder is None:
            self._decoder = decoder
        else:
            join(self._decoder, decoder)
        self.samples += samples

    @torch.no_grad()
    def drop(self, gone: Sequence[Sample]) -> None:
        """Lets some samples go, wherever they are."""
        keep = [row for row, sample in enumerate(self.samples) if sample not in gone]
        if len(keep) == len(self.samples) or self._decoder is None:
            return
        self.samples = [self.samples[row] for row in keep]
        if keep:
            self._decoder.select(keep)
        else:
            self._decoder = None

    @torch.no_grad()
    def decode_block(self) -> list[Sample]:
        """Decodes one block of every sample. Returns those that ended in it; they have left."""
        decoder, before = self._decoder, self.samples
        assert decoder is not None
        counted = decoder.forwards
        with block_kernels(self.model.trunk), few_rows(self.model.trunk):
            self.samples = self._finish_block(decoder, before)
        self._count(decoder, before, counted)
        if not self.samples:
            self._decoder = None
        return [sample for sample in before if sample.ended]

    def _finish_block(self, decoder: BlockDecoder, samples: list[Sample]) -> list[Sample]:
        """Denoises the open block, gives every sample its tokens, and opens the next block of those that go on."""
        ids_BD = denoise(decoder, self._groups(samples, decoder.device), self._watching(samples))
        found = torch.stack([ids_BD, decoder.block.open_BD.long()]).tolist()
        for sample, ids, new in zip(samples, *found, strict=True):
            sample.blocks += 1
            sample.extend([value for value, is_new in zip(ids, new, strict=True) if is_new])
        keep = [row for row, sample in enumerate(samples) if sample.ended is None]
        if keep and len(keep) < len(samples):
            decoder.select(keep)
        if keep:
            decoder.commit()
        return [samples[row] for row in keep]

    def _count(self, decoder: BlockDecoder, samples: Sequence[Sample], before: int) -> None:
        made = decoder.forwards - before
        self.forwards += made
        for sample in samples:
            sample.forwards += made

    # --- who chooses how -------------------------------------------------------------------------------------------------------

    def _groups(self, samples: Sequence[Sample], device: torch.device) -> list[Group]:
        """Samples that choose alike, together; one that draws is alone with its generator."""
        groups: dict[Any, Group] = {}
        for row, sample in enumerate(samples):
            settings = sample.settings
            alike = (settings.denoising_steps, settings.remasking, settings.threshold, settings.entropy_budget)
            key = alike if settings.is_greedy else id(sample)
            if key not in groups:
                groups[key] = Group(settings, self._picker(sample, device), [])
            groups[key].rows.append(row)
        return list(groups.values())

    def _picker(self, sample: Sample, device: torch.device) -> Picker:
        settings = sample.settings
        if settings.is_greedy:
            has_entropy = settings.remasking == "entropy"
            if has_entropy not in self._greedy:
                self._greedy[has_entropy] = picker(Sampling(settings, device, self.model.config), settings)
            return self._greedy[has_entropy]
        if sample.draw is None:
            sample.draw = picker(Sampling(settings, device, self.model.config), settings)
        return sample.draw

    @staticmethod
    def _watching(samples: Sequence[Sample]) -> dict[int, Callable[[Step], None]]:
        return {row: sample.on_step for row, sample in enumerate(samples) if sample.on_step is not None}
