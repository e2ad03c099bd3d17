"""Messages -> turns of plain text with a placeholder for each picture, and the pictures in the order of their parts.

What a message says is used or refused by name: nothing that a caller gives is dropped in silence.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]
Turn = tuple[str, str]  # role and text

SOURCES = ("image", "url", "path", "base64")  # where the part of a picture may carry it, as in transformers' own processors
EXPECTED = (
    'expected {"type": "text", "text": "..."} or {"type": "image"}, the latter with one of '
    '"image" (a PIL picture or a path), "path" and "base64", or with none of them where pictures are given beside the messages'
)


def turns_of(messages: Messages, image_token: str) -> list[Turn]:
    """Role and text of every message; each picture part becomes one placeholder.

    Raises:
        ValueError: naming what is wrong with a message, or what it holds that would be left out.
    """
    turns = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise ValueError(f"a message has the role {role!r}; expected system, user or assistant")
        if not isinstance(content, str):
            content = _flatten(role, content, image_token)
        elif image_token in content:
            raise _placeholder(image_token)
        if len(message) > 2:
            _refuse_others(f"a message of the role {role!r}", message, ("role", "content"))
        turns.append((role, content))
    return turns


def pictures_of(messages: Messages) -> Iterator[tuple[str, Any] | None]:
    """For each picture part, in order: where the picture stands (one of SOURCES) and what stands there; None where the part
    carries none. The messages are ones that `turns_of` took."""
    for message in messages:
        content = message["content"]
        for part in () if isinstance(content, str) else content:
            if part["type"] == "image":
                yield next(((key, part[key]) for key in SOURCES if part.get(key) is not None), None)


def _flatten(role: str, content: Any, image_token: str) -> str:
    """Content given as parts, as one string."""
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message of the role {role!r} has {type(content).__name__} as its content; expected text or parts")
    pieces = [_part(role, part, image_token) for part in content]
    text = "".join(pieces)
    # Counted in the whole: two parts may join to the placeholder's text.
    if text.count(image_token) != sum(isinstance(part, Mapping) and part["type"] == "image" for part in content):
        raise _placeholder(image_token)
    return text


def _part(role: str, part: Any, image_token: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else f"({type(part).__name__})"
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part) > 2:
            _refuse_others("a text part", part, ("type", "text"))
        return part["text"]
    if kind == "text":
        raise ValueError(f"a text part has {type(part.get('text')).__name__} as its text; {EXPECTED}")
    if kind != "image":
        raise ValueError(f"a message of the role {role!r} has a part of the type {kind!r}; {EXPECTED}")
    _refuse_others("a picture part", part, ("type", *SOURCES))
    given = [key for key in SOURCES if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"a picture part carries {' and '.join(map(repr, given))}; expected one of them")
    return image_token


def _refuse_others(what: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if `item` says more than the known keys do. None and empty values say nothing."""
    for key in item.keys() - set(known):
        value = item[key]
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value):
            raise ValueError(f"{what} has {key!r}, which would be left out; take it out, or write what it says into the text")


def _placeholder(image_token: str) -> ValueError:
    return ValueError(f"the text holds {image_token!r}, which stands for a picture: give pictures as parts")
