"""`generate` for a DiffVL model: block by block over a committed KV prefix, speculative, or plain AR decoding.

A block starts as mask tokens, is denoised in at most d forwards, and is committed by the first forward of the next one (SDAR,
arXiv 2510.06303; DiffusionVL, arXiv 2512.15713, section 3; the fused commit is ours). What a sample answers does not depend on
its neighbours in the batch.

Shapes: B batch, L prompt length, D block size, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from .decoder_diffvl import BlockDecoder, Prefix
from .sampling_diffvl import Remasking, Sampling, never_predicted, picker, remasking_of, sampling_of, settled
from .speculation_diffvl import speculate
from .stopping_diffvl import Stopping

MODES = ("blocks", "speculative", "ar")
# Finished samples leave the batch when at least this share of it is finished: moving the cache has a price.
LEAVE_AT = 0.25


@dataclass
class BlockGenerationOutput(ModelOutput):
    """sequences: [B, L + new] prompt and answer, padded after the stop. tokens: answer tokens up to and including the stop,
    summed over the batch. forwards: passes of the trunk. prefill_seconds: until the prompt was in and the first tokens were
    predicted; decode_seconds: the rest. settling: for each sample the denoising step at which each answer token settled, counted
    over its answer; None where tokens come one by one. prefix: of one prompt, for the next turn of the conversation; reused:
    tokens of this prompt that were not computed again."""

    sequences: torch.Tensor | None = None
    tokens: int | None = None
    forwards: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    settling: list[list[int]] | None = None
    prefix: Prefix | None = None
    reused: int | None = None

    @property
    def tokens_per_forward(self) -> float:
        assert self.tokens is not None and self.forwards is not None
        return self.tokens / self.forwards


@dataclass(frozen=True)
class DenoisingStep:
    """What `on_step` sees after every denoising step: ids [B, D] of the open blocks with mask tokens where open, which settled
    just now, the confidence of what was predicted in this step (0 elsewhere), and the samples' numbers in the batch as given."""

    ids: torch.Tensor
    settled: torch.Tensor
    confidence: torch.Tensor
    samples: list[int]


OnStep = Callable[[DenoisingStep], None]


class BlockGeneration:
    """`generate` for a DiffVL model."""

    config: Any
    generation_config: GenerationConfig | None

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        answer_index: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        mode: str = "blocks",
        denoising_steps: int | None = None,
        remasking: str = "low_confidence_static",
        threshold: float | None = None,
        entropy_budget: float | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        stop_strings: str | list[str] | None = None,
        tokenizer: Any = None,
        repetition_stop: int | None = None,
        streamer: Any = None,
        on_step: OnStep | None = None,
        prefix: Prefix | None = None,
        use_cache: bool = True,
        num_beams: int = 1,
        return_dict_in_generate: bool = False,
        **unknown: Any,
    ) -> torch.Tensor | BlockGenerationOutput:
        """Decodes answers.

        Args:
            input_ids: [B, L] prompts, padded left or right; attention_mask: [B, L], 1 = token.
            answer_index: [B, L], 0 outside and k inside the k-th earlier answer of the conversation, as
                `processor.apply_chat_template` gives it. Default: the prompt has no earlier answers.
            max_new_tokens: default from `generation_config`, else 128.
            mode: "blocks"; "speculative" (blocks drafted by denoising, kept as far as the weights' own causal logits agree: the
                greedy AR answer in fewer forwards, for checkpoints with context "causal"); "ar" (transformers' own generate on
                the trunk, token by token).
            denoising_steps: forwards per block, 1 to D; default D (in drafts: 1).
            remasking, threshold, entropy_budget: see `sampling_diffvl.Remasking`; the threshold is 0.9 by default.
            do_sample, temperature, top_k, top_p: as in transformers; not given, they come from `generation_config`. Without any,
                or at temperature 0, decoding is greedy.
            seed: of the sampling generator.
            eos_token_id, pad_token_id: default: the checkpoint's.
            stop_strings: texts that end an answer, with `tokenizer`; repetition_stop: ends an answer whose tail repeats any unit
                so many times.
            streamer: as in transformers, for one prompt; it gets the tokens of a block when they are final. on_step: see
                DenoisingStep.
            prefix: the `prefix` of the output of an earlier turn of the conversation; what the prompt shares with it is not
                computed again. For one prompt and mode "blocks".
            use_cache, num_beams: accepted at their neutral values, because callers of transformers pass them.
        Raises:
            ValueError: on settings that do not fit together.
        """
        settings = generation_config or self.generation_config
        if unknown or not use_cache or num_beams != 1:
            odd = [*unknown, *(["use_cache=False"] if not use_cache else []), *(["num_beams"] if num_beams != 1 else [])]
            raise ValueError(f"block decoding knows no {', '.join(odd)}")
        if generation_config is not None:
            _refuse_words(generation_config)
        said_strings = stop_strings if stop_strings is not None else getattr(settings, "stop_strings", None)
        stopping = Stopping(
            _stop_ids(eos_token_id, getattr(generation_config, "eos_token_id", None), self.config.stop_token_ids),
            int(getattr(settings, "max_new_tokens", None) or 128) if max_new_tokens is None else max_new_tokens,
            (said_strings,) if isinstance(said_strings, str) else tuple(said_strings or ()),
            tokenizer,
            repetition_stop,
        )
        sampling = sampling_of(settings, Sampling(do_sample, temperature, top_k, top_p))
        rule = remasking_of(remasking, denoising_steps, self.config.block_size, threshold, entropy_budget)
        if image_sizes is not None and (pixel_values is None or len(image_sizes) != len(pixel_values)):
            raise ValueError(f"{len(image_sizes)} image_sizes, but another number of pictures")
        if streamer is not None and len(input_ids) != 1:
            raise ValueError(f"a streamer takes one prompt, got {len(input_ids)}")
        _check_mode(mode, self.config, sampling, denoising_steps, on_step, prefix)
        if mode != "blocks" and (remasking, threshold, entropy_budget) != ("low_confidence_static", None, None):
            raise ValueError(f"remasking, threshold and entropy_budget have no effect with mode={mode!r}")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if answer_index is None:
            answer_index = torch.zeros_like(input_ids)
        decoder = BlockDecoder(self, input_ids, valid, answer_index, pixel_values, prefix)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        run = Run(decoder, stopping, streamer, on_step)
        pick = picker(sampling, seed, input_ids.device, self.config)
        ways: dict[str, Callable[[], None]] = {
            "blocks": lambda: decode_blocks(run, rule, pick),
            "speculative": lambda: speculate(run, denoising_steps or 1, pick),
            "ar": lambda: _decode_ar(run, self, input_ids, valid, sampling, seed),
        }
        ways[mode]()
        if streamer is not None:
            streamer.end()
        pad = pad_token_id if pad_token_id is not None else getattr(settings, "pad_token_id", None)
        sequences = _sequences(input_ids, run.answers, pad if isinstance(pad, int) else min(stopping.tokens))
        return run.output(sequences) if return_dict_in_generate else sequences


def _stop_ids(*said: int | list[int] | None) -> frozenset[int]:
    """The first that says something: the caller, the caller's generation_config, the checkpoint."""
    first = next(ids for ids in said if ids is not None)
    return frozenset([first] if isinstance(first, int) else first)


def _refuse_words(settings: GenerationConfig) -> None:
    """Raises ValueError for settings of transformers that block decoding does not know, unless they are neutral."""
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "penalty_alpha": 0}
    odd = [name for name, value in neutral.items() if getattr(settings, name, None) not in (None, value)]
    if odd:
        raise ValueError(f"block decoding knows no {', '.join(odd)} (in generation_config)")


def _check_mode(
    mode: str, config: Any, sampling: Sampling, steps: int | None, on_step: OnStep | None, prefix: Prefix | None
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if mode != "blocks" and on_step is not None:
        raise ValueError(f"on_step has no effect with mode={mode!r}: it watches blocks")
    if mode != "blocks" and prefix is not None:
        raise ValueError(f"prefix has no effect with mode={mode!r}: it holds blocks")
    if mode == "ar" and steps is not None:
        raise ValueError("denoising_steps has no effect with mode='ar'")
    if mode == "speculative":
        if config.context != "causal":
            raise ValueError("mode='speculative' needs a checkpoint with context: causal, whose clean stream has AR logits")
        if sampling.do_sample:
            raise ValueError("mode='speculative' is greedy: leave temperature and do_sample out")


class Run:
    """The answers of a batch as they grow, whatever decodes them.

    Attributes:
        live: numbers of the samples that are still decoded, in the order of the decoder's rows.
    """

    def __init__(self, decoder: BlockDecoder, stopping: Stopping, streamer: Any, on_step: OnStep | None) -> None:
        self.decoder, self.stopping, self.streamer, self.on_step = decoder, stopping, streamer, on_step
        self.live = list(range(len(decoder.prompt_ids)))
        self.answers: list[list[int]] = [[] for _ in self.live]
        self.settling: list[list[int]] | None = None
        self.began = time.perf_counter()
        self.first: float | None = None

    def predicted(self) -> None:
        """Notes when the first tokens were there."""
        if self.first is None:
            self.first = time.perf_counter()

    def extend(self, sample: int, tokens: list[int]) -> bool:
        """Adds final tokens to an answer; True if it ends there."""
        answer = self.answers[sample]
        before = len(answer)
        answer.extend(tokens)
        ended = self.stopping.cut(answer, before)
        if self.streamer is not None and answer[before:]:
            self.streamer.put(torch.tensor(answer[before:]))
        return ended

    def leave(self, ended: list[bool]) -> bool:
        """Takes ended samples (one flag for each row of the decoder) out of the batch, if they are many; True if none is left."""
        if all(ended):
            return True
        if sum(ended) >= LEAVE_AT * len(ended):
            keep = [row for row, done in enumerate(ended) if not done]
            self.decoder.select(torch.tensor(keep, device=self.decoder.start.device))
            self.live = [self.live[row] for row in keep]
            ended[:] = [False] * len(keep)
        return False

    def output(self, sequences: torch.Tensor) -> BlockGenerationOutput:
        now = time.perf_counter()
        first = self.first if self.first is not None else now
        settling = None
        if self.settling is not None:
            settling = [steps[: len(answer)] for steps, answer in zip(self.settling, self.answers, strict=True)]
        return BlockGenerationOutput(
            sequences=sequences,
            tokens=sum(map(len, self.answers)),
            forwards=self.decoder.forwards,
            prefill_seconds=first - self.began,
            decode_seconds=now - first,
            settling=settling,
            prefix=self.decoder.prefix() if len(self.answers) == 1 and self.settling is not None else None,
            reused=self.decoder.reused,
        )


# --- blocks ------------------------------------------------------------------------------------------------------------------


def decode_blocks(run: Run, remasking: Remasking, pick: Any) -> None:
    """The block loop: open, denoise, collect, commit."""
    decoder = run.decoder
    run.settling = [[] for _ in run.live]
    ended = [False] * len(run.live)
    decoder.prefill()
    while True:
        decoder.open_block()
        done = torch.tensor(ended, device=decoder.start.device)
        settled_at = denoise(run, remasking, pick, decoder.open_BD & ~done[:, None])
        for row, sample in enumerate(run.live):
            if not ended[row]:
                open_D = decoder.open_BD[row]
                begun = max(run.settling[sample], default=-1) + 1
                run.settling[sample].extend((settled_at[row][open_D] + begun).tolist())
                ended[row] = run.extend(sample, decoder.ids_BD[row][open_D].tolist())
        decoder.commit()
        if run.leave(ended):
            return


def denoise(run: Run, remasking: Remasking, pick: Any, masked: torch.Tensor) -> torch.Tensor:
    """Fills the open block in at most `steps` forwards; returns the step at which each token settled, [B, D]."""
    decoder = run.decoder
    count = masked.sum(1)
    settled_at = torch.zeros_like(decoder.ids_BD)
    for step in range(remasking.steps):
        quota = torch.minimum(remasking.quota(count, step), masked.sum(1))
        if not bool(masked.any()):
            break
        if int(quota.max()) == 0:
            continue
        prediction = pick(decoder.predict(masked))
        run.predicted()
        ids, confidence = decoder.ids_BD.clone(), torch.zeros(masked.shape, device=masked.device)
        entropy = torch.zeros_like(confidence)
        ids[masked], confidence[masked], entropy[masked] = prediction.ids, prediction.confidence, prediction.entropy
        chosen = settled(remasking, quota, masked, confidence, entropy)
        decoder.ids_BD = torch.where(chosen, ids, decoder.ids_BD)
        settled_at[chosen] = step
        masked = masked & ~chosen
        if run.on_step is not None:
            run.on_step(DenoisingStep(decoder.ids_BD.cpu(), chosen.cpu(), confidence.cpu(), list(run.live)))
    return settled_at


# --- the AR baseline -----------------------------------------------------------------------------------------------------------


def _decode_ar(run: Run, model: Any, input_ids: torch.Tensor, valid: torch.Tensor, sampling: Sampling, seed: int) -> None:
    """transformers' own `generate` on the trunk: one token a forward, the weights' own causal logits, its own cache."""
    order = torch.argsort(valid.long(), dim=1, stable=True)  # padded left, as it wants them
    ids, mask = input_ids.gather(1, order), valid.gather(1, order)
    pixel_values = run.decoder.pixel_values
    trunk = model.language_model
    vocabulary = trunk.get_output_embeddings().weight.shape[0]
    warm = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p") if sampling.do_sample}
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        sequences = trunk.generate(
            inputs_embeds=model.embed(ids, pixel_values, None),
            attention_mask=mask.long(),
            max_new_tokens=run.stopping.limit,
            do_sample=bool(sampling.do_sample),
            eos_token_id=sorted(run.stopping.tokens),
            pad_token_id=min(run.stopping.tokens),
            suppress_tokens=never_predicted(model.config, vocabulary, torch.device("cpu")).nonzero()[:, 0].tolist(),
            **warm,
        )
    run.decoder.forwards += sequences.shape[1]
    for sample, answer in enumerate(sequences.tolist()):
        # One by one, as they came: a loop is cut where it closes.
        any(run.extend(sample, [token]) for token in answer)


def _sequences(input_ids: torch.Tensor, answers: list[list[int]], pad: int) -> torch.Tensor:
    """Prompts with their answers behind them, [B, L + longest answer]."""
    longest = max(len(answer) for answer in answers)
    rows = [answer + [pad] * (longest - len(answer)) for answer in answers]
    return torch.cat([input_ids, torch.tensor(rows, dtype=torch.long, device=input_ids.device)], dim=1)
