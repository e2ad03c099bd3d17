"""Images and videos that are no files of their own -> their bytes: a member of a zip or a tar, a cell of a table, a `data:` URL
in a line of JSON.

A record names such an image by a reference, `KIND://[FILE, PLACE, STEP, ...]` (the bracket is JSON): the file, the place in it
(member, row, or the byte at which a line begins), and the steps from there to the image. (Of a member of a tar the first two
steps are where its content begins and how long that is.) So a table of records holds no image, and any process finds any image
without having seen the others. In a stream the bytes are there already: `Held` carries them.
"""

import base64
import binascii
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

from diffvl.data.cells import Stamp, arrow_cell, parquet_cell, stamp_of
from diffvl.data.problems import IMAGE_MISSING, UNREADABLE
from diffvl.data.tarfiles import read_content
from diffvl.data.zipfiles import read_member
from diffvl.errors import DataError

Kind = Literal["zip", "tar", "parquet", "arrow", "jsonl"]
DATA_URL = "data:"
_REFERENCE = re.compile(r"(zip|tar|parquet|arrow|jsonl)://(\[.*\])", re.DOTALL)
_MOST_SHOWN = 60  # characters of a `data:` URL in a message


class Reference(str):
    """The name of an image that is no file. A string, because all other images are named by their paths; a class of its own,
    because no text of a user's may be taken for one."""

    __slots__ = ()


class Held(Reference):
    """A reference with the image's bytes."""

    __slots__ = ("data",)
    data: bytes

    def __new__(cls, name: str, data: bytes) -> "Held":
        held = super().__new__(cls, name)
        held.data = data
        return held

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, (str(self), self.data)


def refer(kind: Kind, file: str, place: str | int, *steps: str | int) -> Reference:
    """Names an image inside a file."""
    return Reference(f"{kind}://{json.dumps([file, place, *steps])}")


def parts_of(name: str) -> tuple[Kind, str, Any, list[Any]] | None:
    """Gives (kind, file, place, steps) of a reference, None for the path of a file."""
    found = _REFERENCE.fullmatch(name)
    if found is None:
        return None
    try:
        file, place, *steps = json.loads(found[2])
    except ValueError:
        return None
    return found[1], file, place, steps  # type: ignore[return-value]


def shown(name: str) -> str:
    """Gives an image's name as messages tell it."""
    parts = parts_of(name)
    if parts is None:
        return (
            name
            if len(name) <= _MOST_SHOWN or not name.startswith(DATA_URL)
            else f"{name[:_MOST_SHOWN]}... ({len(name)} characters)"
        )
    kind, file, place, steps = parts
    if kind in ("zip", "tar"):
        return f"{place} in {file}"
    where = " ".join(str(step) for step in steps)
    return f"{where} in {file}" if kind == "jsonl" else f"{where} of row {place + 1} in {file}"


def portable(name: str, images_below: str) -> str:
    """Gives an image's name as it stays when the data set is moved, or its images are unpacked."""
    parts = parts_of(name)
    if parts is None:
        return name.removeprefix(images_below)
    kind, file, place, steps = parts
    if kind == "zip":
        return f"{file}/{place}".removeprefix(images_below)
    return "/".join(map(str, [place, *steps[2:]] if kind == "tar" else steps))


def is_there(name: str) -> bool:
    """Tells whether an image that is no file is still there, as far as its file's name tells."""
    parts = parts_of(name)
    return parts is not None and os.path.isfile(parts[1])


class _Content(io.BytesIO):
    """Bytes, with the name that messages call them by."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def file_of(name: str) -> str | io.BytesIO:
    """Gives what the bytes of an image or a video can be read from.

    Raises:
        DataError: without the record's place, if a reference leads nowhere. OSError: as `open`.
    """
    if isinstance(name, Held):
        return _Content(name.data, shown(name))
    parts = parts_of(name)
    if parts is None:
        return name
    return _Content(_bytes_at(*parts), shown(name))


def _bytes_at(kind: Kind, file: str, place: Any, steps: list[Any]) -> bytes:
    if kind == "zip":
        return read_member(file, place)
    if kind == "tar":
        content = read_content(file, place, *steps[:2])
        return bytes_of(_step_to(json.loads(content), steps[2:])) if steps[2:] else content
    return bytes_of(_step_to(_ROWS[kind](file, place, steps[0]), steps[1:]))


# --- a row -> the image in it --------------------------------------------------------------------------------------------


def _line_cell(file: str, offset: int, column: str) -> Any:
    return _cell_of_line(file, stamp_of(file), offset, column)


@lru_cache(maxsize=1)  # a record's images are asked for one after the other
def _cell_of_line(file: str, _: Stamp, offset: int, column: str) -> Any:
    with open(file, "rb") as lines:
        lines.seek(offset)
        try:
            return json.loads(lines.readline())[column]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is not the file any more that it was when the run began", UNREADABLE) from error


_ROWS: dict[str, Callable[[str, Any, str], Any]] = {"jsonl": _line_cell, "parquet": parquet_cell, "arrow": arrow_cell}


def _step_to(value: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        value = json.loads(value) if isinstance(value, str) else value  # a column can hold its turns as JSON
        value = value[step]
    return value


def bytes_of(image: Any) -> bytes:
    """Gives the bytes of an image that stands in a row. Raises DataError if there are none."""
    if isinstance(image, dict) and image.get("bytes") is None and os.path.isabs(image.get("path") or ""):
        with open(image["path"], "rb") as file:
            return file.read()
    data = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        return decode_url(data)
    named = f"; it names {image['path']}, write its bytes into the column" if isinstance(image, dict) and image["path"] else ""
    raise DataError(f"no bytes stand there{named}", IMAGE_MISSING)


def require_url(url: str) -> str:
    """Gives the base64 of a `data:` URL. Raises DataError if it is none of an image."""
    head, comma, text = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise DataError(f"expected an image as data:image/...;base64,... got {head[:_MOST_SHOWN]}", UNREADABLE)
    return text


def decode_url(url: str) -> bytes:
    """Gives the bytes of a `data:` URL. Raises DataError if it is none of an image, or damaged."""
    text = require_url(url)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"its base64 is damaged ({error})", UNREADABLE) from error
