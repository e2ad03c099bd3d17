"""How a benchmark's questions are decoded: what the caller says of the model, and what each task asks for.

Place in the flow: between lmms-eval's words (`--model_args`, a task's `generation_kwargs`) and `DecodeSettings`. What the caller
names holds for every task; the rest is as the task asks; what neither names is as in `diffvl generate`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from diffvl.decode.flags import SETTINGS
from diffvl.errors import UsageError
from diffvl.hub.settings_diffvl import DecodeSettings

NAMES = (*SETTINGS, "cache_implementation")  # settings that `--model_args` takes
PLACES = ("pretrained", "device")  # what else it takes; lmms-eval hands over `--batch_size` itself, and twice is an error
SAMPLING = ("temperature", "top_k", "top_p")
LENGTHS = ("max_new_tokens", "max_gen_toks")  # a task's words for the longest answer, the first one found
STOPS = ("until", "stop_sequences")
READ = {*LENGTHS, *STOPS, *SAMPLING, "do_sample", "seed"}
# What a task may say that asks for what happens anyway.
NEUTRAL: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "use_cache": True}


@dataclass(frozen=True)
class TaskSettings:
    """How the questions of a task are decoded. until: texts that end an answer and are not part of it. unused: what the task asks
    for besides, as name=value: block decoding knows nothing like it."""

    settings: DecodeSettings
    until: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def read_settings(given: Mapping[str, Any]) -> DecodeSettings:
    """Reads the settings that a caller gives by name, as words or as values.

    Raises:
        UsageError: for a name that is no setting, a value that is none, or a setting without effect.
    """
    if unknown := sorted(given.keys() - set(NAMES)):
        raise UsageError(f"the model diffvl knows no {', '.join(unknown)}; there are {', '.join([*PLACES, *NAMES])}")
    hints = get_type_hints(DecodeSettings)
    values: dict[str, Any] = {}
    for name, value in given.items():
        several = name == "stop_strings" and isinstance(value, str)
        try:
            if isinstance(value, bool):  # True is 1 to Python, and no setting of these is a yes or no
                raise UsageError(f"{name}={value}: expected {hints[name]}")
            values[name] = TypeAdapter(hints[name]).validate_python((value,) if several else value)
        except ValidationError as error:
            raise UsageError(f"{name}={value!r}: {error.errors()[0]['msg']}") from error
    settings = DecodeSettings(**values)
    try:
        settings.check(given=given.keys() & set(SETTINGS))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return settings


def settings_for_task(base: DecodeSettings, named: Collection[str], asked: Mapping[str, Any], task: str) -> TaskSettings:
    """Joins what the caller and a task ask for.

    Args:
        base: the caller's settings, and `named` those of them that were named.
        asked: the task's `generation_kwargs`. task: its name, for messages.
    Raises:
        UsageError: if they do not fit together.
    """
    values: dict[str, Any] = {}
    if "max_new_tokens" not in named:
        values |= dict([("max_new_tokens", int(asked[word])) for word in LENGTHS if asked.get(word) is not None][:1])
    if not {*SAMPLING, "seed"} & set(named):
        values |= _sampling(asked)
    until = tuple(end for word in STOPS for end in _texts(asked.get(word)))
    settings = replace(base, **values, stop_strings=tuple(dict.fromkeys((*base.stop_strings, *until))))
    try:
        settings.check()
    except ValueError as error:
        raise UsageError(f"task {task}: {error}") from error
    unused = tuple(f"{name}={value!r}" for name, value in sorted(asked.items()) if not _is_read(name, value))
    return TaskSettings(settings, until, unused)


def _sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """How a task wants its answers sampled; greedy unless it asks for something else, as lmms-eval's own models take it: a
    temperature of 0 is greedy whatever `do_sample` says, and a task that samples without naming one has 1."""
    warm = asked.get("temperature")
    samples = bool(asked.get("do_sample")) if warm is None else asked.get("do_sample") is not False
    temperature = (1.0 if warm is None else float(warm)) if samples else 0.0
    if not temperature:
        return {"temperature": 0.0}
    seed = {"seed": asked["seed"]} if asked.get("seed") is not None else {}
    chosen = {name: asked[name] for name in ("top_k", "top_p") if asked.get(name)}
    return {"temperature": temperature, **chosen, **seed}


def _texts(value: Any) -> tuple[str, ...]:
    """The texts of a value that is one, several, or none; an empty one ends nothing."""
    return tuple(text for text in ((value,) if isinstance(value, str) else value or ()) if text)


def _is_read(name: str, value: Any) -> bool:
    """Tells whether a task's word is heard, or asks for what happens anyway."""
    return name in READ or value is None or NEUTRAL.get(name) == value


def cut(text: str, until: Collection[str]) -> str:
    """Gives an answer up to the first text that ends it, without white space around it."""
    for end in until:
        text = text.partition(end)[0]
    return text.strip()


def as_record(settings: DecodeSettings) -> dict[str, Any]:
    """The settings that say something, for a file of results."""
    values = {one.name: getattr(settings, one.name) for one in fields(settings) if one.name in NAMES}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value not in (None, ())}
