"""What a call of `generate` asks for: the caller's words over a GenerationConfig over the checkpoint's own, checked.

As in transformers a word that the caller leaves out, or gives as None, is taken from the `generation_config` that was passed,
then from the model's own. Words that block decoding does not know are refused wherever they stand, unless they say what happens
anyway: nothing that was asked for is left out in silence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationConfig

from .sampling_diffvl import Remasking, Sampling, remasking_of, sampling_of
from .static_diffvl import compile_config_of
from .stopping_diffvl import Stopping

MODES = ("blocks", "speculative", "ar")
MAX_NEW_TOKENS = 128
OWN_WORDS = ("mode", "denoising_steps", "remasking", "threshold", "entropy_budget", "seed", "repetition_stop", "tokenizer")
SAMPLING_WORDS = ("do_sample", "temperature", "top_k", "top_p")
KNOWN = frozenset(
    (
        *OWN_WORDS,
        *SAMPLING_WORDS,
        *("max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "stop_strings", "return_dict_in_generate"),
        *("cache_implementation", "compile_config", "disable_compile"),
    )
)
VIDEO_WORDS = ("pixel_values_videos", "image_sizes_videos")
# What a GenerationConfig says of its checkpoint, and asks nothing with.
FACTS = frozenset(("bos_token_id", "mask_token_id", "block_size", "transformers_version"))
# What words that are not known may say; so may None, False, 0 and empty lists.
NEUTRAL: dict[str, Any] = {
    "use_cache": True,
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p", "guidance_scale"), 1.0),
}


class Words:
    """The words of a call, the nearest source first."""

    def __init__(self, caller: Mapping[str, Any], given: GenerationConfig | None, own: GenerationConfig | None) -> None:
        """Raises ValueError for words that block decoding does not know."""
        refuse_videos(**{name: caller.get(name) for name in VIDEO_WORDS})
        configs = [dict(vars(config)) for config in (given, own) if config is not None]
        self._sources: list[Mapping[str, Any]] = [caller, *configs]
        odd = sorted(f"{name}={value!r}" for name, value in caller.items() if not _known(name, value))
        for config in configs:
            asking = {name: value for name, value in config.items() if name not in FACTS and not name.startswith("_")}
            odd += sorted(f"{name}={value!r} (in generation_config)" for name, value in asking.items() if not _known(name, value))
        if odd:
            raise ValueError(f"block decoding knows no {', '.join(odd)}")

    def said(self, name: str, default: Any = None) -> Any:
        return next((source[name] for source in self._sources if source.get(name) is not None), default)

    def nearest(self, *names: str) -> dict[str, Any]:
        """What the nearest source that says any of the names says of them."""
        said = ({name: source[name] for name in names if source.get(name) is not None} for source in self._sources)
        return next((found for found in said if found), {})

    def configured(self, name: str) -> Any:
        """Without what the caller says."""
        return next((source[name] for source in self._sources[1:] if source.get(name) is not None), None)

    def called(self, name: str) -> Any:
        """What the caller says."""
        return self._sources[0].get(name)


def _known(name: str, value: Any) -> bool:
    neutral = NEUTRAL.get(name)
    if name in KNOWN or value is None or value == neutral:
        return True
    return neutral is None and (value is False or (isinstance(value, int | float | list | tuple | str | dict) and not value))


def refuse_videos(**given: Any) -> None:
    """Raises ValueError unless every one of these words of SDAR-VL's callers is None, as they are where no video is shown."""
    shown = [name for name, value in given.items() if value is not None]
    if shown:
        raise ValueError(f"video is not supported: {' and '.join(shown)} must be None; give single frames as pictures")


@dataclass(frozen=True)
class Request:
    """Checked settings of a call. static: how a static cache is wanted, in transformers' words; empty for one that grows."""

    mode: str
    steps: int | None
    remasking: Remasking
    sampling: Sampling
    stopping: Stopping
    seed: int
    pad: int
    return_dict: bool
    static: dict[str, Any]


def request_of(words: Words, config: Any, prompt_length: int, device: torch.device) -> Request:
    """Raises ValueError on settings that do not fit together, or not the checkpoint."""
    mode = words.said("mode", "blocks")
    steps = words.said("denoising_steps")
    sampling = sampling_of(
        SimpleNamespace(**{name: words.configured(name) for name in SAMPLING_WORDS}),
        Sampling(**{name: words.called(name) for name in SAMPLING_WORDS}),
    )
    rule = [words.said(name) for name in ("remasking", "threshold", "entropy_budget")]
    remasking = remasking_of(rule[0] or "low_confidence_static", steps, config.block_size, rule[1], rule[2])
    _check_mode(mode, config, sampling, steps, rule)
    stopping = _stopping(words, config, prompt_length)
    return Request(
        mode=mode,
        steps=steps,
        remasking=remasking,
        sampling=sampling,
        stopping=stopping,
        seed=words.said("seed", 0),
        pad=_pad(words, config, stopping),
        return_dict=bool(words.said("return_dict_in_generate", False)),
        static=_static(words, mode, device),
    )


def _pad(words: Words, config: Any, stopping: Stopping) -> int:
    """What stands behind an answer: what the caller says; else the first token of all that may be meant. A stop that is none
    (-1: never) would be no padding that a tokenizer or an embedding takes."""
    if (asked := words.called("pad_token_id")) is not None:
        return _ids(asked)[0]
    configured = words.configured("pad_token_id")
    choices = [*(_ids(configured) if configured is not None else ()), *sorted(stopping.tokens), *config.stop_token_ids]
    return next((token for token in choices if 0 <= token < config.vocabulary_size), 0)


def _ids(said: Any) -> list[int]:
    """Token ids, however transformers lets one say them."""
    if isinstance(said, torch.Tensor):
        said = said.tolist()
    return [said] if isinstance(said, int) else list(said)


def _stopping(words: Words, config: Any, prompt_length: int) -> Stopping:
    lengths = words.nearest("max_new_tokens", "max_length")
    limit, whole = lengths.get("max_new_tokens"), lengths.get("max_length")
    if limit is None and whole is not None:
        limit = whole - prompt_length
        if limit < 1:
            raise ValueError(f"max_length is {whole}, and the prompt has {prompt_length} tokens already: raise it")
    stops, strings = words.said("eos_token_id", config.stop_token_ids), words.said("stop_strings", ())
    return Stopping(
        frozenset(_ids(stops)),
        MAX_NEW_TOKENS if limit is None else int(limit),
        (strings,) if isinstance(strings, str) else tuple(strings),
        words.said("tokenizer"),
        words.said("repetition_stop"),
    )


def _check_mode(mode: str, config: Any, sampling: Sampling, steps: int | None, rule: list[Any]) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "ar" and steps is not None:
        raise ValueError("denoising_steps has no effect with mode='ar'")
    if mode != "blocks" and rule not in ([None] * 3, ["low_confidence_static", None, None]):
        raise ValueError(f"remasking, threshold and entropy_budget have no effect with mode={mode!r}")
    if mode == "speculative":
        if config.context != "causal":
            raise ValueError("mode='speculative' needs a checkpoint with context: causal, whose clean stream has AR logits")
        if sampling.do_sample:
            raise ValueError("mode='speculative' is greedy: leave temperature and do_sample out")


def _static(words: Words, mode: str, device: torch.device) -> dict[str, Any]:
    said = words.said("cache_implementation", "dynamic")
    if said not in ("dynamic", "static"):
        raise ValueError(f"cache_implementation is {said!r}, expected 'dynamic' or 'static'")
    if said == "dynamic":
        told_so = words.called("cache_implementation") is not None  # then a GenerationConfig's other words are beside the point
        configured = None if told_so else words.configured("compile_config")
        if words.called("compile_config") or words.called("disable_compile") or configured:
            raise ValueError("compile_config and disable_compile have no effect without cache_implementation='static'")
        return {}
    if mode == "speculative":
        raise ValueError("cache_implementation='static' has no effect with mode='speculative', whose forwards have many shapes")
    chosen = compile_config_of(words.said("compile_config"), bool(words.said("disable_compile", False)), device)
    return {"cache_implementation": "static", "compile_config": chosen, "disable_compile": chosen is None}
