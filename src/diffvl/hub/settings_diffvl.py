"""The settings of decoding: one frozen object with the names of `generate`, checked here and nowhere else.

Nothing heavy is imported, so that a command line can make its flags of the fields before it loads anything. How they are read
from a call stands in `arguments_diffvl`.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

MODES = ("blocks", "speculative", "ar")
DRAFTING = ("fused", "separate")
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic", "sequential", "entropy")
CACHES = ("dynamic", "static")
COLDEST, HOTTEST = 1e-4, 1e4  # temperatures between which logits stay numbers
DEFAULT_THRESHOLD = 0.9
DEFAULT_BUDGET = 0.35  # nats, as SDAR's entropy_bounded
DRAWN_DRAFT = 4  # tokens of a draft in sampling, where a choice by the clock would take the meaning from a seed

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
    mode: "blocks"; "speculative" (drafts that are kept as far as the weights' own causal logits agree: the AR answer in fewer
        forwards, for checkpoints with context "causal"); "ar" (transformers' own generate on the trunk, token by token). Default:
        "speculative" for a checkpoint with gated adapters, which draft; "blocks" for any other.
    draft_length, drafting, draft_threshold: of a checkpoint with gated adapters, see `drafts_diffvl`. draft_length: tokens of a
        draft; by default what pays on this machine, in sampling a fixed number. drafting: "fused" (the forward that checks drafts
        makes the next ones) or "separate" (a forward each). draft_threshold: a draft ends before its first token whose
        distribution is less certain.
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
    mode: str | None = _setting(
        None, "Blocks; drafts checked by the weights' own AR logits; or token by token. Default: the checkpoint's.", choices=MODES
    )
    draft_length: int | None = _setting(
        None, "Tokens of a draft, of a lossless checkpoint. Default: what pays on this machine.", least=1
    )
    drafting: str | None = _setting(
        None, "Whether drafts are checked and made in one forward, or in one each. Default: what pays.", choices=DRAFTING
    )
    draft_threshold: float | None = _setting(
        None, "A draft ends before a token less certain than this. Default: never.", least=0, most=1
    )
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
            if choices and value not in choices and not (value is None and one.default is None):
                raise ValueError(f"{spell(one.name)} is {value!r}, expected one of {', '.join(choices)}")
            if value is not None and least is not None and not least <= value <= (value if most is None else most):
                expected = f"{least} or more" if most is None else f"{least} to {most}"
                raise ValueError(f"{spell(one.name)} is {value}, expected {expected}")
        if "" in self.stop_strings:
            raise ValueError(f"{spell('stop_strings', '')} is in every text: name a text that ends the answer")

    def _check_mode(self, asked: Collection[str], spell: Spelling) -> None:
        if self.mode is None:
            return
        mode = spell("mode", self.mode)
        drafts = ("draft_length", "drafting", "draft_threshold")
        whys = {
            "blocks": (drafts, "checks no drafts"),
            "speculative": (("remasking",), "keeps what its AR logits agree with"),
            "ar": (("denoising_steps", "remasking", *drafts), "decodes token by token"),
        }
        names, why = whys[self.mode]
        for name in names:
            if name in asked:
                raise ValueError(f"{spell(name)} has no effect with {mode}, which {why}")
        for name in ("threshold", "entropy_budget") if self.mode != "blocks" else ():
            if name in asked:
                raise ValueError(f"{spell(name, getattr(self, name))} has no effect with {mode}: leave it out")

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
        gated = getattr(config, "gated_adapter", None) is not None
        if self.mode is None:
            chosen = replace(self, mode="speculative" if gated else "blocks")
            asked = {one.name for one in fields(self) if getattr(self, one.name) != one.default}
            chosen._check_mode(asked, spell)
            return chosen.for_checkpoint(config, spell)
        size, steps = config.block_size, self.denoising_steps
        if steps is not None and not 1 <= steps <= size:
            most = f"{size}, which has seen the next-token objective only" if config.decoding == "ar" else str(size)
            raise ValueError(
                f"{spell('denoising_steps')} is {steps}, expected 1 to the block size, {most}: a block has no more tokens"
            )
        if self.mode == "speculative":
            self._check_drafts(config, gated, spell)
        stops = frozenset(config.stop_token_ids) if self.eos_token_id is None else self.eos_token_id
        pads = [token for token in (*sorted(stops), *config.stop_token_ids) if is_token(token, config)]
        filled: dict[str, Any] = {
            "temperature": 0.0 if self.is_greedy else self.temperature,
            "do_sample": not self.is_greedy,
            "eos_token_id": stops,
            "pad_token_id": next(iter(pads), 0) if self.pad_token_id is None else self.pad_token_id,
        }
        if steps is None and self.mode != "ar":
            filled["denoising_steps"] = size if self.mode == "blocks" else 1
        if self.mode == "speculative" and gated:
            filled |= self._filled_drafts(size)
        if self.threshold is None and self.remasking == "low_confidence_dynamic":
            filled["threshold"] = DEFAULT_THRESHOLD
        if self.entropy_budget is None and self.remasking == "entropy":
            filled["entropy_budget"] = DEFAULT_BUDGET
        return replace(self, **filled)

    def _check_drafts(self, config: Any, gated: bool, spell: Spelling) -> None:
        """Raises ValueError if a checkpoint cannot draft like this."""
        mode = spell("mode", self.mode)
        if config.context != "causal":
            raise ValueError(
                f"{mode} needs a checkpoint trained with context: causal (and best with an AR loss, ar_weight), whose own AR "
                f"logits check the drafts; this one has context: {config.context}. Use {spell('mode', 'blocks')} or "
                f"{spell('mode', 'ar')}"
            )
        if not gated:
            self._check_ungated(mode, spell)
        elif self.draft_length is not None and self.draft_length > config.block_size:
            most = f"1 to {config.block_size}, the longest draft of this checkpoint"
            raise ValueError(f"{spell('draft_length')} is {self.draft_length}, expected {most}")
        elif self.draft_length is not None and self.denoising_steps is not None and self.denoising_steps > self.draft_length:
            steps, length = (spell(name, getattr(self, name)) for name in ("denoising_steps", "draft_length"))
            raise ValueError(f"{steps} has no effect with {length}: a draft is made in a forward for each of its tokens at most")
        elif self.drafting == "fused" and self.denoising_steps not in (None, 1):
            fused, separate = spell("drafting", "fused"), spell("drafting", "separate")
            raise ValueError(f"{spell('denoising_steps')} has no effect with {fused}: use {separate}, or leave it out")

    def _check_ungated(self, mode: str, spell: Spelling) -> None:
        """Raises ValueError for what a checkpoint that drafts with its own weights does not know."""
        for name in ("draft_length", "drafting", "draft_threshold"):
            if getattr(self, name) is not None:
                needed = "a checkpoint with gated adapters, of a lossless conversion"
                raise ValueError(f"{spell(name)} has no effect here: it needs {needed}")
        if self.is_static:
            static = spell("cache_implementation", self.cache_implementation)
            raise ValueError(f"{static} has no effect with {mode}, whose forwards have many shapes here: leave it out")

    def _filled_drafts(self, size: int) -> dict[str, Any]:
        """How drafts are made, where that is left open; a length of None goes by the clock."""
        length = self.draft_length
        if length is None and (self.is_static or not self.is_greedy):
            length = size if self.is_static else min(size, DRAWN_DRAFT)
        drafting = self.drafting
        if drafting is None and (length is not None or self.denoising_steps is not None):
            drafting = "fused" if self.denoising_steps is None else "separate"
        return {"draft_length": length, "drafting": drafting}


def is_token(token: int, config: Any) -> bool:
    """Whether a checkpoint's tokenizer has this id."""
    return 0 <= token < config.vocabulary_size
