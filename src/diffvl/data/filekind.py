"""What a data file is, where it is not what its name says: packed, a table, a web page, a list named `.jsonl`, lines named
`.json`, records inside an object. One message says so and what to do, in place of one problem for every line."""

import json
from pathlib import Path
from typing import Any, Protocol

from diffvl.errors import DataError

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
