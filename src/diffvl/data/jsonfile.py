"""Data file -> its objects, each with the line it starts in: `.json` (one list of objects) and `.jsonl` (one object per line).

Both are read as a stream, so memory does not grow with the file, and time grows linearly with it. A `.json` list is read
element by element: that is how an error in record 400,000 of a one-line file or of a pretty-printed one still names its line.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from diffvl.data.filekind import KIND, check_bytes, check_lines, not_a_list, unknown_suffix
from diffvl.errors import DataError, first_line

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
    """Gives (line, value) of every object in the file; the value is a DataError, with its place, where there is no object to
    read, and with `ends` where nothing after it can be read.

    Raises:
        DataError: for a file of another kind than its name says.
    """
    is_list = path.suffix.lower() == ".json"
    read = _read_list if is_list else _read_lines
    try:
        check_bytes(path)
        if not is_list:
            _check_lines(path)
        with path.open(encoding="utf-8-sig") as file:
            for line, value in read(file, path):
                if isinstance(value, DataError) and is_list:
                    value.ends = True  # after a broken element of a list nothing more can be placed
                yield line, value
    except UnicodeDecodeError:
        line = _undecodable_line(path)
        yield line, DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8", "not UTF-8", ends=True)
    except OSError as error:
        yield 0, DataError(f"{path}: cannot be read ({error.strerror})", "file cannot be read", ends=True)


def _check_lines(path: Path) -> None:
    with path.open(encoding="utf-8-sig") as file:
        first_line = next((line for line in file if line.strip()), "")
    with path.open(encoding="utf-8-sig") as file:
        check_lines(_Cursor(file), path, first_line)


def _undecodable_line(path: Path) -> int:
    """Finds the line, from 1: the text reader decodes in chunks and does not know the line it stopped at."""
    with path.open("rb") as file:
        return next(number for number, line in enumerate(file, 1) if line.decode("utf-8", "ignore").encode() != line)


def _read_lines(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            value = _malformed(path, line, error.colno, error.msg)
        except (ValueError, RecursionError) as error:
            value = _too_large(path, line, error)
        yield line, value


def _read_list(file: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Gives the elements of one JSON list, one in memory at a time. After malformed JSON nothing more can be placed: it ends."""
    cursor = _Cursor(file)
    first = cursor.peek()
    if not first:
        return
    if first != "[":
        raise not_a_list(cursor, path)
    cursor.skip()
    mark = cursor.peek()
    while mark != "]":
        line = cursor.line
        try:
            value = cursor.value()
        except json.JSONDecodeError as error:
            yield line, _malformed(path, *cursor.place(error.pos), error.msg)
            return
        except (ValueError, RecursionError) as error:
            yield line, _too_large(path, line, error)
            return
        yield line, value
        mark = cursor.peek()
        if mark == ",":
            cursor.skip()
            cursor.peek()
        elif mark != "]":
            message = f"expected ',' or ']' after the record of line {line}"
            yield line, _malformed(path, *cursor.place(), message if mark else f"{message}, the file ends here")
            return
    cursor.skip()
    if cursor.peek():
        yield cursor.line, _malformed(path, *cursor.place(), "more text after the list's closing ']'")


def _malformed(path: Path, line: int, column: int, message: str) -> DataError:
    return DataError(f"{path}:{line}: malformed JSON at column {column}: {message}", MALFORMED)


def _too_large(path: Path, line: int, error: Exception) -> DataError:
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
