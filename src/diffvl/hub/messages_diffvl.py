"""Messages, as a caller gives them -> turns. What a message says is used or refused by name: nothing is dropped in silence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .template_diffvl import Part, Turn, Visual

Messages = Sequence[Mapping[str, Any]]
Placeholders = Mapping[Visual, str]  # what stands for an image in a rendered chat, and for a video where the model takes them

# Where a part may carry what it shows, as in transformers' own processors.
SOURCES: dict[Visual, tuple[str, ...]] = {
    Visual.IMAGE: ("image", "url", "path", "base64"),
    Visual.VIDEO: ("video", "path"),
}
EXPECTED = (
    'expected {"type": "text", "text": "..."} or {"type": "image"}, the latter with one of '
    '"image" (a PIL image or a path), "path" and "base64", or with none of them where images are given beside the messages'
)
EXPECTED_VIDEO = '; or {"type": "video"} with "video" (a path, a folder of frames or a list of frames) or "path"'


def turns_of(messages: Messages, placeholders: Placeholders, structured: bool = False) -> list[Turn]:
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
        if isinstance(content, str):
            parts: list[Part] = [content]
            _refuse_placeholders(content, placeholders, parts)
        else:
            parts = _parts(role, content, placeholders)
        if len(message) > 2:
            _refuse_others(f"a message of the role {role!r}", message, ("role", "content"))
        turns.append((role, _structured(role, parts) if structured else _joined(parts, placeholders)))
    return turns


def _structured(role: str, parts: list[Part]) -> tuple[Part, ...]:
    """Parts without empty texts, of which one template makes a space and another nothing; an answer is one text."""
    if role != "assistant":
        return tuple(part for part in parts if part != "") or ("",)
    for part in parts:
        if isinstance(part, Visual):
            raise ValueError(f"an answer holds {_an(part)}: this model writes text only")
    return ("".join(part for part in parts if isinstance(part, str)),)


def _joined(parts: Sequence[Part], placeholders: Placeholders) -> str:
    return "".join(placeholders[part] if isinstance(part, Visual) else part for part in parts)


def visuals_of(messages: Messages) -> Iterator[tuple[Visual, tuple[str, Any] | None]]:
    """For each image or video part, in order: which of them, where it stands (one of SOURCES) and what stands there; None where
    the part carries none. The messages are ones that `turns_of` took."""
    for message in messages:
        content = message["content"]
        for part in () if isinstance(content, str) else content:
            if part["type"] != "text":
                visual = Visual(part["type"])
                yield visual, next(((key, part[key]) for key in SOURCES[visual] if part.get(key) is not None), None)


def _parts(role: str, content: Any, placeholders: Placeholders) -> list[Part]:
    """Content given as parts: texts, and what is looked at."""
    if not isinstance(content, list | tuple):
        raise ValueError(f"a message of the role {role!r} has {type(content).__name__} as its content; expected text or parts")
    parts = [_part(role, part, placeholders) for part in content]
    _refuse_placeholders(_joined(parts, placeholders), placeholders, parts)
    return parts


def _part(role: str, part: Any, placeholders: Placeholders) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else f"({type(part).__name__})"
    expected = EXPECTED + (EXPECTED_VIDEO if Visual.VIDEO in placeholders else "")
    if kind == "text" and isinstance(part.get("text"), str):
        if len(part) > 2:
            _refuse_others("a text part", part, ("type", "text"))
        return part["text"]
    if kind == "text":
        raise ValueError(f"a text part has {type(part.get('text')).__name__} as its text; {expected}")
    if kind == "video" and Visual.VIDEO not in placeholders:
        raise ValueError(f"a message of the role {role!r} shows a video, which this model does not take; {expected}")
    if kind not in ("image", "video"):
        raise ValueError(f"a message of the role {role!r} has a part of the type {kind!r}; {expected}")
    visual = Visual(kind)
    _refuse_others(f"{_an(visual)} part", part, ("type", *SOURCES[visual]))
    given = [key for key in SOURCES[visual] if part.get(key) is not None]
    if len(given) > 1:
        raise ValueError(f"{_an(visual)} part carries {' and '.join(map(repr, given))}; expected one of them")
    return visual


def _an(visual: Visual) -> str:
    return "an image" if visual is Visual.IMAGE else "a video"


def _refuse_others(what: str, item: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError if `item` says more than the known keys do. None and empty values say nothing."""
    for key in item.keys() - set(known):
        value = item[key]
        if value is not None and not (isinstance(value, str | list | tuple | dict) and not value):
            raise ValueError(f"{what} has {key!r}, which would be left out; take it out, or write what it says into the text")


def _refuse_placeholders(text: str, placeholders: Placeholders, parts: Sequence[Part]) -> None:
    """Raises ValueError if a message's text has more placeholders than parts that they stand for. It is the whole text: two
    parts may join to a placeholder."""
    for visual, token in placeholders.items():
        if text.count(token) != sum(part is visual for part in parts):
            raise ValueError(f"the text holds {token!r}, which stands for {_an(visual)}: give {visual.value}s as parts")
