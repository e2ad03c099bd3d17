"""Messages, as a caller gives them -> turns. What a message says is used or refused by name: nothing is dropped in silence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .template_diffvl import Part, Turn

Messages = Sequence[Mapping[str, Any]]

SOURCES = ("image", "url", "path", "base64")  # where the part of an image may carry it, as in transformers' own processors
EXPECTED = (
    'expected {"type": "text", "text": "..."} or {"type": "image"}, the latter with one of '
    '"image" (a PIL image or a path), "path" and "base64", or with none of them where images are given beside the messages'
)


def turns_of(messages: Messages, image_token: str, structured: bool = False) -> list[Turn]:
    """Role and content of every message.

    Args:
        structured: whether a content is parts, as the chat template of a vision-language model takes them; otherwise it is one
            text, in which a placeholder stands for each image.
    Raises:
        ValueError: naming what is wrong with a message, or what it holds that would be left out.
    """
    turns: list[Turn] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"a message has the role {role!r}; expected system, user or assistant")
        parts: list[Part] = [content] if isinstance(content, str) else _parts(role, content, image_token)
        if isinstance(content, str) and image_token in content:
            raise _placeholder(image_token)
        if len(message) > 2:
            _refuse_others(f"a message of the role {role!r}", message, ("role", "content"))
        text = "".join(image_token if part is None else part for part in parts)
        turns.append((role, _structured(role, parts) if structured else text))
    return turns


def _structured(role: str, parts: list[Part]) -> tuple[Part, ...]:
    """Parts without empty texts, of which one template makes a space and another nothing; an answer is one text."""
    if role == "assistant" and None in parts:
        raise ValueError("an answer holds an image: this model writes text only")
    if role == "assistant":
        return ("".join(part for part in parts if part is not None),)
    return tuple(part for part in parts if part != "") or ("",)


def images_of(messages: Messages) -> Iterator[tuple[str, Any] | None]:
    """For each image part, in order: where the image stands (one of SOURCES) and what stands there; None where the part
    carries none. The messages are ones that `turns_of` took."""
    for message in messages:
        content = message["content"]
        for part in () if isinstance(content, str) else content:
            if part["type"] == "image":
                yield next(((key, part[key]) for key in SOURCES if part.get(key) is not None), None)


def _parts(role: str, content: Any, image_token: str) -> list[Part]:
    """Content given as parts: texts, and None for an image."""
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message of the role {role!r} has {type(content).__name__} as its content; expected text or parts")
    parts = [_part(role, part) for part in content]
    # Looked for in the whole: two parts may join to the placeholder's text.
    if "".join(image_token if part is None else part for part in parts).count(image_token) != parts.count(None):
        raise _placeholder(image_token)
    return parts


def _part(role: str, part: Any) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else f"({type(part).__name__})"
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part) > 2:
            _refuse_others("a text part", part, ("type", "text"))
        return part["text"]
    if kind == "text":
        raise ValueError(f"a text part has {type(part.get('text')).__name__} as its text; {EXPECTED}")
    if kind != "image":
        raise ValueError(f"a message of the role {role!r} has a part of the type {kind!r}; {EXPECTED}")
    _refuse_others("an image part", part, ("type", *SOURCES))
    given = [key for key in SOURCES if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"an image part carries {' and '.join(map(repr, given))}; expected one of them")
    return None


def _refuse_others(what: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if `item` says more than the known keys do. None and empty values say nothing."""
    for key in item.keys() - set(known):
        value = item[key]
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value):
            raise ValueError(f"{what} has {key!r}, which would be left out; take it out, or write what it says into the text")


def _placeholder(image_token: str) -> ValueError:
    return ValueError(f"the text holds {image_token!r}, which stands for an image: give images as parts")
