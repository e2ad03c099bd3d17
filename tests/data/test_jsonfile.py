"""Files -> objects with their lines: places are right, pieces of any size give the same, nothing is held longer than needed."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffvl.data import jsonfile
from diffvl.data.jsonfile import check_path, read_objects
from diffvl.errors import DataError

ONE = '{"id": 1}'


def written(folder: Path, suffix: str, text: str) -> Path:
    path = folder / f"train{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path) -> list[str]:
    """What `read_objects` gives in place of objects."""
    return [str(value) for _, value in read_objects(path) if isinstance(value, DataError)]


@pytest.fixture
def cursors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cursors that were made, to see what they hold."""
    made: list[Any] = []
    create = jsonfile._Cursor.__init__

    def spy(cursor: Any, file: Any) -> None:
        made.append(cursor)
        create(cursor, file)

    monkeypatch.setattr(jsonfile._Cursor, "__init__", spy)
    return made


# --- lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep.json", "deep.jsonl", "long.json", "long.jsonl"])
def test_json_that_python_does_not_read(name: str, tmp_path: Path):
    """Brackets in one another by the thousand, and a number of as many digits: a message with the line, no traceback."""
    value = "[" * 100_000 if name.startswith("deep") else '{"id": ' + "9" * 5000 + "}"
    path = tmp_path / name
    path.write_text(f"[{value}]" if path.suffix == ".json" else f'{{"id": 1}}\n{value}\n', encoding="utf-8")
    *_, (line, found) = read_objects(path)
    assert isinstance(found, DataError) and f"{name}:{line}: JSON that cannot be read: " in str(found)
    assert line == (1 if path.suffix == ".json" else 2)


def test_pretty_printed_list_names_the_line_of_each_object(tmp_path: Path) -> None:
    objects = [{"id": number, "x": ["a", {}]} for number in range(3)]
    path = written(tmp_path, ".json", "\ufeff" + json.dumps(objects, indent=2))
    starts = [number for number, line in enumerate(path.read_text().splitlines(), 1) if line == "  {"]
    assert len(starts) == 3
    assert list(read_objects(path)) == list(zip(starts, objects, strict=True))


def test_several_objects_in_one_line(tmp_path: Path) -> None:
    assert list(read_objects(written(tmp_path, ".json", "[1, 2,\n3]"))) == [(1, 1), (1, 2), (2, 3)]


def test_blank_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    assert list(read_objects(written(tmp_path, ".jsonl", f"\n{ONE}\r\n\n  \n{ONE}"))) == [(2, {"id": 1}), (5, {"id": 1})]


# --- pieces --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("end", [None, -1, -30, -150])
def test_pieces_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, end: int | None
) -> None:
    objects = [{"id": number, "text": 'q\n"\\\u00fc\U0001f600' * number, "x": [-1.5e-7, None, True]} for number in range(9)]
    numbers = [-12.5 * 10**number for number in range(12)]
    path = written(tmp_path, ".json", json.dumps([*numbers, *objects, *numbers], indent=indent)[:end])
    expected = [(line, str(value)) for line, value in read_objects(path)]
    assert len(expected) >= 20
    monkeypatch.setattr(jsonfile, "_CHUNK", chunk)
    assert [(line, str(value)) for line, value in read_objects(path)] == expected


def test_one_piece_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cursors: list[Any]) -> None:
    path = written(tmp_path, ".json", "[" + f"{ONE},\n" * 2000 + f"{ONE}]")
    monkeypatch.setattr(jsonfile, "_CHUNK", 1000)
    held = []
    for line, _ in read_objects(path):
        held.append(len(cursors[0]._text))
        assert line == len(held)
    assert len(held) == 2001
    assert held[0] == 1000
    assert max(held) < 2000


def test_malformed_json_is_told_without_reading_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cursors: list[Any]) -> None:
    path = written(tmp_path, ".json", f"[{ONE},\n{{oops}},\n" + f"{ONE},\n" * 2000 + "]")
    monkeypatch.setattr(jsonfile, "_CHUNK", 1000)
    assert refused(path)[0].startswith(f"{path}:2: malformed JSON at column 2: Expecting property name")
    assert len(cursors[0]._text) < 2000


# --- what is refused -----------------------------------------------------------------------------------------------------

BAD_FILES = {
    "jsonl, malformed": (".jsonl", f'{ONE}\n\n{{"id" 1}}\n', ":3: malformed JSON at column 7: Expecting ':' delimiter"),
    "jsonl, cut": (".jsonl", f'{ONE}\n{{"id": "a', ":2: malformed JSON at column 8: Unterminated string starting at"),
    "json, malformed": (".json", f'[\n{ONE},\n{{"id": 1,\n  "x": }}]', ":4: malformed JSON at column 8: Expecting value"),
    "json, cut in an object": (
        ".json",
        f'[{ONE},\n  {{"id": "a',
        ":2: malformed JSON at column 10: Unterminated string starting at",
    ),
    "json, cut after an object": (
        ".json",
        f"[\n{ONE}\n",
        ":3: malformed JSON at column 1: expected ',' or ']' after the record of line 2, the file ends here",
    ),
    "json, no comma": (
        ".json",
        f"[\n{ONE}\n {ONE}]",
        ":3: malformed JSON at column 2: expected ',' or ']' after the record of line 2",
    ),
    "json, comma at the end": (".json", f"[\n{ONE},\n]", ":3: malformed JSON at column 1: Expecting value"),
    "json, only opened": (".json", "[", ":1: malformed JSON at column 2: Expecting value"),
    "json, text after the list": (
        ".json",
        f"[{ONE}]\n\n x",
        ":3: malformed JSON at column 2: more text after the list's closing ']'",
    ),
}


@pytest.mark.parametrize(("suffix", "text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_refused_with_line_and_column(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    path = written(tmp_path, suffix, text)
    assert refused(path) == [f"{path}{message}"]


@pytest.mark.parametrize(("suffix", "before"), [(".json", "[" + f"{ONE},\n" * 3000), (".jsonl", f"{ONE}\n" * 3000)])
def test_other_encodings_are_refused_with_their_line(tmp_path: Path, suffix: str, before: str) -> None:
    path = tmp_path / f"train{suffix}"
    path.write_bytes(before.encode() + b'{"id": "B\xe4r"}')
    assert refused(path) == [f"{path}:3001: not UTF-8 text; save the file as UTF-8"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.json", "no.json: no such data file"),
        ("", ": is a folder; name a data file in it (.json or .jsonl)"),
    ],
)
def test_path_that_is_no_data_file(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_path(tmp_path / name)
    assert str(caught.value).endswith(message)
    assert str(caught.value).startswith(str(tmp_path))
