"""A data file as a table: what is remembered of it and by what, the records that are left out, and all problems in one go."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from tiny_runs import record, write_data

from diffvl.config.recipe import Data
from diffvl.data import images, table
from diffvl.data.images import ExistingFiles
from diffvl.data.records import Record
from diffvl.data.table import open_records
from diffvl.errors import DataError

TEXT = record(image=None, question="What?")
SKIP = Data(on_error="skip", max_skipped=0.5)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are parsed from now on."""
    seen: list[Path] = []
    parse = table.parse_source
    monkeypatch.setattr(table, "parse_source", lambda source, *how: (seen.append(source.path), parse(source, *how))[1])
    return seen


def refused(path: Path, data: Data | None = None) -> str:
    with pytest.raises(DataError) as caught:
        open_records(path, data)
    return str(caught.value)


# --- what is remembered ----------------------------------------------------------------------------------------------------


def test_a_file_is_known_by_its_bytes(tmp_path: Path, parsed: list[Path]):
    path = write_data(tmp_path, record(), record(answer="Blue."))
    first = open_records(path)
    os.utime(path, (1, 1))
    assert open_records(path)[1] == first[1]
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    open_records(path)
    assert parsed == [path]
    path.write_bytes(content.replace(b"Blue.", b"Pink."))
    assert open_records(path)[1].turns[-1].text == "Pink."


def test_a_moved_set_has_the_same_content(tmp_path: Path):
    """Though its images have other absolute paths, and its file another name and another layout."""
    path = write_data(tmp_path, {**record(), "id": "a"}, record(answer="Blue."))
    other = tmp_path / "moved" / "renamed.jsonl"
    other.parent.mkdir()
    shutil.copy(tmp_path / "good.png", other.parent)
    other.write_text("".join(json.dumps(value) + "\n" for value in json.loads(path.read_text())))
    here, there = open_records(path), open_records(other)
    assert here.content == there.content and here[0].images != there[0].images
    other.write_text(other.read_text().replace("Blue", "Pink"))
    assert here.content != open_records(other).content


def test_a_table_travels_to_a_process_that_is_not_forked(tmp_path: Path):
    there = pickle.loads(pickle.dumps(open_records(write_data(tmp_path, record(), record()))))
    assert there[1].source == "data.json:3" and len(there) == 2


def test_an_image_that_comes_back_is_found(tmp_path: Path):
    path = write_data(tmp_path, record(), TEXT)
    image = (tmp_path / "good.png").read_bytes()
    assert len(open_records(path).usable) == 2
    (tmp_path / "good.png").unlink()
    assert open_records(path, look=False).usable.tolist() == [0, 1]
    assert open_records(path, SKIP).usable.tolist() == [1]
    (tmp_path / "good.png").write_bytes(image)
    assert open_records(path, SKIP, look=False).usable.tolist() == [1]
    assert open_records(path, SKIP).usable.tolist() == [0, 1]


# --- images that lie elsewhere -------------------------------------------------------------------------------------------


def test_images_of_another_folder(tmp_path: Path):
    path = write_data(tmp_path, record())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "good.png").rename(elsewhere / "good.png")
    assert "image file not found" in refused(path)
    assert open_records(path, Data(image_folder=str(elsewhere)))[0].images == (str(elsewhere / "good.png"),)


def test_many_images_of_a_folder_are_looked_for_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [str(tmp_path / f"{number}.png") for number in range(100)]
    for name in names[1:]:
        Path(name).touch()
    (tmp_path / "link.png").symlink_to(names[5])
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    asked: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(images.os.path, "isfile", lambda name: (asked.append(name), isfile(name))[1])
    there = ExistingFiles()
    assert [name for name in names if name not in there] == names[:1]
    assert len(asked) < 10
    odd = [str(tmp_path / name) for name in ("link.png", "lost.png", "folder.png", "sub/none.png")]
    assert [name in there for name in odd] == [True, False, False, False]


# --- problems --------------------------------------------------------------------------------------------------------------


def test_a_record_left_out_keeps_its_number(tmp_path: Path):
    path = write_data(tmp_path, record(answer=""), record(answer="Red."), record(image="none.png"), record(answer="Blue."))
    opened = open_records(path, SKIP)
    assert len(opened) == 4 and opened.usable.tolist() == [1, 3]
    assert [opened[int(row)].turns[-1].text for row in opened.usable] == ["Red.", "Blue."]
    assert [(problem.number, problem.line) for problem in opened.problems] == [(1, 2), (3, 4)]
    assert (opened.digests == 0).tolist() == [True, False, True, False]


def test_more_than_may_be_skipped(tmp_path: Path):
    path = write_data(tmp_path, record(answer=""), record(), record())
    message = refused(path, Data(on_error="skip"))
    assert f"{path}:2: turn 2: empty answer" in message
    assert "1 of 3 records cannot be used (33.33%), more than data.max_skipped=0.01 lets pass" in message
    assert "no record is left" in refused(write_data(tmp_path, record(answer="")), Data(on_error="skip", max_skipped=1.0))


BROKEN = {
    "list": ("data.json", '[{"conversations": []}, {oops}]'),
    "cut short": ("data.json", "[" + ", ".join([json.dumps(TEXT)] * 3)),
    "not UTF-8": ("data.jsonl", json.dumps(TEXT) + "\n\xff\n"),
}


@pytest.mark.parametrize(("name", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_what_hides_the_rest_of_a_file_cannot_be_skipped(name: str, text: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    message = refused(path, Data(on_error="skip", max_skipped=1.0))
    assert "malformed JSON" in message or "not UTF-8" in message
    assert "on_error" not in message


def test_a_malformed_line_can_be_skipped(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(TEXT) + "\n{oops\n" + json.dumps(TEXT) + "\n")
    assert open_records(path, SKIP).usable.tolist() == [0, 2]
    assert refused(path).endswith("set data.on_error=skip to leave such records out, up to data.max_skipped of them")


def test_problems_are_counted_by_kind_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    kinds = {"none.png": "image missing", "": "empty answer"}

    def parse(*source: Any) -> Any:
        for item in whole(*source):
            yield item if isinstance(item, Record) else table.Problem(kinds[odd[item.number - 1]], *list(vars(item).values())[1:])

    odd = ["none.png"] * 7 + [""] * 2
    whole = table.parse_source
    monkeypatch.setattr(table, "parse_source", parse)
    bad = [record(image=name) if name else record(answer="") for name in odd]
    path = tmp_path / "one-line.json"
    write_data(tmp_path)
    path.write_text(json.dumps([{**value, "id": f"r{number}"} for number, value in enumerate(bad)]))
    lines = refused(path).split("\n")
    assert lines[0] == f"{path}: 9 problems"
    assert [line for line in lines if not line.startswith("    ")][1:3] == ["  image missing: 7", "  empty answer: 2"]
    assert [line.rpartition(" (")[2] for line in lines[2:5]] == [f"record {n + 1}, id 'r{n}')" for n in range(3)]
    assert lines[5] == "    and 4 more"
    listed = Path(lines[-2].removeprefix("all of them: "))
    assert cache in listed.parents
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["record"] for row in rows] == list(range(1, 10)) and rows[0]["file"] == str(path)
    assert {row["kind"] for row in rows} == set(kinds.values())
