"""Data file -> `Record`: the first arrow of training. Everything that can be known without a tokenizer or a decoded image
is checked here, up front, so that a run does not stop hours later at one bad line.

Two file kinds: `.json` holds one list of objects, `.jsonl` one object per line. An object looks like LLaVA's

    {"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}

or like a chat request: `"messages": [{"role": "user", "content": ...}, ...]`. `image` is a path, a list of paths, or absent;
`images` means the same. Paths are relative to the data file's folder. Other keys are allowed and left out.

`<image>` in a user's text marks where an image stands, in the order of the record's images. LLaVA's habit is kept: a record
with images and no marker at all gets one marker per image, each followed by a newline, before the first user text.

Invariant: a `Record` has as many markers as images, all in user turns; its turns are user, assistant, user, assistant ...
after an optional system turn; no answer is empty; every image file existed when the file was read.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffvl.data.files import Files
from diffvl.data.jsonfile import check_path, read_objects
from diffvl.data.problems import Problem
from diffvl.errors import DataError

IMAGE_MARKER = "<image>"

Role = Literal["system", "user", "assistant"]

# key of the turns -> (key of the speaker, key of the text, speaker -> role)
_FORMS: dict[str, tuple[str, str, dict[str, Role]]] = {
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"}),
    "messages": ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"}),
}
_SPEAKERS: dict[Role, str] = {"system": "system", "user": "user (human)", "assistant": "assistant (gpt)"}


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One conversation. `images` are absolute paths; `source` is where it stands in its file, e.g. "train.json:12"."""

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    source: str


def iterate_records(path: Path, image_folder: str | None = None) -> Iterator[Record]:
    """The file's records in order, read as they are asked for. Raises DataError at the first problem."""
    for item in parse_file(path, image_folder):
        if isinstance(item, Problem):
            raise item.error()
        yield item


# --- file -> records -----------------------------------------------------------------------------------------------------


def parse_file(path: Path, image_folder: str | None = None) -> Iterator[Record | Problem]:
    """Every record of the file, or in its place what is wrong with it. Relative pictures start at `image_folder`, by default
    the file's folder."""
    check_path(path)
    folder = os.path.abspath(image_folder or os.path.dirname(path))
    files = Files()
    number = 0
    for number, (line, value) in enumerate(read_objects(path), 1):
        try:
            if isinstance(value, DataError):
                raise value
            yield _parse_record(value, folder, f"{path.name}:{line}", files)
        except DataError as error:
            name = value.get("id") if isinstance(value, dict) else None
            message = str(error).removeprefix(f"{path}:{line}: ")
            yield Problem(error.kind, path, line, number, None if name is None else str(name), message, error.ends)
    if not number:
        raise DataError(f"{path}: no records in it; expected at least one object with `conversations`")


# --- object -> Record ----------------------------------------------------------------------------------------------------


def _parse_record(value: Any, folder: str, source: str, files: Files) -> Record:
    """Raises DataError without the place, which the caller knows."""
    if not isinstance(value, dict):
        raise DataError(f"expected an object with `conversations`, got {_kind(value)}")
    name = value.get("id")
    if name is None:
        name = source
    elif isinstance(name, bool) or not isinstance(name, int | str):
        raise DataError(f"`id` must be a string or a whole number, got {_kind(name)}")
    turns = _parse_turns(value)
    _check_order(turns)
    images = tuple(os.path.join(folder, image) for image in _parse_images(value))
    turns = _place_markers(turns, len(images))
    for image in images:
        if image not in files:
            raise DataError(f"image file not found: {image} (relative paths start at the data file's folder)")
    return Record(_text(str(name), "`id`"), images, turns, source)


def _parse_turns(value: dict[str, Any]) -> tuple[Turn, ...]:
    forms = [form for form in _FORMS if value.get(form) is not None]
    if not forms:
        raise DataError("no `conversations` (nor `messages`): expected a list of turns, {from: human or gpt, value: text}")
    if len(forms) > 1:
        raise DataError("both `conversations` and `messages`: keep one of them")
    form = forms[0]
    speaker_key, text_key, roles = _FORMS[form]
    items = value[form]
    if not isinstance(items, list) or not items:
        raise DataError(f"`{form}` must be a list of turns with at least one in it, got {_kind(items)}")
    turns = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or speaker_key not in item or text_key not in item:
            raise DataError(f"turn {number}: expected an object with `{speaker_key}` and `{text_key}`")
        speaker = item[speaker_key]
        if not isinstance(speaker, str) or speaker not in roles:
            raise DataError(f"turn {number}: unknown role {speaker!r}; expected one of {', '.join(roles)}")
        turns.append(Turn(roles[speaker], _text(item[text_key], f"turn {number}: `{text_key}`")))
    return tuple(turns)


def _check_order(turns: tuple[Turn, ...]) -> None:
    spoken = turns[1:] if turns[0].role == "system" else turns
    first = len(turns) - len(spoken) + 1
    if not spoken or spoken[0].role != "user":
        got = f"is from {_SPEAKERS[spoken[0].role]}" if spoken else "is missing"
        raise DataError(f"turn {first} {got}: after an optional system turn the first must be from user (human)")
    for number, turn in enumerate(spoken):
        expected: Role = "assistant" if number % 2 else "user"
        if turn.role != expected:
            where, got, want = f"turn {first + number}", _SPEAKERS[turn.role], _SPEAKERS[expected]
            raise DataError(f"{where} is from {got}, expected {want}: user and assistant must alternate")
        if turn.role == "assistant" and not turn.text.strip():
            raise DataError(f"turn {first + number}: empty answer; fill it or remove the record")
    if spoken[-1].role != "assistant":
        got, want = _SPEAKERS[spoken[-1].role], _SPEAKERS["assistant"]
        raise DataError(f"turn {len(turns)}, the last, is from {got}, expected an answer from {want}")


def _parse_images(value: dict[str, Any]) -> list[str]:
    keys = [key for key in ("image", "images") if value.get(key) is not None]
    if len(keys) > 1:
        raise DataError("both `image` and `images`: keep one of them")
    if not keys:
        return []
    images = value[keys[0]]
    images = images if isinstance(images, list) else [images]
    for image in images:
        if not isinstance(image, str) or not image:
            got = "an empty string" if image == "" else _kind(image)
            raise DataError(f"`{keys[0]}` must be a path or a list of paths, got {got}")
    return [_text(image, f"`{keys[0]}`") for image in images]


def _place_markers(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    """Checks the image markers; adds them where the record has images and not one marker."""
    for number, turn in enumerate(turns, 1):
        if turn.role != "user" and IMAGE_MARKER in turn.text:
            raise DataError(f"turn {number}: {IMAGE_MARKER} in a turn of {_SPEAKERS[turn.role]}; images stand in user turns only")
    num_markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if num_markers == num_images:
        return turns
    if num_markers:
        more = "more" if num_markers > num_images else "fewer"
        counts = f"{num_markers} in the text, {num_images} in the record"
        raise DataError(f"{more} {IMAGE_MARKER} than images: {counts}; each image needs one marker")
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    marked = Turn("user", f"{IMAGE_MARKER}\n" * num_images + turns[first].text)
    return (*turns[:first], marked, *turns[first + 1 :])


def _text(value: Any, what: str) -> str:
    """`value` if it is text that UTF-8 can hold: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    if not isinstance(value, str):
        raise DataError(f"{what} must be a string, got {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{what} holds half of a surrogate pair, {value[error.start]!r}: not valid text") from error
    return value


def _kind(value: Any) -> str:
    """A JSON value's kind in words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", str: "a string"}.get(type(value), "a number")
