"""The settings of decoding: one frozen object with the names of `generate`, read from a call and checked here and nowhere else.

As in transformers, an argument that the caller leaves out, or gives as None, is taken from the `generation_config` that was
passed, then from the model's own. Arguments that block decoding does not know are refused wherever they stand, unless they say
what happens anyway: nothing that was asked for is ignored in silence. Nothing heavy is imported, so that a command line can make
its flags of the fields before it loads anything.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

MODES = ("blocks", "speculative", "ar")
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy")
CACHES = ("dynamic", "static")
COLDEST, HOTTEST = 1e-4, 1e4  # temperatures between which logits stay numbers
DEFAULT_THRESHOLD = 0.9
DEFAULT_BUDGET = 0.35  # nats, as SDAR's entropy_bounded

Spelling = Callable[..., str]


def keyword(name: str, value: Any = None) -> str:
    """A setting as a call of `generate` writes it: its name, or name=value."""
    return name if value is None else f"{name}={value!r}"


def _setting(default: Any, about: str, least: float | None = None, most: float | None = None, choices: Any = ()) -> Any:
    """A field with what a reader, a command line and `check` want to know of it."""
    return field(default=default, metadata={"about": about, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class DecodeSettings:
    """How to decode. Every field is an argument of `generate`; None leaves the choice to the checkpoint or to other settings.

    max_new_tokens: tokens of the longest answer.
    denoising_steps: forwards per block, 1 to the block size; by default that size, and 1 for drafts.
    mode: "blocks"; "speculative" (blocks drafted by denoising, kept as far as the weights' own causal logits agree: the greedy AR
        answer in fewer forwards, for checkpoints with context "causal"); "ar" (transformers' own generate on the trunk, token by
        token).
    remasking, threshold, entropy_budget: which tokens settle in a step; see `answers_diffvl.settled`.
    do_sample, temperature, top_k, top_p: as in transformers. Without any, or at temperature 0, decoding is greedy.
    seed: of the sampling generator.
    stop_strings: texts that end an answer, with the `tokenizer` that decodes it. repetition_stop: an answer in which any unit
        stands this many times in a row is cut after the first.
    eos_token_id: tokens that end an answer and stay in it. pad_token_id: what stands after an answer. Default: the checkpoint's.
    cache_implementation, compile_config, disable_compile: as in transformers. "static" decodes in fixed shapes, with the trunk
        compiled on a GPU (elsewhere with a `compile_config`); see cache_diffvl.
    return_dict_in_generate: True returns a BlockGenerationOutput.
    """

    max_new_tokens: int = _setting(128, "Longest answer.", least=1)
    denoising_steps: int | None = _setting(None, "Denoising steps per block. Default: one token per step.")
    mode: str = _setting("blocks", "Blocks; blocks checked by the weights' own AR logits; or token by token.", choices=MODES)
    remasking: str = _setting(
        "low_confidence_static",
        "Which tokens a step fills in: the surest; all above a threshold; from the left; all within a budget.",
        choices=STRATEGIES,
    )
    threshold: float | None = _setting(
        None, f"Confidence above which low_confidence_dynamic fills a token in. Default: {DEFAULT_THRESHOLD}.", least=0, most=1
    )
    entropy_budget: float | None = _setting(None, f"Nats that entropy may spend in a step. Default: {DEFAULT_BUDGET}.", least=0)
    temperature: float = _setting(0.0, "0 takes the likeliest token.")
    top_k: int | None = _setting(None, "Sample among this many of the likeliest tokens.", least=0)
    top_p: float | None = _setting(None, "Sample among the likeliest tokens with this much probability.", least=0, most=1)
    seed: int = _setting(0, "Seed of every random draw.")
    stop_strings: tuple[str, ...] = _setting((), "A text that ends the answer, and stays in it; repeatable.")
    repetition_stop: int | None = _setting(None, "End an answer that says the same this many times in a row.", least=2)
    do_sample: bool | None = None
    cache_implementation: str = "dynamic"
    compile_config: Any = None
    disable_compile: bool = False
    eos_token_id: frozenset[int] | None = None
    pad_token_id: int | None = None
    tokenizer: Any = None
    return_dict_in_generate: bool = False

    @property
    def is_greedy(self) -> bool:
        return not (self.temperature if self.do_sample is None else self.do_sample)

    @property
    def is_static(self) -> bool:
        """Whether the cache keeps its place and the forwards their shapes."""
        return self.cache_implementation == "static"

    @property
    def has_fixed_quota(self) -> bool:
        """Whether a step settles exactly its quota, so that nobody has to look how many tokens it settled."""
        return self.remasking in ("low_confidence_static", "sequential")

    def chosen(self) -> dict[str, Any]:
        """The settings that are not what they are by default."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}

    def arguments(self) -> dict[str, Any]:
        """The arguments of `generate` that ask for these settings."""
        values = {one.name: (getattr(self, one.name), one) for one in fields(self)}
        return {name: value for name, (value, one) in values.items() if "about" in one.metadata or value != one.default}

    def check(self, given: Collection[str] = (), spell: Spelling = keyword) -> None:
        """Checks everything that no checkpoint is needed for.

        Args:
            given: settings that were named; one of them without effect is a mistake even where its value is the default.
            spell: how the caller writes a setting, see `keyword`.
        Raises:
            ValueError: if a value is out of range, or a setting would have no effect.
        """
        self._check_values(spell)
        asked = self.chosen().keys() | set(given)
        self._check_mode(asked, spell)
        self._check_remasking(asked, spell)
        self._check_sampling(given, spell)
        self._check_cache(spell)

    def _check_values(self, spell: Spelling) -> None:
        warmth = self.temperature
        if not 0 <= warmth <= HOTTEST or 0 < warmth < COLDEST:
            expected = f"expected 0 (the likeliest token) or {COLDEST:g} to {HOTTEST:g}"
            raise ValueError(f"{spell('temperature')} is {warmth}, {expected}")
        for one in fields(self):
            value, least, most = getattr(self, one.name), one.metadata.get("least"), one.metadata.get("most")
            choices = CACHES if one.name == "cache_implementation" else one.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{spell(one.name)} is {value!r}, expected one of {', '.join(choices)}")
            if value is not None and least is not None and not least <= value <= (value if most is None else most):
                expected = f"{least} or more" if most is None else f"{least} to {most}"
                raise ValueError(f"{spell(one.name)} is {value}, expected {expected}")
        if "" in self.stop_strings:
            raise ValueError(f"{spell('stop_strings', '')} is in every text: name a text that ends the answer")

    def _check_mode(self, asked: Collection[str], spell: Spelling) -> None:
        if self.mode == "blocks":
            return
        mode = spell("mode", self.mode)
        why = "decodes token by token" if self.mode == "ar" else "keeps what its AR logits agree with"
        for name in ("denoising_steps", "remasking") if self.mode == "ar" else ("remasking",):
            if name in asked:
                raise ValueError(f"{spell(name)} has no effect with {mode}, which {why}")
        for name in ("threshold", "entropy_budget"):
            if name in asked:
                raise ValueError(f"{spell(name, getattr(self, name))} has no effect with {mode}: leave it out")
        if self.mode == "speculative" and self.is_static:
            static = spell("cache_implementation", self.cache_implementation)
            raise ValueError(f"{static} has no effect with {mode}, whose forwards have many shapes: leave it out")
        if self.mode == "speculative" and not self.is_greedy:
            raise ValueError(f"{spell('temperature', self.temperature)} has no effect with {mode}, which is greedy: leave it out")

    def _check_remasking(self, asked: Collection[str], spell: Spelling) -> None:
        for name, needed in (("threshold", "low_confidence_dynamic"), ("entropy_budget", "entropy")):
            if name in asked and self.remasking != needed:
                raise ValueError(
                    f"{spell(name, getattr(self, name))} has no effect with {spell('remasking', self.remasking)}: "
                    f"add {spell('remasking', needed)}, or leave {spell(name)} out"
                )

    def _check_sampling(self, given: Collection[str], spell: Spelling) -> None:
        if not self.is_greedy:
            if self.temperature == 0:
                raise ValueError("do_sample=True needs a temperature above 0")
            return
        if self.temperature not in (0, 1):
            unused = spell("temperature", self.temperature)
            raise ValueError(f"{unused} has no effect with {spell('do_sample', False)}: leave one of them out")
        # Neutral values ask for nothing, unless they were named; any seed is neutral.
        neutral = {"top_k": (None, 0), "top_p": (None, 1), "seed": (self.seed,)}
        for name, values in neutral.items():
            if name in given or getattr(self, name) not in values:
                zero = "temperature 0, which takes the likeliest token"
                raise ValueError(f"{spell(name)} has no effect with {zero}: add {spell('temperature')}")

    def _check_cache(self, spell: Spelling) -> None:
        if not self.is_static and (self.compile_config or self.disable_compile):
            static = spell("cache_implementation", "static")
            raise ValueError(f"compile_config and disable_compile have no effect without {static}")
        if self.disable_compile and self.compile_config is not None:
            raise ValueError("compile_config has no effect with disable_compile=True: leave one of them out")

    def for_checkpoint(self, config: Any, spell: Spelling = keyword) -> "DecodeSettings":
        """The same settings (checked ones) with everything filled in that depends on the checkpoint or on each other.

        Raises:
            ValueError: if the checkpoint cannot be decoded like this.
        """
        size, steps = config.block_size, self.denoising_steps
        if steps is not None and not 1 <= steps <= size:
            most = f"{size}, which has seen the next-token objective only" if config.decoding == "ar" else str(size)
            raise ValueError(
                f"{spell('denoising_steps')} is {steps}, expected 1 to the block size, {most}: a block has no more tokens"
            )
        if self.mode == "speculative" and config.context != "causal":
            raise ValueError(
                f"{spell('mode', self.mode)} needs a checkpoint trained with context: causal (and best with an AR loss, "
                f"ar_weight), whose own AR logits check the drafts; this one has context: {config.context}. Use "
                f"{spell('mode', 'blocks')} or {spell('mode', 'ar')}"
            )
        stops = frozenset(config.stop_token_ids) if self.eos_token_id is None else self.eos_token_id
        pads = [token for token in (*sorted(stops), *config.stop_token_ids) if _is_token(token, config)]
        filled: dict[str, Any] = {
            "temperature": 0.0 if self.is_greedy else self.temperature,
            "do_sample": not self.is_greedy,
            "eos_token_id": stops,
            "pad_token_id": next(iter(pads), 0) if self.pad_token_id is None else self.pad_token_id,
        }
        if steps is None and self.mode != "ar":
            filled["denoising_steps"] = size if self.mode == "blocks" else 1
        if self.threshold is None and self.remasking == "low_confidence_dynamic":
            filled["threshold"] = DEFAULT_THRESHOLD
        if self.entropy_budget is None and self.remasking == "entropy":
            filled["entropy_budget"] = DEFAULT_BUDGET
        return replace(self, **filled)


# --- the arguments of a call ------------------------------------------------------------------------------------------------

KNOWN = frozenset(one.name for one in fields(DecodeSettings)) | {"max_length"}
# Arguments that mean the same wherever they stand. The others are read one by one below.
PLAIN = ("mode", "denoising_steps", "remasking", "threshold", "entropy_budget", "seed", "repetition_stop", "tokenizer")
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
        pad = next((token for token in _ids(configured) if _is_token(token, config)), None)
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


def _is_token(token: int, config: Any) -> bool:
    return 0 <= token < config.vocabulary_size
