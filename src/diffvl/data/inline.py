"""Images that stand in a row itself: the bytes in a table's cell, `datasets`' {bytes, path}, a `data:` URL. Each is replaced by
the name that it goes by from there on (`references`), with the steps that lead to it in its row.
"""

from collections.abc import Callable, Mapping
from typing import Any

from diffvl.data.references import DATA_URL

Steps = tuple[str | int, ...]
# Gives the name of an image that stands at these steps of its row.
Naming = Callable[[Any, Steps], str]

_TURNS = ("conversations", "messages")
_CONTENTS = ("content", "value")
_IN_PARTS = ("image", "image_url", "path", "url")


def is_inline(item: Any) -> bool:
    """Tells whether a value is an image itself, not the name of one."""
    if isinstance(item, str):
        return item.startswith(DATA_URL)
    return isinstance(item, bytes) or (isinstance(item, dict) and "bytes" in item and not isinstance(item["bytes"], str))


def with_names(record: dict[str, Any], columns: Mapping[Any, str], name: Naming) -> dict[str, Any]:
    """Gives a record in which every image is a name.

    Args:
        columns: key of the record -> the column that it was read from, where that has another name.
    """
    if not _may_hold_images(record):
        return record  # most, so it must cost little
    named = dict(record)
    for key in ("image", "images"):
        if key in named:
            named[key] = _named(named[key], (columns.get(key, key),), name)
    for key in _TURNS:
        if isinstance(named.get(key), list):
            top = columns.get(key, key)
            named[key] = [_named_turn(turn, (top, place), name) for place, turn in enumerate(named[key])]
    return named


def _may_hold_images(record: dict[str, Any]) -> bool:
    for key in ("image", "images"):
        value = record.get(key)
        if value is not None and (not isinstance(value, str) or value.startswith(DATA_URL)):
            return True
    for key, content in (("conversations", "value"), ("messages", "content")):
        turns = record.get(key)
        if isinstance(turns, list):
            for turn in turns:
                if not isinstance(turn, dict) or not isinstance(turn.get(content), str):
                    return True
    return False


def _named(item: Any, steps: Steps, name: Naming) -> Any:
    if isinstance(item, list):
        return [_named(one, (*steps, place), name) for place, one in enumerate(item)]
    if not is_inline(item):
        return item
    if isinstance(item, dict) and item["bytes"] is None:
        return item.get("path")  # of a file, or nothing at all
    return name(item, steps)


def _named_turn(turn: Any, steps: Steps, name: Naming) -> Any:
    """Gives a turn whose parts name their images; the turn itself where it has no parts, as most."""
    if not isinstance(turn, dict):
        return turn
    for key in _CONTENTS:
        if isinstance(turn.get(key), list):
            parts = [_named_part(part, (*steps, key, place), name) for place, part in enumerate(turn[key])]
            turn = {**turn, key: parts}
    return turn


def _named_part(part: Any, steps: Steps, name: Naming) -> Any:
    if not isinstance(part, dict):
        return part
    named = dict(part)
    for key in _IN_PARTS:
        value = part.get(key)
        if is_inline(value):
            named[key] = _named(value, (*steps, key), name)
        elif isinstance(value, dict):  # {"image_url": {"url": ...}}
            named[key] = {
                inner: _named(one, (*steps, key, inner), name) if inner in ("url", "path") else one
                for inner, one in value.items()
            }
    return named
