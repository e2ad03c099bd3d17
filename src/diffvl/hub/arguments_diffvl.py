"""The arguments of a call of `generate` -> `DecodeSettings`, and what no call may say.

As in transformers, an argument that the caller leaves out, or gives as None, is taken from the `generation_config` that was
passed, then from the model's own. Arguments that block decoding does not know are refused wherever they stand, unless they say
what happens anyway: nothing that was asked for is ignored in silence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from .settings_diffvl import DecodeSettings, is_token

KNOWN = frozenset(one.name for one in fields(DecodeSettings)) | {"max_length"}
# Arguments that mean the same wherever they stand. The others are read one by one below.
PLAIN = (
    *("mode", "draft_length", "drafting", "draft_threshold", "denoising_steps", "remasking", "threshold", "entropy_budget"),
    *("seed", "repetition_stop", "tokenizer"),
)
SAMPLING = ("temperature", "top_k", "top_p")
VIDEOS = ("pixel_values_videos", "image_sizes_videos")
# What a GenerationConfig says of its checkpoint, and asks nothing with.
FACTS = frozenset(("bos_token_id", "mask_token_id", "block_size", "transformers_version"))
# What arguments that are not known may say; so may None, False, 0 and empty lists.
NEUTRAL: dict[str, Any] = {
    "use_cache": True,
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p", "guidance_scale"), 1.0),
}


class Arguments:
    """The arguments of a call, the nearest source first: the caller, the `generation_config` given, the model's own."""

    def __init__(self, caller: Mapping[str, Any], given: Any, own: Any) -> None:
        """`given` and `own` are GenerationConfigs or None. Raises ValueError for arguments that block decoding does not know."""
        refuse_videos(**{name: caller.get(name) for name in VIDEOS})
        configs = [dict(vars(config)) for config in (given, own) if config is not None]
        self._sources: list[Mapping[str, Any]] = [caller, *configs]
        odd = sorted(f"{name}={value!r}" for name, value in caller.items() if not _known(name, value))
        for config in configs:
            asking = {name: value for name, value in config.items() if name not in FACTS and not name.startswith("_")}
            odd += sorted(f"{name}={value!r} (in generation_config)" for name, value in asking.items() if not _known(name, value))
        if odd:
            raise ValueError(f"block decoding knows no {', '.join(odd)}")

    def get(self, name: str) -> Any:
        """What the nearest source says; None where none does."""
        return next((source[name] for source in self._sources if source.get(name) is not None), None)

    def by_caller(self, name: str) -> Any:
        return self._sources[0].get(name)

    def configured(self, name: str) -> Any:
        """What the nearest GenerationConfig says."""
        return next((source[name] for source in self._sources[1:] if source.get(name) is not None), None)

    def nearest(self, *names: str) -> dict[str, Any]:
        """What the nearest source that says any of the names says of them."""
        each = ({name: source[name] for name in names if source.get(name) is not None} for source in self._sources)
        return next((found for found in each if found), {})


def _known(name: str, value: Any) -> bool:
    neutral = NEUTRAL.get(name)
    if name in KNOWN or value is None or value == neutral:
        return True
    return neutral is None and (value is False or (isinstance(value, int | float | list | tuple | str | dict) and not value))


def refuse_videos(**given: Any) -> None:
    """Raises ValueError unless every one of these arguments of SDAR-VL's callers is None, as they are where no video is shown."""
    shown = [name for name, value in given.items() if value is not None]
    if shown:
        raise ValueError(f"video is not supported: {' and '.join(shown)} must be None; give single frames as images")


def settings_of(arguments: Arguments, config: Any, prompt_length: int) -> DecodeSettings:
    """What a call asks for, checked, with everything filled in.

    Raises:
        ValueError: if settings do not fit together, or not the checkpoint.
    """
    values = {
        **{name: arguments.get(name) for name in PLAIN},
        "max_new_tokens": _longest_answer(arguments, prompt_length),
        "return_dict_in_generate": bool(arguments.get("return_dict_in_generate")),
        **_sampling(arguments),
        **_ends(arguments, config),
        **_cache(arguments),
    }
    settings = DecodeSettings(**{name: value for name, value in values.items() if value is not None})
    settings.check()
    if settings.stop_strings and settings.tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer: generate(..., stop_strings=[...], tokenizer=processor.tokenizer)")
    return settings.for_checkpoint(config)


def _longest_answer(arguments: Arguments, prompt_length: int) -> int | None:
    lengths = arguments.nearest("max_new_tokens", "max_length")
    limit, whole = lengths.get("max_new_tokens"), lengths.get("max_length")
    if limit is None and whole is not None and whole <= prompt_length:
        raise ValueError(f"max_length is {whole}, and the prompt has {prompt_length} tokens already: raise it")
    if limit is None and whole is not None:
        limit = whole - prompt_length
    return None if limit is None else int(limit)


def _sampling(arguments: Arguments) -> dict[str, Any]:
    """The sampling settings. A greedy call leaves aside what a GenerationConfig says of them, but not what the caller says."""
    do_sample, temperature = arguments.by_caller("do_sample"), arguments.by_caller("temperature")
    if do_sample is None:
        samples = bool(arguments.configured("do_sample") if temperature is None else temperature)
    else:
        samples = bool(do_sample)
    if samples:
        values = {name: arguments.get(name) for name in SAMPLING}
        return {**values, "do_sample": True, "temperature": 1.0 if values["temperature"] is None else values["temperature"]}
    configured = arguments.configured("temperature")
    if do_sample is None and temperature is None and configured not in (None, 0, 1):
        raise ValueError(f"temperature {configured} (in generation_config) has no effect without do_sample=True there")
    return {**{name: arguments.by_caller(name) for name in SAMPLING}, "do_sample": False}


def _ends(arguments: Arguments, config: Any) -> dict[str, Any]:
    """What ends an answer, and what stands after one. A configured padding that is no token (-1: never) is not taken: no
    tokenizer and no embedding would take it."""
    stops, strings = arguments.get("eos_token_id"), arguments.get("stop_strings")
    pad, configured = arguments.by_caller("pad_token_id"), arguments.configured("pad_token_id")
    if pad is not None:
        pad = _ids(pad)[0]
    elif configured is not None:
        pad = next((token for token in _ids(configured) if is_token(token, config)), None)
    return {
        "eos_token_id": None if stops is None else frozenset(_ids(stops)),
        "pad_token_id": pad,
        "stop_strings": (strings,) if isinstance(strings, str) else tuple(strings or ()),
    }


def _cache(arguments: Arguments) -> dict[str, Any]:
    """How keys and values are kept. For a cache that grows, a configured way to compile counts only where the caller leaves the
    choice of the cache to the configuration."""
    chosen = arguments.get("cache_implementation")
    if chosen in (None, "dynamic"):
        asked = arguments.by_caller("cache_implementation") is not None
        compile_config = arguments.by_caller("compile_config") or (None if asked else arguments.configured("compile_config"))
        return {"compile_config": compile_config, "disable_compile": bool(arguments.by_caller("disable_compile"))}
    return {
        "cache_implementation": chosen,
        "compile_config": arguments.get("compile_config"),
        "disable_compile": bool(arguments.get("disable_compile")),
    }


def _ids(given: Any) -> list[int]:
    """Token ids, however transformers lets one write them."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    return list(plain) if isinstance(plain, Iterable) else [plain]
