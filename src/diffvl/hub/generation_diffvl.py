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
from transformers import CompileConfig, GenerationConfig

from .attention_diffvl import block_kernels
from .decoder_diffvl import BlockDecoder
from .pieces_diffvl import Places
from .prefix_diffvl import Prefix
from .run_diffvl import BlockGenerationOutput, DenoisingStep, OnStep, Run
from .sampling_diffvl import Remasking, Sampling, never_predicted, picker, remasking_of, sampling_of, settled
from .speculation_diffvl import speculate
from .static_diffvl import compile_config_of, many_forms, static_trunk
from .stopping_diffvl import Stopping

MODES = ("blocks", "speculative", "ar")


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
        cache_implementation: str | None = None,
        compile_config: CompileConfig | None = None,
        disable_compile: bool | None = None,
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
            cache_implementation, compile_config, disable_compile: as in transformers. "static" decodes in fixed shapes, with the
                trunk compiled on a GPU (elsewhere with a `compile_config`); see static_diffvl. Default: "dynamic".
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
        wanted = _static_wanted(settings, cache_implementation, compile_config, disable_compile, mode, input_ids.device)
        static = None
        if wanted and mode == "blocks":
            # Whole blocks, those that are begun at either end, and the masks behind the last.
            tokens = input_ids.shape[1] + stopping.limit + 3 * self.config.block_size
            static = static_trunk(self, len(input_ids), tokens, wanted["compile_config"])
        decoder = BlockDecoder(self, input_ids, valid, answer_index, pixel_values, prefix, static)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        run = Run(decoder, stopping, streamer, on_step)
        pick = picker(sampling, seed, input_ids.device, self.config, rule.strategy == "entropy")
        ways: dict[str, Callable[[], None]] = {
            "blocks": lambda: decode_blocks(run, rule, pick),
            "speculative": lambda: speculate(run, denoising_steps or 1, pick),
            "ar": lambda: _decode_ar(run, self, input_ids, valid, sampling, seed, wanted),
        }
        with block_kernels(self.language_model) if mode != "ar" else nullcontext(), many_forms():
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


def _static_wanted(
    settings: Any, implementation: str | None, config: CompileConfig | None, disable: bool | None, mode: str, device: torch.device
) -> dict[str, Any]:
    """What is asked of a static cache, in transformers' words; empty where none is wanted.

    Raises:
        ValueError: for another kind of cache, or settings that would have no effect.
    """
    said = implementation if implementation is not None else getattr(settings, "cache_implementation", None)
    if said not in (None, "dynamic", "static"):
        raise ValueError(f"cache_implementation is {said!r}, expected 'dynamic' or 'static'")
    if said != "static":
        if config is not None or disable is not None:
            raise ValueError("compile_config and disable_compile have no effect without cache_implementation='static'")
        return {}
    if mode == "speculative":
        raise ValueError("cache_implementation='static' does not know mode='speculative'")
    chosen = compile_config_of(settings, config, disable, device)
    return {"cache_implementation": "static", "compile_config": chosen, "disable_compile": chosen is None}


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


# --- blocks ------------------------------------------------------------------------------------------------------------------


def decode_blocks(run: Run, remasking: Remasking, pick: Any) -> None:
    """The block loop: open, denoise, collect, commit."""
    decoder = run.decoder
    run.settling = [[] for _ in run.live]
    ended = [False] * len(run.live)
    decoder.prefill()
    while True:
        decoder.open_block()
        counts = [0 if done else count for count, done in zip(decoder.open_count, ended, strict=True)]
        settled_at = denoise(run, remasking, pick, counts)
        # The device is waited for here, once a block: what stands in it decides who goes on.
        found = torch.stack([decoder.ids_BD, settled_at, decoder.open_BD.long()]).tolist()
        for row, sample in enumerate(run.live):
            if not ended[row]:
                ids, steps = ([value for value, new in zip(one[row], found[2][row], strict=True) if new] for one in found[:2])
                begun = max(run.settling[sample], default=-1) + 1
                run.settling[sample].extend(step + begun for step in steps)
                ended[row] = run.extend(sample, ids)
        decoder.commit()
        if run.leave(ended):
            return


def denoise(run: Run, remasking: Remasking, pick: Any, counts: list[int]) -> torch.Tensor:
    """Fills the open block in at most `steps` forwards, for the samples with tokens to predict (`counts`, one for each row of the
    decoder; the others stay masked); returns the step at which each token settled, [B, D].

    With a fixed number of tokens a step nothing here waits for the device; otherwise a step does once, for how many are left.
    """
    decoder, left = run.decoder, list(counts)
    count_B = torch.tensor(counts, device=decoder.start.device)
    masked = decoder.open_BD & (count_B > 0)[:, None]
    settled_at = torch.zeros_like(decoder.ids_BD)
    for step in range(remasking.steps):
        due = [min(remasking.quota(count, step), now) for count, now in zip(counts, left, strict=True)]
        if not any(left):
            break
        if not any(due):
            continue
        places = Places.of(masked, sum(left))
        prediction = pick(decoder.predict(masked, sum(left)))
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


def _decode_ar(
    run: Run,
    model: Any,
    input_ids: torch.Tensor,
    valid: torch.Tensor,
    sampling: Sampling,
    seed: int,
    static: dict[str, Any],
) -> None:
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
            **static,
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
