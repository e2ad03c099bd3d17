"""`generate` for a DiffVL model: block by block over a committed KV prefix, speculative, or plain AR decoding.

A block starts as mask tokens, is denoised in at most d forwards, and is committed by the first forward of the next one (SDAR,
arXiv 2510.06303; DiffusionVL, arXiv 2512.15713, section 3; the fused commit is ours). What a sample answers does not depend on
its neighbours in the batch.

Shapes: B batch, L prompt length, D block size, V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from .attention_diffvl import block_kernels
from .decoder_diffvl import BlockDecoder
from .pieces_diffvl import Places
from .prefix_diffvl import Prefix
from .request_diffvl import Request, Words, request_of
from .run_diffvl import BlockGenerationOutput, DenoisingStep, OnStep, Run
from .sampling_diffvl import Remasking, never_predicted, picker, settled
from .speculation_diffvl import speculate
from .static_diffvl import StaticTrunk, many_forms, on_every_device, static_trunk


class BlockGeneration:
    """`generate` for a DiffVL model."""

    config: Any
    generation_config: GenerationConfig | None
    language_model: Any

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
        on_step: OnStep | None = None,
        prefix: Prefix | None = None,
        **words: Any,
    ) -> torch.Tensor | BlockGenerationOutput:
        """Decodes answers. One call at a time for a model.

        Args:
            input_ids: [B, L] prompts, padded left or right; attention_mask: [B, L], 1 = token.
            answer_index: [B, L], 0 outside and k inside the k-th earlier answer of the conversation, as the processor gives it.
                Default: the prompt has no earlier answers.
            streamer: as in transformers, for one prompt; it gets the tokens of a block when they are final. on_step: see
                DenoisingStep.
            prefix: the `prefix` of the output of an earlier turn of the conversation; what the prompt shares with it is not
                computed again. For one prompt and mode "blocks".
            words: what follows, by name; a word that is left out is taken from `generation_config`, then from the model's own.

            max_new_tokens: default 128; or max_length, which counts the prompt.
            mode: "blocks"; "speculative" (blocks drafted by denoising, kept as far as the weights' own causal logits agree: the
                greedy AR answer in fewer forwards, for checkpoints with context "causal"); "ar" (transformers' own generate on
                the trunk, token by token).
            denoising_steps: forwards per block, 1 to D; default D (in drafts: 1).
            remasking, threshold, entropy_budget: see `sampling_diffvl.Remasking`; the threshold is 0.9 by default.
            do_sample, temperature, top_k, top_p: as in transformers. Without any, or at temperature 0, decoding is greedy.
            seed: of the sampling generator.
            eos_token_id, pad_token_id: default: the checkpoint's.
            stop_strings: texts that end an answer, with `tokenizer`; repetition_stop: ends an answer whose tail repeats any unit
                so many times.
            cache_implementation, compile_config, disable_compile: as in transformers. "static" decodes in fixed shapes, with the
                trunk compiled on a GPU (elsewhere with a `compile_config`); see static_diffvl. Default: "dynamic".
            return_dict_in_generate: True returns a BlockGenerationOutput.
        Returns:
            [B, L + new] prompts and answers, or a BlockGenerationOutput.
        Raises:
            ValueError: on settings that do not fit together, and on words of transformers that block decoding does not know,
                unless they say what happens anyway (`num_beams=1`).
        """
        if len(input_ids) == 0:
            raise ValueError("no prompts: input_ids has no rows")
        if image_sizes is not None and (pixel_values is None or len(image_sizes) != len(pixel_values)):
            raise ValueError(f"{len(image_sizes)} image_sizes, but another number of pictures")
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"a streamer takes one prompt, got {len(input_ids)}")
        asked = Words(words, generation_config, self.generation_config)
        request = request_of(asked, self.config, input_ids.shape[1], input_ids.device)
        if request.mode != "blocks" and on_step is not None:
            raise ValueError(f"on_step has no effect with mode={request.mode!r}: it watches blocks")
        if request.mode != "blocks" and prefix is not None:
            raise ValueError(f"prefix has no effect with mode={request.mode!r}: it holds blocks")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        marks = torch.zeros_like(input_ids) if answer_index is None else answer_index
        static = self._static_trunk_for(request, input_ids)
        decoder = BlockDecoder(self, input_ids, valid, marks, pixel_values, prefix, static)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        run = Run(decoder, request.stopping, streamer, on_step)
        with many_forms() if request.static.get("compile_config") is not None else nullcontext():
            WAYS[request.mode](run, request)
        run.finish()
        sequences = _sequences(input_ids, run.answers, request.pad)
        return run.output(sequences) if request.return_dict else sequences

    def _static_trunk_for(self, request: Request, input_ids: torch.Tensor) -> StaticTrunk | None:
        if not request.static or request.mode != "blocks":
            return None
        # Whole blocks, those that are begun at either end, and the masks behind the last.
        tokens = input_ids.shape[1] + request.stopping.limit + 3 * self.config.block_size
        return static_trunk(self, len(input_ids), tokens, request.static["compile_config"])


def _picker(run: Run, request: Request) -> Any:
    decoder = run.decoder
    return picker(request.sampling, request.seed, decoder.start.device, decoder.config, request.remasking.strategy == "entropy")


def _in_blocks(run: Run, request: Request) -> None:
    with block_kernels(run.decoder.model.language_model):
        decode_blocks(run, request.remasking, _picker(run, request))


def _speculatively(run: Run, request: Request) -> None:
    with block_kernels(run.decoder.model.language_model):
        speculate(run, request.steps or 1, _picker(run, request))


# --- blocks ------------------------------------------------------------------------------------------------------------------


def decode_blocks(run: Run, remasking: Remasking, pick: Any) -> None:
    """The block loop: open, denoise, collect, commit."""
    decoder = run.decoder
    run.settling = [[] for _ in run.live]
    ended = [False] * len(run.live)
    decoder.prefill()
    while True:
        decoder.open_block()
        settled_at = denoise(run, remasking, pick)
        # The device is waited for here, once a block: what stands in it decides who goes on.
        found = torch.stack([decoder.ids_BD, settled_at, decoder.open_BD.long()]).tolist()
        for row, sample in enumerate(run.live):
            if not ended[row]:
                ids, steps = ([value for value, new in zip(one[row], found[2][row], strict=True) if new] for one in found[:2])
                begun = max(run.settling[sample], default=-1) + 1
                run.settling[sample].extend(step + begun for step in steps)
                ended[row] = run.extend(sample, ids)
        decoder.commit(ended)
        if run.leave(ended):
            return


def denoise(run: Run, remasking: Remasking, pick: Any) -> torch.Tensor:
    """Fills the open block in at most `steps` forwards; returns the step at which each token settled, [B, D].

    With a fixed number of tokens a step nothing here waits for the device; otherwise a step does once, for how many are left.
    """
    decoder, masked = run.decoder, run.decoder.open_BD
    left, count_B = list(decoder.open_count), masked.sum(1)
    settled_at = torch.zeros_like(decoder.ids_BD)
    for step in range(remasking.steps):
        due = [min(remasking.quota(count, step), now) for count, now in zip(decoder.open_count, left, strict=True)]
        if not any(left):
            break
        if not any(due):
            continue
        places = Places.of(masked, sum(left))
        prediction = pick(decoder.predict(places))
        run.predicted()
        unknown = torch.zeros(masked.shape, device=masked.device)
        ids = _written(prediction.ids, places, decoder.ids_BD)
        confidence = _written(prediction.confidence, places, unknown)
        entropy = None if prediction.entropy is None else _written(prediction.entropy, places, unknown)
        quota = torch.minimum(remasking.quota(count_B, step), masked.sum(1))
        chosen = settled(remasking, quota, masked, confidence, entropy)
        decoder.ids_BD = torch.where(chosen, ids, decoder.ids_BD)
        settled_at = torch.where(chosen, step, settled_at)
        masked = masked & ~chosen
        left = [now - settles for now, settles in zip(left, due, strict=True)] if remasking.is_fixed else masked.sum(1).tolist()
        if run.on_step is not None:
            run.on_step(DenoisingStep(decoder.ids_BD.cpu(), chosen.cpu(), confidence.cpu(), list(run.live)))
    return settled_at


def _written(values: torch.Tensor, places: Places, into: torch.Tensor) -> torch.Tensor:
    """A copy of `into` [B, D] with values [M] at so many places."""
    return into.flatten().index_copy(0, places.flat(into.shape[1]), values).view_as(into)


# --- the AR baseline -----------------------------------------------------------------------------------------------------------


class _Followed(StoppingCriteria):
    """Gives a run every token as transformers' `generate` makes it, and ends what the run says has ended."""

    def __init__(self, run: Run) -> None:
        self.run, self.ended = run, [False] * len(run.answers)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        self.run.predicted()
        for sample, token in enumerate(input_ids[:, -1].tolist()):
            self.ended[sample] = self.ended[sample] or self.run.extend(sample, [token])
        return torch.tensor(self.ended, device=input_ids.device)


def _token_by_token(run: Run, request: Request) -> None:
    """transformers' own `generate` on the trunk: one token a forward, the weights' own causal logits, its own cache."""
    decoder, model, sampling = run.decoder, run.decoder.model, request.sampling
    if decoder.has_empty:
        raise ValueError("mode='ar' goes on from a prompt, but one is empty")
    device = decoder.start.device
    length = decoder.prompt_ids.shape[1] - 1
    # Padded left, as it wants them.
    valid = torch.arange(length, device=device)[None] < decoder.prompt_length[:, None]
    order = torch.argsort(valid.long(), dim=1, stable=True)
    ids, mask = decoder.prompt_ids[:, :length].gather(1, order), valid.gather(1, order)
    static = dict(request.static)
    if static.get("compile_config") is not None:
        static["compile_config"] = on_every_device(static["compile_config"])
    trunk = model.language_model
    vocabulary = trunk.get_output_embeddings().weight.shape[0]
    stops = sorted(token for token in request.stopping.tokens if 0 <= token < vocabulary)  # -1 says "never", and is no token
    warm = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p") if sampling.do_sample}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(request.seed)
        sequences = trunk.generate(
            inputs_embeds=model.embed(ids, decoder.pixel_values, None),
            attention_mask=mask.long(),
            max_new_tokens=request.stopping.limit,
            do_sample=bool(sampling.do_sample),
            eos_token_id=stops,
            pad_token_id=min(stops, default=0),  # of ended samples in a batch; nobody reads it
            suppress_tokens=never_predicted(model.config, vocabulary, torch.device("cpu")).nonzero()[:, 0].tolist(),
            stopping_criteria=[_Followed(run)],
            **warm,
            **static,
        )
    decoder.forwards += sequences.shape[1]


WAYS: dict[str, Callable[[Run, Request], None]] = {
    "blocks": _in_blocks,
    "speculative": _speculatively,
    "ar": _token_by_token,
}


def _sequences(input_ids: torch.Tensor, answers: list[list[int]], pad: int) -> torch.Tensor:
    """Prompts with their answers behind them, [B, L + longest answer]."""
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], dim=1)
