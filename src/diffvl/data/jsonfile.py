"""Data file -> its objects, each with the line it starts in: `.json` (one list of objects) and `.jsonl` (one object per line).

Both are read as a stream, so memory does not grow with the file, and time grows linearly with it. A `.json` list is read
element by element: that is how an error in record 400,000 of a one-line file or of a pretty-printed one still names its line.

A file that is not what its name says (packed, a table, a web page, a list named `.jsonl`, lines named `.json`, records inside an
object) is told in one message, with what to do, in place of one problem for every line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from diffvl.errors import DataError, first_line

KIND = "kind of file"
TURNS = ("conversations", "messages")

_HEAD = 4096  # bytes looked at
_UNPACK = "is packed: unpack it, and name the .json or .jsonl file in it"
_TABLE = "is a table: write its rows into a .jsonl file, one object per line, and its images into files"
_RENAME = "has one object per line, it seems: name it .jsonl"
_BY_SUFFIX = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), _UNPACK),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".csv", ".tsv", ".xlsx"), _TABLE),
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl", ".ldjson"), _RENAME),
}
_MAGIC = (
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"7z\xbc\xaf"), _UNPACK),
    ((b"PAR1", b"ARROW1"), _TABLE),
    ((b"version https://git-lfs",), "is a pointer to a file that Git LFS keeps: fetch the file itself (git lfs pull)"),
    ((b"<",), "is a web page or XML, not JSON: it may be an answer to a failed download"),
    ((b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"), "is UTF-16 or UTF-32 text: save the file as UTF-8"),
)


class Reader(Protocol):
    """A place in a JSON text (jsonfile's cursor)."""

    line: int

    def peek(self) -> str: ...
    def skip(self) -> None: ...
    def value(self) -> Any: ...


def unknown_suffix(path: Path) -> DataError:
    """Tells why a file of this name is not read."""
    suffix = path.suffix.lower()
    expected = "expected .json (one list) or .jsonl (one object per line)"
    advice = f"; it {_BY_SUFFIX[suffix]}" if suffix in _BY_SUFFIX else ""
    return DataError(f"{path}: unknown kind of data file {path.suffix!r}; {expected}{advice}", KIND)


def check_bytes(path: Path) -> None:
    """Raises DataError where a file's first bytes are not those of UTF-8 JSON; an empty file passes."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for starts, meaning in _MAGIC:
        if head.startswith(starts) or start.startswith(starts):
            raise DataError(f"{path}: {meaning}", KIND)
    if b"\0" in head:
        raise DataError(f"{path}: is no UTF-8 text (it holds zero bytes): save the file as UTF-8 JSON", KIND)


def not_a_list(reader: Reader, path: Path) -> DataError:
    """Tells what a `.json` file is that begins with something else than `[`; the reader stands there."""
    line, first = reader.line, reader.peek()
    if first != "{":
        return DataError(f"{path}:{line}: expected a list of objects, [...], at the top, got {first!r}", KIND)
    found, keys = _read_object(reader)
    if found is None:
        following = reader.peek()
        if following in ("{", ","):
            one_line = reader.line == line + 1 or reader.line == line
            found = (
                f"holds one object per line: name it {path.stem}.jsonl"
                if following == "{" and one_line
                else "holds objects one after the other: put them into one list, [..., ...], with commas between them"
            )
        elif any(key in TURNS for key in keys):
            found = "holds one record alone: put [ and ] around it"
        else:
            told = ", ".join(f"`{key}`" for key in keys[:5]) or "no keys"
            found = f"expected a list of objects, [...], at the top, got an object with {told}"
    return DataError(f"{path}:{line}: {found}", KIND)


def check_lines(reader: Reader, path: Path, first_line: str) -> None:
    """Raises DataError where a `.jsonl` file does not have one object in each line; the reader stands at its start. What is
    wrong with single lines is told by who reads them."""
    first = reader.peek()
    line = reader.line
    found = None
    if first == "[":
        found = _read_list_start(reader, path)
    elif first == "{":
        text = first_line.rstrip()
        if _is_json(text):
            found = None if any(name in json.loads(text) for name in TURNS) else _read_object(reader)[0]
        elif text.endswith(",") and _is_json(text[:-1]):
            found = "its lines end with a comma, as in a list: remove the commas, or put [ and ] around all and name it .json"
        elif _whole_value(reader):
            found = (
                "holds objects of several lines each; .jsonl has one object per line: join each into one line, or put all into "
                "one list, [..., ...], and name it .json"
            )
    if found is not None:
        raise DataError(f"{path}:{line}: {found}", KIND)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _whole_value(reader: Reader) -> bool:
    """Tells whether a whole object stands here, in however many lines."""
    try:
        reader.value()
    except (ValueError, RecursionError):
        return False
    return True


def _read_list_start(reader: Reader, path: Path) -> str | None:
    """Tells what a `.jsonl` file is that begins with a list."""
    reader.skip()
    if reader.peek() == "]":
        return None
    try:
        item = reader.value()
    except (ValueError, RecursionError):
        return f"holds one list: name it {path.stem}.json" if reader.line > 1 else None
    if isinstance(item, dict) and (("role" in item and "content" in item) or ("from" in item and "value" in item)):
        form = "messages" if "role" in item else "conversations"
        return f"each line is a list of turns: write it as an object, {{{json.dumps(form)}: [...]}}"
    return f"holds one list: name it {path.stem}.json"


def _read_object(reader: Reader) -> tuple[str | None, list[str]]:
    """Tells what an object is that is no record, None if it may be one (then it is read to its end); and its keys so far."""
    keys: list[str] = []
    reader.skip()
    try:
        while reader.peek() not in ("}", ""):
            key = reader.value()
            keys.append(str(key))
            if reader.peek() != ":":
                return None, keys
            reader.skip()
            found = _judge_value(reader, keys)
            if found is not None:
                return found, keys
            if reader.peek() == ",":
                reader.skip()
    except (ValueError, RecursionError):
        return None, keys
    reader.skip()
    return None, keys


def _judge_value(reader: Reader, keys: list[str]) -> str | None:
    """Tells what the object is by one of its values, the reader standing before it; None if that says nothing, then it is
    read."""
    key = keys[-1]
    if reader.peek() == "[" and key not in TURNS and not any(name in keys for name in TURNS):
        # Not read as a whole: it may be the whole file.
        reader.skip()
        while reader.peek() not in ("]", ""):
            item = reader.value()
            if isinstance(item, dict) and any(name in item for name in TURNS):
                return f"the records stand in a list under `{key}`: write that list alone, [...]"
            if reader.peek() == ",":
                reader.skip()
        reader.skip()
        return None
    value = reader.value()
    if len(keys) == 1 and isinstance(value, dict) and any(isinstance(value.get(name), list) for name in TURNS):
        return f"holds an object whose values are the records (the first is `{key}`): write them as a list, [..., ...]"
    if key in TURNS and (isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], list))):
        return "holds columns, not records: write a list of objects, one for each record"
    return None


MALFORMED = "malformed JSON"
_SUFFIXES = (".json", ".jsonl")
_CHUNK = 1 << 20  # characters read at a time from a .json file
_TAIL = 64  # characters; no escape and no literal is longer


def check_path(path: Path) -> None:
    """Raises DataError unless `path` is a file of a kind that `read_objects` knows."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a data file in it ({' or '.join(_SUFFIXES)})", KIND)
    if not path.exists():
        raise DataError(f"{path}: no such data file", KIND)
    if path.suffix.lower() not in _SUFFIXES:
        raise unknown_suffix(path)


def read_objects(path: Path) -> Iterator[tuple[int, Any]]:
    """Gives (line, value) of every object in the file, as `read_places`."""
    return ((line, value) for line, _, value in read_places(path))


def read_places(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Gives (line, place, value) of every object in the file; the value is a DataError, with its place, where there is no object
    to read, and with `ends` where nothing after it can be read. The place is the byte at which the line begins, in a `.json` list
    nothing that leads anywhere.

    Raises:
        DataError: for a file of another kind than its name says.
    """
    is_list = path.suffix.lower() == ".json"
    try:
        check_bytes(path)
        if not is_list:
            _check_lines(path)
        with path.open(encoding="utf-8-sig", newline=None if is_list else "") as file:
            yield from read_stream(file, str(path), is_list)
    except UnicodeDecodeError:
        line = _undecodable_line(path)
        yield line, 0, DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8", "not UTF-8", ends=True)
    except OSError as error:
        yield 0, 0, DataError(f"{path}: cannot be read ({error.strerror})", "file cannot be read", ends=True)


def read_stream(file: TextIO, path: str, is_list: bool) -> Iterator[tuple[int, int, Any]]:
    """Gives what `read_places` does of an open file, with lines as they are (newline="") where it is no list."""
    for line, place, value in (_read_list if is_list else _read_lines)(file, path):
        if isinstance(value, DataError) and is_list:
            value.ends = True  # after a broken element of a list nothing more can be placed
        yield line, place, value


def _check_lines(path: Path) -> None:
    with path.open(encoding="utf-8-sig") as file:
        first_line = next((line for line in file if line.strip()), "")
    with path.open(encoding="utf-8-sig") as file:
        check_lines(_Cursor(file), path, first_line)


def _undecodable_line(path: Path) -> int:
    """Finds the line, from 1: the text reader decodes in chunks and does not know the line it stopped at."""
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if line.decode("utf-8", "ignore").encode() != line)


_MARK = len(b"\xef\xbb\xbf")  # of UTF-8, which the reader of text has taken away


def _read_lines(file: TextIO, path: str) -> Iterator[tuple[int, int, Any]]:
    place, end = 0, _MARK if file.encoding == "utf-8-sig" and _has_mark(file) else 0
    for line, text in enumerate(file, 1):
        place, end = end, end + (len(text) if text.isascii() else len(text.encode()))
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            value = _malformed(path, line, error.colno, error.msg)
        except (ValueError, RecursionError) as error:
            value = _too_large(path, line, error)
        yield line, place, value


def _has_mark(file: TextIO) -> bool:
    """Tells whether a file that can be read twice begins with the mark of UTF-8; the reader stands at its beginning then."""
    buffer = getattr(file, "buffer", None)
    if buffer is None or not buffer.seekable():
        return False
    head = buffer.read(_MARK)
    file.seek(0)
    return head == b"\xef\xbb\xbf"


def _read_list(file: TextIO, path: str) -> Iterator[tuple[int, int, Any]]:
    """Gives the elements of one JSON list, one in memory at a time. After malformed JSON nothing more can be placed: it ends."""
    cursor = _Cursor(file)
    first = cursor.peek()
    if not first:
        return
    if first != "[":
        raise not_a_list(cursor, Path(path))
    cursor.skip()
    mark = cursor.peek()
    while mark != "]":
        line = cursor.line
        try:
            value = cursor.value()
        except json.JSONDecodeError as error:
            yield line, 0, _malformed(path, *cursor.place(error.pos), error.msg)
            return
        except (ValueError, RecursionError) as error:
            yield line, 0, _too_large(path, line, error)
            return
        yield line, 0, value
        mark = cursor.peek()
        if mark == ",":
            cursor.skip()
            cursor.peek()
        elif mark != "]":
            message = f"expected ',' or ']' after the record of line {line}"
            yield line, 0, _malformed(path, *cursor.place(), message if mark else f"{message}, the file ends here")
            return
    cursor.skip()
    if cursor.peek():
        yield cursor.line, 0, _malformed(path, *cursor.place(), "more text after the list's closing ']'")


def _malformed(path: str, line: int, column: int, message: str) -> DataError:
    return DataError(f"{path}:{line}: malformed JSON at column {column}: {message}", MALFORMED)


def _too_large(path: str, line: int, error: Exception) -> DataError:
    """Names JSON that Python does not read: thousands of brackets in one another, a number of thousands of digits."""
    return DataError(f"{path}:{line}: JSON that cannot be read: {first_line(error)}", MALFORMED)


class _Cursor:
    """A place in a JSON text of any length, with its line. Holds one chunk, or one value where that is longer."""

    _DECODER = json.JSONDecoder()
    _SPACE = re.compile(r"[ \t\n\r]*")

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._position = 0  # in _text
        self._line_start = 0  # in _text; negative where the line began before it
        self.line = 1

    def peek(self) -> str:
        """Steps over white space; gives the character there, '' at the end of the file."""
        while True:
            space = self._SPACE.match(self._text, self._position)
            assert space is not None
            self._advance(space.end())
            if self._position < len(self._text) or not self._fill():
                return self._text[self._position : self._position + 1]

    def skip(self) -> None:
        """Steps over the character that `peek` gave."""
        self._advance(self._position + 1)

    def value(self) -> Any:
        """Reads one JSON value. Raises JSONDecodeError, whose position `place` understands."""
        while True:
            try:
                value, end = self._DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # A value cut by the chunk's end fails close to that end, or at the start of the string that is cut.
                cut = error.msg.startswith("Unterminated string") or len(self._text) - error.pos < _TAIL
                if not cut or not self._fill():
                    raise
                continue
            if len(self._text) - end >= _TAIL or not self._fill():  # a number may go on: "-12." reads as -12
                self._advance(end)
                return value

    def place(self, position: int | None = None) -> tuple[int, int]:
        """Gives (line, column), both from 1, of a position in the text held; steps to it."""
        self._advance(self._position if position is None else position)
        return self.line, self._position - self._line_start + 1

    def _advance(self, position: int) -> None:
        num_newlines = self._text.count("\n", self._position, position)
        if num_newlines:
            self.line += num_newlines
            self._line_start = self._text.rindex("\n", self._position, position) + 1
        self._position = position

    def _fill(self) -> bool:
        """Drops what was read and reads on; False at the end. Doubles what it holds, so a long value costs linear time."""
        rest = len(self._text) - self._position
        chunk = self._file.read(max(_CHUNK, rest))
        if chunk:
            self._text = self._text[self._position :] + chunk
            self._line_start -= self._position
            self._position = 0
        return bool(chunk)
