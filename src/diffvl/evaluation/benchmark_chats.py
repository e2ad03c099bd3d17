"""A question of a benchmark, as lmms-eval hands it over -> the chat that a checkpoint answers.

Images in front of a text get a line each, as in training data and in `diffvl generate`; the others stand where the task puts
them.
"""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from diffvl.data.content import count_markers
from diffvl.data.images import open_image
from diffvl.decode.answer import Message, user_message
from diffvl.errors import DataError, UsageError
from diffvl.hub.seen_diffvl import as_seen

EXPECTED = "expected text, images and, for a checkpoint that takes them, videos"


def chat_of_text(text: str, visuals: Sequence[Any] | None, place: str) -> list[Message]:
    """The chat of a task's plain form: a text, and what is shown with it. `<image>` in the text marks where images stand, if
    there is one for each; without, they stand before it.

    Args:
        place: which question it is, for messages.
    """
    shown = [_part_of_visual(visual, place) for visual in visuals or ()]
    if shown and all(part["type"] == "image" for part in shown) and count_markers(text) == len(shown):
        return [user_message(text, [part["image"] for part in shown])]
    return [{"role": "user", "content": _with_lines([*shown, {"type": "text", "text": text}])}]


def chat_of_messages(messages: Iterable[Mapping[str, Any]], place: str) -> list[Message]:
    """The chat of a task's own messages: dicts of role and content, whose parts carry images and videos as `url`."""
    chat = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part, place) for part in content]
        chat.append({"role": message["role"], "content": _with_lines(parts) if message["role"] == "user" else parts})
    return chat


def _part(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": _image(part.get("url"), place)}
    if kind == "video" and isinstance(part.get("url"), str) and part.get("start_time") is None and part.get("end_time") is None:
        return {"type": "video", "video": part["url"]}
    raise UsageError(f"{place} shows a part of the type {kind!r} that cannot be shown here; {EXPECTED}")


def _part_of_visual(visual: Any, place: str) -> dict[str, Any]:
    """What stands in the list of a task's visuals: an image, the path of one, or the path of a video."""
    if isinstance(visual, str) and Path(visual).suffix.lower() not in Image.registered_extensions():
        return {"type": "video", "video": visual}
    return {"type": "image", "image": _image(visual, place)}


def _image(visual: Any, place: str) -> Image.Image:
    """Opens an image. Raises DataError, or UsageError for something that is none."""
    if isinstance(visual, str):
        return open_image(visual, place)
    encoded = visual.get("bytes") if isinstance(visual, Mapping) else visual
    try:
        if isinstance(encoded, Image.Image):
            return as_seen(encoded)
        if isinstance(encoded, bytes):
            return as_seen(Image.open(BytesIO(encoded)))
    except UnidentifiedImageError as error:  # its words hold the address of an object, another one each time
        raise DataError(f"{place}: an image cannot be read (of no format that is known here)") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: an image cannot be read ({error})") from error
    raise UsageError(f"{place} shows something of the type {type(visual).__name__}; {EXPECTED}")


def _with_lines(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts with a line break behind each image or video in front of the first text."""
    lined: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if part["type"] == "text":
            text = part["text"]
            breaks = bool(lined) and not text.startswith("\n")
            return [*lined, {"type": "text", "text": f"\n{text}" if breaks else text}, *parts[number + 1 :]]
        lined += [part] if not lined else [{"type": "text", "text": "\n"}, part]
    return lined
