"""The content of a turn -> its text with markers, and the images that its parts carry.

Content is text, or a list of parts as in a chat request: `{"type": "text", "text": ...}` and images,
`{"type": "image"}` (the record's next image), `{"type": "image", "image": PATH}` or
`{"type": "image_url", "image_url": {"url": PATH}}`. Parts are joined without anything between, as chat templates do.
"""

import json
from dataclasses import dataclass
from typing import Any

from diffvl.data.keys import is_absent
from diffvl.data.markers import IMAGE_MARKER
from diffvl.errors import DataError

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_PATHS = ("image", "image_url", "path", "url")
# Others change the image by these.
_REFUSED = ("min_pixels", "max_pixels", "resized_height", "resized_width", "bytes", "base64", "data", "source", "file_id")


@dataclass(frozen=True)
class Content:
    """text: with a marker for every image part. paths: those that parts carry. placeholders: parts that carry none."""

    text: str
    paths: tuple[str, ...] = ()
    placeholders: int = 0


def read_content(value: Any, what: str) -> Content:
    """Raises DataError for content that is neither text nor parts of text and images; `what` names it in messages."""
    if not isinstance(value, list):
        return Content(text_of(value, what, "a string or a list of parts" if isinstance(value, dict) else "a string"))
    pieces: list[str] = []
    paths: list[str] = []
    placeholders = 0
    for number, part in enumerate(value, 1):
        where = f"{what}, part {number}"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise DataError(f"{where}: expected an object with `type`, got {kind_of(part)}", "part of a turn")
        if kind in _TEXTS:
            pieces.append(text_of(part.get("text"), f"{where}: `text`"))
        elif kind in _IMAGES:
            pieces.append(IMAGE_MARKER)
            path = _path_of(part, where)
            paths += [] if path is None else [path]
            placeholders += path is None
        else:
            raise DataError(
                f"{where} is of type {kind!r}, which is not supported: expected text or image; leave such records out",
                "part of a turn",
            )
    return Content("".join(pieces), tuple(paths), placeholders)


def _path_of(part: dict[str, Any], where: str) -> str | None:
    """Gives the path that an image part carries, if any."""
    refused = [key for key in _REFUSED if not is_absent(part.get(key))]
    if refused:
        raise DataError(f"{where}: `{refused[0]}` is not supported: write the image into a file and give its path", "image")
    given = {key: part[key] for key in _PATHS if not is_absent(part.get(key))}
    if not given:
        return None
    if len(given) > 1:
        raise DataError(f"{where}: {' and '.join(f'`{key}`' for key in given)}: keep one of them", "image")
    key, path = next(iter(given.items()))
    if isinstance(path, dict):
        path = path.get("url") or path.get("path")
    if not isinstance(path, str) or not path:
        raise DataError(f"{where}: `{key}` must be a path, got {kind_of(part[key])}", "image")
    return text_of(path, f"{where}: `{key}`")


def text_of(value: Any, what: str, expected: str = "a string") -> str:
    """Gives `value` if it is text that UTF-8 can hold: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise DataError(f"{what} must be {expected}, got {kind_of(value)}", "text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{what} holds half of a surrogate pair, {value[error.start]!r}: not valid text", "text") from error
    return value


def kind_of(value: Any) -> str:
    """Gives a JSON value's kind in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", str: "a string"}.get(type(value), "a number")
