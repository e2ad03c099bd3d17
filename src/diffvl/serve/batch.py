"""The batch that is being decoded: samples that join and leave it at block borders, each with settings of its own.

Invariants: what a sample answers does not depend on its neighbours, greedy or sampled: every rule looks at its own rows, and a
sample that draws has a generator of its own. Nothing here knows of clients; `engine.py` decides who joins.

Shapes: B batch, D block size, M masked tokens, L prompt tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import BatchFeature

from diffvl.hub.answers_diffvl import Picker, cut, picker
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.judge_diffvl import Sampling
from diffvl.hub.masks_diffvl import block_kernels
from diffvl.hub.pixels_diffvl import join_pixels
from diffvl.hub.processing_diffvl import TEXT_INPUTS, pixels_in
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.denoising import Group, Step, denoise
from diffvl.serve.joining import join


@dataclass(eq=False)
class Sample:
    """One prompt on its way to an answer.

    inputs: what the processor gave for it, alone; nothing any more once the prompt is taken in.
    settings: checked and filled in for the checkpoint, with the tokenizer. on_step: is shown every denoising step, in the model's
    thread; None for nobody. draw: what makes tokens of logits where the sample draws, with a generator of its own.
    answer: its tokens so far. ended: why it has ended, "stop" or "length"; None while it goes on. blocks, forwards: so far.
    """

    inputs: BatchFeature
    settings: DecodeSettings
    on_step: Callable[[Step], None] | None = None
    draw: Picker | None = None
    answer: list[int] = field(default_factory=list)
    ended: str | None = None
    blocks: int = 0
    forwards: int = 0
    prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_tokens = self.inputs["input_ids"].shape[1]

    def extend(self, tokens: list[int]) -> None:
        """Adds the tokens of a finished block, up to where the answer ends."""
        before = len(self.answer)
        self.answer.extend(tokens)
        if cut(self.answer, before, self.settings):
            self.ended = self._reason(before + len(tokens))

    def _reason(self, whole: int) -> str:
        """An answer that fills its limit without having been cut before ended for its length."""
        stops = self.settings.eos_token_id
        assert stops is not None
        if len(self.answer) < min(whole, self.settings.max_new_tokens) or self.answer[-1] in stops:
            return "stop"
        text = self.settings.tokenizer.decode(self.answer, skip_special_tokens=False) if self.settings.stop_strings else ""
        return "stop" if any(string in text for string in self.settings.stop_strings) else "length"


class Batch:
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
            self._picker(sample, self.model.device)  # a setting that nothing can be drawn by fails here, and not the whole batch
        ids, valid, marks, pixels = self._inputs(samples)
        with block_kernels(self.model.trunk):
            decoder = BlockDecoder(self.model, ids, valid, marks, pixels)
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
        with block_kernels(self.model.trunk):
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

    # --- what goes in ----------------------------------------------------------------------------------------------------------

    def _inputs(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The prompts as one batch on the model's device: ids, valid tokens and earlier answers, [B, L], padded left; pixels."""
        longest, device = max(sample.prompt_tokens for sample in samples), self.model.device

        def rows(name: str, fill: int) -> torch.Tensor:
            given = [sample.inputs[name] for sample in samples]
            return torch.cat([pad(row, (longest - row.shape[1], 0), value=fill) for row in given]).to(device)

        ids, valid, marks = (rows(name, self.pad_token_id if name == "input_ids" else 0) for name in TEXT_INPUTS)
        pixels = join_pixels([pixels_in(sample.inputs) for sample in samples])
        return ids, valid.bool(), marks, {name: value.to(device) for name, value in pixels.items()}

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
