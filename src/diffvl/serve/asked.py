"""The body of a chat completion -> what is asked, checked key by key.

Nothing that a request says is dropped in silence. What we do not do is refused by name, unless the value asks for what happens
anyway (`n: 1`, `tools: []`): clients send such values unasked.
"""

import difflib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffvl.data.content import kind_of
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.serve.limits import MOST_MESSAGES, MOST_PARTS, MOST_STOPS, SIGNS_PER_PART, Limits
from diffvl.serve.messages import Conversation, conversation_of
from diffvl.serve.refusals import Refusal, short, wrong

# Keys of OpenAI's that we do not do: what may stand there all the same, and why nothing else may.
NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "one answer is given for a request: send it again with another seed"),
    "tools": (([],), "tools are not called"),
    "tool_choice": (("none", "auto"), "tools are not called"),
    "parallel_tool_calls": ((True, False), "tools are not called"),
    "functions": (([],), "functions are not called"),
    "function_call": (("none", "auto"), "functions are not called"),
    "logprobs": ((False,), "probabilities are not given"),
    "top_logprobs": ((0,), "probabilities are not given"),
    "logit_bias": (({},), "logits are not changed"),
    "frequency_penalty": ((0,), "tokens are not penalised; repetition_stop ends an answer that repeats itself"),
    "presence_penalty": ((0,), "tokens are not penalised; repetition_stop ends an answer that repeats itself"),
    "response_format": (({"type": "text"},), "answers are text, without a form"),
    "modalities": ((["text"], []), "answers are text"),
    "audio": ((), "answers are text"),
    "prediction": ((), "nothing is predicted from a given text"),
    "reasoning_effort": (("none",), "there is no reasoning to choose"),
    "verbosity": ((), "how long an answer is stands in the prompt, and in max_tokens"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "web_search_options": ((), "the web is not searched"),
    "prompt_cache_key": (("",), "prompts are not kept"),
    "prompt_cache_retention": ((), "prompts are not kept"),
    "mode": (("blocks",), "a server decodes in blocks; diffvl generate has the other modes"),
}
# Of a lossless checkpoint, whose drafts are no blocks.
NOT_DRAFTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "mode": (("speculative",), "this model drafts and checks; diffvl generate has the other modes"),
    "denoising_steps": ((1,), "this model drafts in one forward"),
    "show_steps": ((False,), "this model drafts and checks: there are no denoising steps to show"),
    **{
        name: ((), "this model checks what it drafts: its answers do not depend on how drafts are filled in")
        for name in ("remasking", "threshold", "entropy_budget")
    },
}
UNUSED = ("user", "safety_identifier")  # names for the caller's own records, which ask for nothing
NUMBER = (int, float)
SETTINGS: dict[str, tuple[str, type | tuple[type, ...], str]] = {  # key: field of DecodeSettings, types, their names
    "temperature": ("temperature", NUMBER, "a number"),
    "top_p": ("top_p", NUMBER, "a number"),
    "top_k": ("top_k", int, "a whole number"),
    "seed": ("seed", int, "a whole number"),
    "denoising_steps": ("denoising_steps", int, "a whole number"),
    "remasking": ("remasking", str, "a string"),
    "threshold": ("threshold", NUMBER, "a number"),
    "entropy_budget": ("entropy_budget", NUMBER, "a number"),
    "repetition_stop": ("repetition_stop", int, "a whole number"),
}
OTHERS = ("model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "show_steps")
KNOWN = frozenset((*SETTINGS, *OTHERS, *NOT_DONE, *UNUSED))
MOST_WHOLE = 2**63  # what torch takes as a number
API_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop"}


@dataclass(frozen=True)
class Asked:
    """A chat completion that is asked for.

    settings: checked for the checkpoint; `max_new_tokens` is the limit that was asked for, or what the server allows.
    names_limit: the key that asked for it, None where none did. show_steps: whether the stream has every denoising step.
    """

    conversation: Conversation
    settings: DecodeSettings
    names_limit: str | None
    streams: bool
    includes_usage: bool
    show_steps: bool


def asked_in(body: bytes, config: DiffVLConfig, tokenizer: Any, name: str, limits: Limits) -> Asked:
    """Raises Refusal for a body that asks for nothing, or for what is not to be had."""
    given = {key: value for key, value in _object_in(body, limits).items() if value is not None}
    _refuse_unknown(given, NOT_DONE if config.gated_adapter is None else {**NOT_DONE, **NOT_DRAFTED})
    _check_model(given, name)
    settings, names_limit = _settings(given, config, tokenizer, limits)
    streams = _flag(given, "stream")
    show_steps = _flag(given, "show_steps")
    if show_steps and not streams:
        raise wrong("show_steps", "show_steps has no effect without stream: true, which the steps are sent in")
    if "messages" not in given:
        raise wrong("messages", "messages is missing: expected a list of {role, content}, the user's last")
    conversation = conversation_of(given["messages"], limits)
    return Asked(conversation, settings, names_limit, streams, _includes_usage(given, streams), show_steps)


def _object_in(body: bytes, limits: Limits) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {short(twice)!r} stands there twice")
        return found

    if not body:
        raise wrong(None, "the body is empty: expected a JSON object with messages")
    # Nobody is served while JSON is read: millions of values would stop all streams for seconds.
    signs, most = sum(map(body.count, (b",", b"[", b"{"))), limits.letters + SIGNS_PER_PART * MOST_MESSAGES * MOST_PARTS
    if signs > most:
        raise wrong(None, f"the body has {signs} commas and brackets, more than the {most} of the longest messages: shorten them")
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise wrong(None, f"the body is not UTF-8 (byte {error.start + 1}): expected a JSON object") from error
    except RecursionError as error:
        raise wrong(None, "the body is nested too deeply: expected a JSON object with messages") from error
    except ValueError as error:
        raise wrong(None, f"the body is no JSON that can be read ({error}): expected a JSON object with messages") from error
    if not isinstance(found, dict):
        raise wrong(None, f"the body is {kind_of(found)}: expected a JSON object with messages")
    return found


def _refuse_unknown(given: Mapping[str, Any], not_done: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    for key, value in given.items():
        if key not in KNOWN:
            near = difflib.get_close_matches(short(key), KNOWN, 1)
            raise wrong(
                short(key), f"{short(key)!r} is not known here" + (f"; {near[0]!r} is" if near else ""), "unknown_parameter"
            )
        if key in not_done:
            neutral, why = not_done[key]
            if not any(same(value, one) for one in neutral):
                allowed = " or ".join(json.dumps(one) for one in neutral)
                advice = f"leave it out, or send {allowed}" if neutral else "leave it out"
                raise wrong(key, f"{key} is not supported: {why}; {advice}", "unsupported_parameter")
    for key in UNUSED:
        if not isinstance(given.get(key, ""), str):
            raise _of_kind(key, given[key], "a string")


def _check_model(given: Mapping[str, Any], name: str) -> None:
    model = given.get("model", name)
    if not isinstance(model, str):
        raise _of_kind("model", model, "a string")
    if model != name:
        raise Refusal(404, f"the model {short(model)!r} is not served here; {name!r} is", "model", "model_not_found")


# --- settings of decoding ----------------------------------------------------------------------------------------------------


def _settings(
    given: Mapping[str, Any], config: DiffVLConfig, tokenizer: Any, limits: Limits
) -> tuple[DecodeSettings, str | None]:
    values: dict[str, Any] = {}
    for key, (name, kinds, described) in SETTINGS.items():
        if key in given:
            if not isinstance(given[key], kinds) or isinstance(given[key], bool):
                raise _of_kind(key, given[key], described)
            values[name] = _number(key, given[key]) if kinds == NUMBER else given[key]
            if kinds is int and abs(given[key]) >= MOST_WHOLE:
                raise wrong(key, f"{key} is {short(given[key])}, expected less than {MOST_WHOLE}")
    if values.get("seed", 0) < 0:
        raise wrong("seed", f"seed is {values['seed']}, expected 0 to {MOST_WHOLE - 1}")
    if not values.get("temperature"):
        values.pop("seed", None)  # the likeliest token is the same with every seed
    else:
        values.setdefault("seed", secrets.randbelow(MOST_WHOLE))
    values["stop_strings"] = _stops(given.get("stop"))
    names_limit, values["max_new_tokens"] = _limit(given, limits)
    return _checked(lambda: DecodeSettings(**values, tokenizer=tokenizer), config), names_limit


def _number(key: str, value: int | float) -> float:
    """The number as a float: to JSON 1 and 1.0 are the same, to what samples they are not."""
    try:
        return float(value)
    except OverflowError as error:
        raise wrong(key, f"{key} is {short(value)}, which is too large a number") from error


def _checked(make: Callable[[], DecodeSettings], config: DiffVLConfig) -> DecodeSettings:
    spelled: list[str] = []

    def spell(name: str, value: Any = None) -> str:
        word = API_NAMES.get(name, name)
        spelled.append(word)
        return word if value is None else f"{word}: {json.dumps(value)}"

    try:
        settings = make()
        settings.check(spell=spell)
        return settings.for_checkpoint(config, spell=spell)
    except (ValueError, OverflowError) as error:
        told = (word for word in spelled if word in str(error))  # what was asked about on the way is not all at fault
        raise wrong(next(told, None), str(error)) from error


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop if stop is not None else []
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise wrong("stop", f"stop is {kind_of(stop)}: expected a string or a list of strings")
    if len(stops) > MOST_STOPS:
        raise wrong("stop", f"stop has {len(stops)} strings, at most {MOST_STOPS} are taken")
    if any(len(one) > 256 for one in stops):
        raise wrong("stop", "stop has a string of more than 256 letters")
    if any("\ud800" <= sign <= "\udfff" for one in stops for sign in one):
        raise wrong("stop", "stop holds half of a surrogate pair, which no answer has")
    return tuple(stops)


def _limit(given: Mapping[str, Any], limits: Limits) -> tuple[str | None, int]:
    """The key that limits the answer, and the tokens."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    for name in names:
        value = given[name]
        if not isinstance(value, int) or isinstance(value, bool):
            raise _of_kind(name, value, "a whole number")
        if not 1 <= value <= limits.answer_tokens:
            raise wrong(name, f"{name} is {short(value)}, expected 1 to {limits.answer_tokens}")
    if len({given[name] for name in names}) > 1:
        raise wrong("max_tokens", "max_tokens and max_completion_tokens say different things: keep one of them")
    return (names[0], given[names[0]]) if names else (None, limits.answer_tokens)


# --- how it is sent ----------------------------------------------------------------------------------------------------------


def _includes_usage(given: Mapping[str, Any], streams: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _of_kind("stream_options", options, "an object")
    if not streams:
        raise wrong("stream_options", "stream_options has no effect without stream: true")
    known = ("include_usage", "include_obfuscation")
    for key, value in options.items():
        if key not in known:
            raise wrong(f"stream_options.{short(key)}", f"{short(key)!r} is not known in stream_options; include_usage is")
        if value is not None and not isinstance(value, bool):
            raise _of_kind(f"stream_options.{key}", value, "true or false")
    if options.get("include_obfuscation"):
        raise wrong("stream_options.include_obfuscation", "include_obfuscation is not supported: leave it out, or send false")
    return bool(options.get("include_usage"))


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise _of_kind(key, value, "true or false")
    return value


# --- words -------------------------------------------------------------------------------------------------------------------


def same(value: Any, other: Any) -> bool:
    """Whether two values are equal in JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _of_kind(key: str, value: Any, expected: str) -> Refusal:
    return wrong(key, f"{key} is {kind_of(value)}: expected {expected}")
