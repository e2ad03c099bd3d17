"""The three decoders that `diffvl bench decode` compares: the same weights, the same prompts, greedy.

`ar_generate` is transformers' own `generate` on the trunk, called directly; `published` is the block loop of
`published_decoder`; `ours` is the `generate` of the checkpoint, called as any user does. What an image costs (tower, connector)
is part of all three.

Shapes: B batch, L longest prompt, D block size.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffvl.bench.published_decoder import answer_start, cut_at_stop, decode_published
from diffvl.decode.answer import COMPILED
from diffvl.hub.answers_diffvl import BlockGenerationOutput
from diffvl.hub.cache_diffvl import many_forms
from diffvl.hub.pixels_diffvl import Pixels

NEVER = -1  # in place of a stop token, where only the limit may end an answer


@dataclass(frozen=True)
class Prompts:
    """ids [B, L], padded left; valid bool [B, L]; pixels of all images in reading order, one row of each tensor an
    image; limit: most tokens of an answer; stops: ids that end one, `{NEVER}` for none. images: how many each prompt shows, ()
    where none shows any."""

    ids: torch.Tensor
    valid: torch.Tensor
    pixels: Pixels
    limit: int
    stops: frozenset[int]
    images: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return self.valid.sum(1).tolist()

    def shortened(self, limit: int) -> "Prompts":
        return replace(self, limit=limit)

    def part(self, begin: int, end: int) -> "Prompts":
        """Takes some of them, with their images and no more padding than they need."""
        before = self.ids.shape[1] - max(self.lengths[begin:end])
        first, count = sum(self.images[:begin]), sum(self.images[begin:end])
        pixels = {name: tensor[first : first + count] for name, tensor in self.pixels.items()} if count else {}
        ids, valid = self.ids[begin:end, before:], self.valid[begin:end, before:]
        return replace(self, ids=ids, valid=valid, pixels=pixels, images=self.images[begin:end])


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
    """Decodes with transformers' `generate` on the trunk, one token a forward; with `on_first` one token in all. compiled: with
    its own static cache and compiled forward."""
    trunk = model.trunk
    # An id outside the vocabulary: without one, `generate` would take the trunk's own stop token.
    never = trunk.get_output_embeddings().weight.shape[0]
    stops = [never] if prompts.stops == {NEVER} else sorted(prompts.stops)
    if not prompts.pixels:
        inputs, begin = {"input_ids": prompts.ids}, prompts.ids.shape[1]
    else:
        inputs, begin = model.images.prompt(prompts.ids, prompts.pixels, model.images.encode(prompts.pixels)), 0
    with many_forms() if compiled else nullcontext():
        sequences = trunk.generate(
            **inputs,
            attention_mask=prompts.valid.long(),
            max_new_tokens=1 if on_first is not None else prompts.limit,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0 if prompts.stops == {NEVER} else stops[0],
            **(COMPILED if compiled else {}),
        )[:, begin:]
    answers = [cut_at_stop(tokens, prompts.stops) for tokens in sequences.tolist()]
    if on_first is not None:
        on_first()
    return Decoded(answers, sequences.shape[1], 0)


def published(model: Any, prompts: Prompts, steps: int, on_first: OnFirst | None = None, compiled: bool = False) -> Decoded:
    """Decodes with the published block loop, one prompt; it joins its cache anew in every step, and has no compiled form."""
    assert len(prompts.ids) == 1 and not compiled
    result = decode_published(model, prompts.ids, prompts.pixels, steps, prompts.limit, prompts.stops, on_first)
    return Decoded([result.tokens], result.prefills + result.denoising + result.commits, result.prefills)


def ours(model: Any, prompts: Prompts, steps: int, on_first: OnFirst | None = None, compiled: bool = False) -> Decoded:
    """Decodes with `generate` of the checkpoint; `on_first` is called after every step. compiled: as with `diffvl generate
    --compile`."""
    output = model.generate(
        prompts.ids,
        **prompts.pixels,
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
    answers = [cut_at_stop(tokens, prompts.stops) for tokens in output.sequences[:, prompts.ids.shape[1] :].tolist()]
    has_prefill = model.config.context == "causal" and any(answer_start(model.config, length) for length in prompts.lengths)
    return Decoded(answers, output.forwards, int(has_prefill))


DECODERS: dict[str, Callable[..., Decoded]] = {
    "ar_generate": ar_generate,
    "published": published,
    "ours": ours,
}


@dataclass(frozen=True)
class Case:
    """One decoder at one number of steps. AR is a block of 1 in 1 step."""

    decoder: str
    steps: int
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.decoder} {self.steps}" + (" compiled" if self.compiled else "")

    def run(self, model: Any, prompts: Prompts, on_first: OnFirst | None = None) -> Decoded:
        """Decodes the prompts."""
        return DECODERS[self.decoder](model, prompts, self.steps, on_first, self.compiled)


def blocks_and_steps(config: Any, lengths: Sequence[int], tokens: Sequence[int], steps: int) -> tuple[int, int]:
    """Counts the blocks that a batch with prompts and answers of these lengths decodes, and the denoising steps that these take:
    no block takes more steps than it has masks, and the samples of a batch go through their blocks together."""
    size = config.block_size
    due: list[int] = []
    for length, answer in zip(lengths, tokens, strict=True):
        tail = length - answer_start(config, length)
        count = -(-(tail + answer) // size)
        due += [0] * (count - len(due))
        for block in range(count):
            due[block] = max(due[block], min(steps, size - tail if block == 0 else size))
    return len(due), sum(due)
