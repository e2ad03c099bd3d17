"""A data file that is not what its name says is told as what it is: one message with what to do, whatever its length."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffvl.data.jsonfile import check_path, read_objects
from diffvl.errors import DataError

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
ONE: dict[str, Any] = {"id": 1, "conversations": TURNS}
LINE = json.dumps(ONE)
PRETTY = json.dumps(ONE, indent=2)
MANY = json.dumps([ONE] * 30)

FILES: dict[str, tuple[str, str | bytes, str]] = {
    "lines": (".json", f"{LINE}\n{LINE}\n", ":1: holds one object per line: name it train.jsonl"),
    "lines after blank ones": (".json", f"\n\n{LINE}\n{LINE}\n", ":3: holds one object per line: name it train.jsonl"),
    "pretty objects": (
        ".json",
        f"{PRETTY}\n{PRETTY}\n",
        ":1: holds objects one after the other: put them into one list, [..., ...]",
    ),
    "objects and commas": (".json", f"{LINE},\n{LINE}\n", ":1: holds objects one after the other: put them into one list"),
    "one record": (".json", PRETTY, ":1: holds one record alone: put [ and ] around it"),
    "one record with lists": (".json", json.dumps({"objects": [{"x": 1}], **ONE}), ":1: holds one record alone"),
    "records by name": (
        ".json",
        json.dumps({"0": ONE, "1": ONE}),
        ":1: holds an object whose values are the records (the first is `0`)",
    ),
    "wrapper": (".json", json.dumps({"version": 1, "data": [ONE] * 30}), ":1: the records stand in a list under `data`"),
    "columns": (".json", json.dumps({"conversations": [TURNS, TURNS]}), ":1: holds columns, not records"),
    "columns by row": (".json", json.dumps({"id": {"0": 1}, "conversations": {"0": TURNS}}), ":1: holds columns, not records"),
    "other object": (
        ".json",
        '{"a": [1, {"b": 2}], "c": 2}',
        ":1: expected a list of objects, [...], at the top, got an object with `a`, `c`",
    ),
    "no object": (".json", '"text"', ":1: expected a list of objects, [...], at the top, got '\"'"),
    "csv": (".json", "id,image\n1,a.png\n", ":1: expected a list of objects, [...], at the top, got 'i'"),
    "list": (".jsonl", MANY, ":1: holds one list: name it train.json"),
    "pretty list": (".jsonl", json.dumps([ONE] * 30, indent=1), ":1: holds one list: name it train.json"),
    "lines of lists": (
        ".jsonl",
        f"{json.dumps(TURNS)}\n" * 30,
        ':1: each line is a list of turns: write it as an object, {"conversations"',
    ),
    "pretty objects in lines": (
        ".jsonl",
        f"{PRETTY}\n" * 30,
        ":1: holds objects of several lines each; .jsonl has one object per line",
    ),
    "commas": (".jsonl", f"{LINE},\n" * 30, ":1: its lines end with a comma, as in a list"),
    "wrapper in a line": (".jsonl", json.dumps({"data": [ONE] * 30}), ":1: the records stand in a list under `data`"),
    "gzip": (".jsonl", b"\x1f\x8b\x08\x00 anything", ": is packed: unpack it"),
    "zip": (".json", b"PK\x03\x04 anything", ": is packed: unpack it"),
    "parquet": (".json", b"PAR1 anything", ": is a table: write its rows into a .jsonl file"),
    "pointer": (".json", "version https://git-lfs\noid sha256:0\n", ": is a pointer to a file that Git LFS keeps"),
    "web page": (".json", "\n<!DOCTYPE html><html>", ": is a web page or XML, not JSON"),
    "utf-16": (".json", MANY.encode("utf-16"), ": is UTF-16 or UTF-32 text: save the file as UTF-8"),
    "utf-16 without its mark": (".json", MANY.encode("utf-16-le"), ": is no UTF-8 text (it holds zero bytes)"),
}


@pytest.mark.parametrize(("suffix", "content", "says"), FILES.values(), ids=FILES)
def test_files_of_another_kind(suffix: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        list(read_objects(path))
    assert str(caught.value).startswith(f"{path}{says}")
    assert "\n" not in str(caught.value) and caught.value.kind == "kind of file"


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".jsonl", f"{LINE}\r\n{LINE}\r\n".encode()),
        (".json", f"\r\n[\r\n{LINE},\r\n{LINE}]".encode()),
        (".json", b"\xef\xbb\xbf" + json.dumps([ONE, ONE]).encode()),
        (".jsonl", b"\xef\xbb\xbf" + f"{LINE}\n{LINE}".encode()),
        (".jsonl", f"{LINE}\n".encode() * 2),
        (".JSON", json.dumps([ONE, ONE]).encode()),
        (".JSONL", f"{LINE}\n{LINE}".encode()),
    ],
)
def test_files_that_only_look_unusual(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(content)
    check_path(path)
    assert [value for _, value in read_objects(path)] == [ONE, ONE]


def test_a_record_with_objects_in_it_is_a_record(tmp_path: Path) -> None:
    value = {"meta": {"messages": [1]}, "drafts": [{"messages": []}], **ONE}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(value))
    assert list(read_objects(path)) == [(1, value)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a.json.gz", "it is packed: unpack it"),
        ("a.zip", "it is packed: unpack it"),
        ("a.parquet", "it is a table: write its rows into a .jsonl file"),
        ("a.tsv", "it is a table"),
        (
            "a.csv",
            "a.csv: unknown kind of data file '.csv'; expected .json (one list) or .jsonl (one object per line); it is a table: "
            "write its rows into a .jsonl file, one object per line, and its images into files",
        ),
        ("a.ndjson", "it has one object per line, it seems: name it .jsonl"),
        ("a.yaml", "expected .json (one list) or .jsonl (one object per line)"),
    ],
)
def test_names_of_another_kind(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        check_path(tmp_path / name)
    assert says in str(caught.value) and caught.value.kind == "kind of file"


def test_what_ends_a_file_is_marked(tmp_path: Path) -> None:
    """After a broken element of a list nothing can be placed; a broken line is one record."""
    path = tmp_path / "train.json"
    path.write_text(f"[{LINE},\n{{oops}},\n{LINE}]")
    *_, (_, error) = read_objects(path)
    assert isinstance(error, DataError) and error.ends and error.kind == "malformed JSON"
    path = tmp_path / "train.jsonl"
    path.write_text(f"{LINE}\n{{oops}}\n{LINE}\n")
    _, (_, error), (_, last) = read_objects(path)
    assert isinstance(error, DataError) and not error.ends and last == ONE
    path.write_bytes(f"{LINE}\n".encode() * 2000 + b"\xe4\n")
    *_, (_, error) = read_objects(path)
    assert isinstance(error, DataError) and error.ends and error.kind == "not UTF-8"
