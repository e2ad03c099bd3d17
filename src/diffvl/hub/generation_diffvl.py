"""`generate` for a DiffVL model: block by block over a committed KV prefix, or one of the modes that give the AR answer.

A block starts as mask tokens, is denoised in at most d forwards, and is committed by the first forward of the next one (SDAR,
arXiv 2510.06303; DiffusionVL, arXiv 2512.15713, section 3; the fused commit is ours). What a sample answers does not depend on
its neighbours in the batch.

Shapes: B batch, L prompt length, D block size, M masked tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from .answers_diffvl import BatchAnswers, BlockGenerationOutput, DenoisingStep, OnStep, Picker, picker, quota, settled
from .arguments_diffvl import Arguments, settings_of
from .autoregressive_diffvl import speculate, token_by_token
from .blocks_diffvl import Places, Prefix
from .cache_diffvl import StaticTrunk, compile_config_for, many_forms, static_trunk
from .decoder_diffvl import BlockDecoder
from .drafts_diffvl import speculate_gated
from .few_rows_diffvl import few_rows
from .judge_diffvl import Sampling
from .masks_diffvl import block_kernels
from .settings_diffvl import DecodeSettings

Loop = Callable[[BatchAnswers, DecodeSettings, Sampling], None]


class BlockGeneration:
    """`generate` for a DiffVL model."""

    config: Any
    gate: Any = None
    generation_config: GenerationConfig | None
    trunk: Any
    images: Any
    pixels_of: Callable[[Any], dict[str, torch.Tensor]]

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        answer_index: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Any = None,
        stopping_criteria: Any = None,
        on_step: OnStep | None = None,
        prefix: Prefix | None = None,
        **arguments: Any,
    ) -> torch.Tensor | BlockGenerationOutput:
        """Decodes answers. One call at a time for a model.

        Args:
            input_ids: [B, L] prompts, padded left or right; attention_mask: [B, L], 1 = token.
            answer_index: [B, L], 0 outside and k inside the k-th earlier answer of the conversation, as the processor gives it.
                Default: the prompt has no earlier answers.
            stopping_criteria: as in transformers, for one prompt; asked after every token of a finished block.
            streamer: as in transformers, for one prompt; it gets the tokens of a block when they are final. on_step: see
                DenoisingStep.
            prefix: the `prefix` of the output of an earlier turn of the conversation; what the prompt shares with it is not
                computed again. For one prompt and mode "blocks".
            arguments: the fields of `DecodeSettings` by name, and max_length, which counts the prompt. One that is left out, or
                None, is taken from `generation_config`, then from the model's own.
        Returns:
            [B, L + new] prompts and answers, or a BlockGenerationOutput.
        Raises:
            ValueError: on settings that do not fit together, and on arguments of transformers that block decoding does not know,
                unless they say what happens anyway (`num_beams=1`).
        """
        if len(input_ids) == 0:
            raise ValueError("no prompts: input_ids has no rows")
        if image_sizes is not None and pixel_values is None:
            raise ValueError(f"{len(image_sizes)} image_sizes, but another number of images")
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"a streamer takes one prompt, got {len(input_ids)}")
        if stopping_criteria and len(input_ids) != 1:
            raise ValueError(f"stopping_criteria take one prompt, got {len(input_ids)}")
        known = {*self.config.image_inputs, *self.config.video_inputs}
        known |= {name for name, value in arguments.items() if isinstance(value, torch.Tensor) and self.images.takes(name)}
        more = {name: arguments.pop(name) for name in known if name in arguments}
        pixels = self.pixels_of({"pixel_values": pixel_values, "image_sizes": image_sizes, **more})
        given = Arguments(arguments, generation_config, self.generation_config)
        settings = settings_of(given, self.config, input_ids.shape[1])
        settings = replace(settings, compile_config=compile_config_for(settings, input_ids.device))
        if settings.mode != "blocks" and on_step is not None:
            raise ValueError(f"on_step has no effect with mode={settings.mode!r}: it watches blocks")
        if settings.mode != "blocks" and prefix is not None:
            raise ValueError(f"prefix has no effect with mode={settings.mode!r}: it holds blocks")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        marks = torch.zeros_like(input_ids) if answer_index is None else answer_index
        decoder = BlockDecoder(self, input_ids, valid, marks, pixels, prefix, self._static_trunk_for(settings, input_ids))
        if streamer is not None:
            streamer.put(input_ids.cpu())
        answers = BatchAnswers(decoder, settings, streamer, on_step)
        if stopping_criteria:
            answers.stops = partial(_stops, stopping_criteria, input_ids)
        compiling = many_forms() if settings.compile_config is not None else few_rows(self.trunk)
        kernels = block_kernels(self.trunk) if settings.mode != "ar" else nullcontext()
        with compiling, kernels:
            self._loop(settings)(answers, settings, Sampling(settings, decoder.device, self.config))
        answers.finish()
        assert settings.pad_token_id is not None
        sequences = _sequences(input_ids, answers.answers, settings.pad_token_id)
        return answers.output(sequences) if settings.return_dict_in_generate else sequences

    def _loop(self, settings: DecodeSettings) -> Loop:
        """What decodes."""
        if settings.mode == "speculative":
            return speculate if self.gate is None else speculate_gated
        return decode_blocks if settings.mode == "blocks" else token_by_token

    def _static_trunk_for(self, settings: DecodeSettings, input_ids: torch.Tensor) -> StaticTrunk | None:
        if not settings.is_static or settings.mode == "ar":
            return None
        # Whole blocks, one that is cut at either end, and the masks after the last.
        more = 3 * self.config.block_size
        if settings.mode == "speculative":
            assert settings.draft_length is not None
            more = 4 * (settings.draft_length + 1) ** 2  # two rounds, and as many tokens that were refused
        tokens = input_ids.shape[1] + settings.max_new_tokens + more
        return static_trunk(self, len(input_ids), tokens, settings.compile_config)


def _stops(criteria: Any, input_ids: torch.Tensor, answer: list[int]) -> bool:
    """Whether one of the caller's criteria ends the answer to the prompt [1, L] here; they see no scores."""
    sequence = torch.cat([input_ids, input_ids.new_tensor([answer])], dim=1)
    return any(bool(torch.as_tensor(one(sequence, None)).all()) for one in criteria)


def decode_blocks(answers: BatchAnswers, settings: DecodeSettings, sampling: Sampling) -> None:
    """The block loop: denoise, collect, commit."""
    decoder, pick = answers.decoder, picker(sampling, settings)
    answers.settling = [[] for _ in answers.live]
    ended = [False] * len(answers.live)
    decoder.prefill()
    while True:
        settled_at = denoise(answers, settings, pick)
        # The device is waited for here, once a block: what stands in it decides who goes on.
        block = decoder.block
        found = torch.stack([block.ids_BD, settled_at, block.open_BD.long()]).tolist()
        for row, sample in enumerate(answers.live):
            if not ended[row]:
                ids, steps = ([value for value, new in zip(one[row], found[2][row], strict=True) if new] for one in found[:2])
                earlier = max(answers.settling[sample], default=-1) + 1
                answers.settling[sample].extend(step + earlier for step in steps)
                ended[row] = answers.extend(sample, ids)
        decoder.commit(ended)
        if answers.drop(ended):
            return


def denoise(answers: BatchAnswers, settings: DecodeSettings, pick: Picker) -> torch.Tensor:
    """Fills the open block in at most `denoising_steps` forwards; returns the step at which each token settled, [B, D].

    With a fixed number of tokens a step nothing here waits for the device; otherwise a step does once, for how many are left.
    """
    steps = settings.denoising_steps
    assert steps is not None
    decoder, counts, masked = answers.decoder, answers.decoder.block.counts, answers.decoder.block.open_BD
    left, count_B = list(counts), masked.sum(1)
    ids_BD = decoder.block.ids_BD
    settled_at = torch.zeros_like(ids_BD)
    for step in range(steps):
        due = [min(quota(count, step, steps), now) for count, now in zip(counts, left, strict=True)]
        if not any(left):
            break
        if not any(due):
            continue
        places = Places.true_in(masked, sum(left))
        prediction = pick(decoder.predict(places))
        answers.note_prediction()
        unknown = torch.zeros(masked.shape, device=masked.device)
        ids = _written(prediction.ids, places, ids_BD)
        confidence = _written(prediction.confidence, places, unknown)
        entropy = None if prediction.entropy is None else _written(prediction.entropy, places, unknown)
        quota_B = torch.minimum(quota(count_B, step, steps), masked.sum(1))
        chosen = settled(settings, quota_B, masked, confidence, entropy)
        ids_BD = torch.where(chosen, ids, ids_BD)
        decoder.block = replace(decoder.block, ids_BD=ids_BD)
        settled_at = torch.where(chosen, step, settled_at)
        masked = masked & ~chosen
        still = [now - settles for now, settles in zip(left, due, strict=True)]
        left = still if settings.has_fixed_quota else masked.sum(1).tolist()
        if answers.on_step is not None:
            answers.on_step(DenoisingStep(ids_BD.cpu(), chosen.cpu(), confidence.cpu(), list(answers.live)))
    return settled_at


def _written(values: torch.Tensor, places: Places, into: torch.Tensor) -> torch.Tensor:
    """A copy of `into` [B, D] with values [M] at the places."""
    return into.flatten().index_copy(0, places.flat(into.shape[1]), values).view_as(into)


def _sequences(input_ids: torch.Tensor, answers: list[list[int]], pad: int) -> torch.Tensor:
    """Prompts followed by their answers, [B, L + longest answer]."""
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], dim=1)
