"""The three decoders that `diffvl bench decode` compares: the same weights, the same prompts, greedy.

`ar_generate` is transformers' own `generate` on the trunk, called directly; `published` the block loop of
`published_decoder`; `ours` the `generate` of the checkpoint, called as anybody would. What a picture costs (tower, connector)
is part of all three.

Shapes: B batch, L longest prompt, D block size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from diffvl.bench.published_decoder import answer_start, decode_published
from diffvl.decode.answer import COMPILED
from diffvl.hub.answers_diffvl import BlockGenerationOutput
from diffvl.hub.cache_diffvl import many_forms

NEVER = -1  # stands in the place of a stop token where nothing may end an answer but its limit


@dataclass(frozen=True)
class Prompts:
    """ids [B, L], padded left; valid bool [B, L]; pixel_values of all pictures in reading order; limit: most tokens of an answer;
    stops: ids that end one, `{NEVER}` for none."""

    ids: torch.Tensor
    valid: torch.Tensor
    pixel_values: torch.Tensor | None
    limit: int
    stops: frozenset[int]

    @property
    def lengths(self) -> list[int]:
        return self.valid.sum(1).tolist()

    def shortened(self, limit: int) -> "Prompts":
        return Prompts(self.ids, self.valid, self.pixel_values, limit, self.stops)

    def part(self, begin: int, end: int, config: Any) -> "Prompts":
        """Some of them, with their pictures and no more padding than they need."""
        pictures = (self.ids == config.image_token_id).logical_and(self.valid).sum(1).div(config.image_tokens).long().tolist()
        before = self.ids.shape[1] - max(self.lengths[begin:end])
        pixels = self.pixel_values
        if pixels is not None:
            first = sum(pictures[:begin])
            pixels = pixels[first : first + sum(pictures[begin:end])] if any(pictures[begin:end]) else None
        return Prompts(self.ids[begin:end, before:], self.valid[begin:end, before:], pixels, self.limit, self.stops)


@dataclass(frozen=True)
class Decoded:
    """answers: tokens up to and including the stop. forwards: passes of the trunk, of which `prefills` predict nothing."""

    answers: list[list[int]]
    forwards: int
    prefills: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.answers))


OnFirst = Callable[[], None]


def ar_generate(model: Any, prompts: Prompts, steps: int, on_first: OnFirst | None = None, compiled: bool = False) -> Decoded:
    """transformers' `generate` on the trunk, one token a forward; with `on_first` one token in all. compiled: with its own static
    cache and compiled forward."""
    trunk = model.language_model
    # Out of the vocabulary and yet an id: "no stop token" cannot be said otherwise, because the trunk's own would be taken.
    never = trunk.get_output_embeddings().weight.shape[0]
    stops = [never] if prompts.stops == {NEVER} else sorted(prompts.stops)
    if prompts.pixel_values is None:
        given, seen = {"input_ids": prompts.ids}, prompts.ids.shape[1]
    else:
        given, seen = {"inputs_embeds": model.embed(prompts.ids, prompts.pixel_values, None)}, 0
    with many_forms() if compiled else nullcontext():
        sequences = trunk.generate(
            **given,
            attention_mask=prompts.valid.long(),
            max_new_tokens=1 if on_first is not None else prompts.limit,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0 if prompts.stops == {NEVER} else stops[0],
            **(COMPILED if compiled else {}),
        )[:, seen:]
    answers = [cut(row, prompts.stops) for row in sequences.tolist()]
    if on_first is not None:
        on_first()
    return Decoded(answers, sequences.shape[1], 0)


def published(model: Any, prompts: Prompts, steps: int, on_first: OnFirst | None = None, compiled: bool = False) -> Decoded:
    """The published block loop, for one prompt; it joins its cache anew in every step, and has no compiled form."""
    assert len(prompts.ids) == 1 and not compiled
    found = decode_published(model, prompts.ids, prompts.pixel_values, steps, prompts.limit, prompts.stops, on_first)
    return Decoded([found.tokens], found.prefills + found.denoising + found.commits, found.prefills)


def ours(model: Any, prompts: Prompts, steps: int, on_first: OnFirst | None = None, compiled: bool = False) -> Decoded:
    """`generate` of the checkpoint; `on_first` is called after every step. compiled: as with `diffvl generate --compile`."""
    output = model.generate(
        prompts.ids,
        pixel_values=prompts.pixel_values,
        attention_mask=prompts.valid.long(),
        max_new_tokens=prompts.limit,
        denoising_steps=steps,
        remasking="low_confidence_static",
        do_sample=False,
        eos_token_id=sorted(prompts.stops),
        pad_token_id=0,
        on_step=None if on_first is None else lambda _: on_first(),
        return_dict_in_generate=True,
        **(COMPILED if compiled else {}),
    )
    assert isinstance(output, BlockGenerationOutput) and output.sequences is not None and output.forwards is not None
    answers = [cut(row, prompts.stops) for row in output.sequences[:, prompts.ids.shape[1] :].tolist()]
    alone = model.config.context == "causal" and any(answer_start(model.config, length) for length in prompts.lengths)
    return Decoded(answers, output.forwards, int(alone))


DECODERS: dict[str, Callable[..., Decoded]] = {
    "ar_generate": ar_generate,
    "published": published,
    "ours": ours,
}


def cut(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """An answer up to and including its first stop token."""
    stop = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    return list(tokens[: stop + 1])


def blocks_and_steps(config: Any, lengths: Sequence[int], tokens: Sequence[int], steps: int) -> tuple[int, int]:
    """How many blocks a batch with prompts and answers of these lengths decodes, and how many denoising steps these are due: no
    block takes more steps than it has masks, and the samples of a batch go through their blocks together."""
    size = config.block_size
    due: list[int] = []
    for length, answer in zip(lengths, tokens, strict=True):
        tail = length - answer_start(config, length)
        count = -(-(tail + answer) // size)
        due += [0] * (count - len(due))
        for block in range(count):
            due[block] = max(due[block], min(steps, size - tail if block == 0 else size))
    return len(due), sum(due)
