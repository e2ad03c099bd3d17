"""The content of a turn -> its text with markers, and the images and videos that its parts carry.

Content is text, or a list of parts as in a chat request: `{"type": "text", "text": ...}` and images,
`{"type": "image"}` (the record's next image), `{"type": "image", "image": PATH}` or
`{"type": "image_url", "image_url": {"url": PATH}}`; and videos, `{"type": "video"}` or `{"type": "video", "video": PATH}`, whose
path may be a list of frames. Parts are joined without anything between, as chat templates do.

In text the marker `<image>` stands for an image, and in a record with videos `<video>` for a video. A backslash before it takes
its meaning away: `\\<image>` is the text `<image>`.
The same holds for the spellings that can hardly be anything else (`<image_1>`, `<|image|>`), which are refused otherwise, because
a model would read them as text and its image would stand somewhere else.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from diffvl.data.keys import is_absent
from diffvl.errors import DataError
from diffvl.hub.template_diffvl import Visual

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
ESCAPE = "\\"

_NAMES = r"(?:image|img|picture|pic|photo)"
# Nobody writes these but for an image: numbered ones, and the tokens of other models.
_SURE = "|".join(
    (
        rf"<{_NAMES}[ _-]?\#?\d+>",
        rf"<\|{_NAMES}[ _-]?\#?\d*\|>",
        r"<\|?(?:image|img|vision|media|video|audio)_(?:pad|start|end|begin|content)\|?>",
        r"<(?:image|img)_(?:placeholder|soft_token|context|here|token)>",
        r"<(?:start|end|begin)_of_(?:image|img)>",
        r"<(?:imageplaceholder|imagehere|im_patch|im_image|image_patch)>",
    )
)
# In a record with images these mean one; elsewhere they may be HTML, Markdown or prose.
_LIKELY = "|".join(
    (
        rf"(?!(?-i:{IMAGE_MARKER}))<{_NAMES}s?\s*/?>",
        rf"(?<!!)\[{_NAMES}(?:[ _-]?\#?\d+)?\](?!\(|:|\[)",
        rf"\{{\{{?{_NAMES}\}}?\}}",
        r"<(?:ImageHere|IMG_CONTEXT)>",
    )
)
_ESCAPED = re.compile(rf"\\(?={IMAGE_MARKER}|{_SURE})", re.IGNORECASE)
_ESCAPED_BOTH = re.compile(rf"\\(?={IMAGE_MARKER}|{VIDEO_MARKER}|{_SURE})", re.IGNORECASE)
_TO_ESCAPE = re.compile(rf"(?={IMAGE_MARKER}|{_SURE})", re.IGNORECASE)
_MARKER = re.compile(rf"(?<!\\){IMAGE_MARKER}")
_MARKERS = re.compile(rf"(?<!\\)({IMAGE_MARKER}|{VIDEO_MARKER})")
_SURE_PATTERN = re.compile(rf"(?<!\\)(?:{_SURE})", re.IGNORECASE)
_LIKELY_PATTERN = re.compile(rf"(?<!\\)(?:{_SURE}|{_LIKELY})", re.IGNORECASE)
_OTHER_MEDIA = re.compile(r"(?:^|\n)\s*(<(?:video|audio|speech)>)\s*(?:\n|$)", re.IGNORECASE)


def pieces_between(text: str) -> list[str]:
    """Cuts a text at its markers, one piece more than there are markers; the pieces are what a model reads."""
    if "<" not in text and ESCAPE not in text:
        return [text]
    return [_ESCAPED.sub("", piece) for piece in _MARKER.split(text)]


def parts_of(text: str, videos: bool) -> list[str | Visual]:
    """Cuts a text at its markers into what a model reads and what it looks at, in order.

    Args:
        videos: whether the record has videos; without them `<video>` is text.
    """
    if not videos:
        first, *others = pieces_between(text)
        found: list[str | Visual] = [first]
        for piece in others:
            found += [Visual.IMAGE, piece]
    else:
        found = [_ESCAPED_BOTH.sub("", piece) for piece in _MARKERS.split(text)]
        found[1::2] = [Visual.VIDEO if piece == VIDEO_MARKER else Visual.IMAGE for piece in found[1::2]]
    return [part for part in found if part != ""] or [""]


def count_markers(text: str) -> int:
    """Counts the images that the text shows."""
    return len(_MARKER.findall(text)) if IMAGE_MARKER in text else 0


def count_video_markers(text: str) -> int:
    """Counts the videos that the text of a record with videos shows."""
    return _MARKERS.findall(text).count(VIDEO_MARKER) if VIDEO_MARKER in text else 0


def as_video_markers(text: str) -> str:
    """Gives the text with its markers of images standing for videos: LLaVA-Video's habit."""
    return _MARKER.sub(VIDEO_MARKER, text)


def with_markers(text: str, num_images: int, num_videos: int = 0) -> str:
    """Gives a text without markers, with one for each image and video in front of it, each on a line of its own: LLaVA's
    habit."""
    return f"{IMAGE_MARKER}\n" * num_images + f"{VIDEO_MARKER}\n" * num_videos + text


def plain(text: str) -> str:
    """Gives a text without images as a model reads it."""
    return _ESCAPED.sub("", text) if ESCAPE in text else text


def escaped(text: str) -> str:
    """Gives a text that a model wrote as a record spells it: `plain` gives it back."""
    return _TO_ESCAPE.sub(lambda _: ESCAPE, text) if "<" in text else text


def mistaken_marker(text: str, images: bool) -> str | None:
    """Tells what looks like a marker of an image and is none.

    Args:
        images: the record has images, so that a spelling that could be something else most likely means one.
    """
    if not any(bracket in text for bracket in ("<[{" if images else "<")):
        return None  # most texts, which need no search
    found = (_LIKELY_PATTERN if images else _SURE_PATTERN).search(text)
    return found[0] if found else None


def other_media(text: str) -> str | None:
    """Gives the marker of a video or a sound, where it stands on a line of its own."""
    found = _OTHER_MEDIA.search(text) if "<" in text else None
    return found[1] if found else None


_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image", "image_url", "input_image")
_PATHS = ("image", "image_url", "path", "url")
# Others change the image by these.
_REFUSED = ("min_pixels", "max_pixels", "resized_height", "resized_width", "bytes", "base64", "data", "source", "file_id")


@dataclass(frozen=True)
class Content:
    """text: with a marker for every image and video part. paths: those that image parts carry. placeholders: image parts that
    carry none. videos: what video parts carry. video_placeholders: those that carry nothing."""

    text: str
    paths: tuple[str, ...] = ()
    placeholders: int = 0
    videos: tuple[Any, ...] = ()
    video_placeholders: int = 0


def read_content(value: Any, what: str) -> Content:
    """Raises DataError for content that is neither text nor parts of text and images; `what` names it in messages."""
    if not isinstance(value, list):
        return Content(text_of(value, what, "a string or a list of parts" if isinstance(value, dict) else "a string"))
    pieces: list[str] = []
    paths: list[str] = []
    videos: list[Any] = []
    placeholders = video_placeholders = 0
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
        elif kind == "video":
            pieces.append(VIDEO_MARKER)
            carried = _video_of(part, where)
            videos += [] if carried is None else [carried]
            video_placeholders += carried is None
        else:
            raise DataError(
                f"{where} is of type {kind!r}, which is not supported: expected text, image or video; leave such records out",
                "part of a turn",
            )
    return Content("".join(pieces), tuple(paths), placeholders, tuple(videos), video_placeholders)


def _video_of(part: dict[str, Any], where: str) -> Any:
    """Gives what a video part carries, if anything."""
    refused = [key for key in (*_REFUSED, "fps", "nframes") if not is_absent(part.get(key))]
    if refused:
        raise DataError(f"{where}: `{refused[0]}` is not supported: prepare.video sets how all videos are shown", "video")
    return None if is_absent(part.get("video")) else part["video"]


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
