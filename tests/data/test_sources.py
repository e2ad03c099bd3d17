"""One set of records in every form that is read: the same turns and pixels come out, and mistakes are told with file and row."""

import base64
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import random_image

from diffvl.config.sources import DataSource
from diffvl.data.columns import ColumnNames
from diffvl.data.images import image_size, open_image
from diffvl.data.problems import Problem
from diffvl.data.reading import READERS
from diffvl.data.records import Record, RecordReader
from diffvl.data.rows import Part
from diffvl.data.sources import find_source
from diffvl.data.table import open_records

NUM = 7
TEXT_ONLY = 3  # the number, from 0, of a record without an image
Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    random_image(number).save(buffer, format="PNG")
    return buffer.getvalue()


def turns(number: int, key: str = "from") -> list[dict[str, str]]:
    names = ("from", "value", "human", "gpt") if key == "from" else ("role", "content", "user", "assistant")
    return [{names[0]: names[2], names[1]: f"What is {number}?"}, {names[0]: names[3], names[1]: f"It is {number}."}]


def rows(image: Callable[[int], Any], key: str = "conversations") -> Rows:
    """The records, with images as the form has them; one has none."""
    form = "from" if key == "conversations" else "role"
    made = [{"id": f"r{number}", "image": image(number), key: turns(number, form)} for number in range(NUM)]
    made[TEXT_ONLY]["image"] = None
    return made


# --- the forms -----------------------------------------------------------------------------------------------------------


def files(folder: Path) -> DataSource:
    (folder / "sub").mkdir()
    for number in range(NUM):
        (folder / "sub" / f"{number}.png").write_bytes(png(number))
    (folder / "data.json").write_text(json.dumps(rows(lambda number: f"sub/{number}.png")))
    return DataSource(path=str(folder / "data.json"))


def zipped(folder: Path) -> DataSource:
    source = files(folder)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(NUM):
            pack = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.write(folder / "sub" / f"{number}.png", f"all/sub/{number}.png", pack)
    shutil.rmtree(folder / "sub")
    return source.model_copy(update={"image_folder": str(folder / "images.zip" / "all")})


def url_of(number: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(number)).decode()}"


def data_urls(folder: Path) -> DataSource:
    lines = [json.dumps({"id": "ü", **row}, ensure_ascii=False) for row in rows(url_of)]
    (folder / "data.jsonl").write_text("\ufeff" + "\r\n".join([*lines[:2], "", *lines[2:]]) + "\r\n", newline="")
    return DataSource(path=str(folder / "data.jsonl"))


def openai_parts(folder: Path) -> DataSource:
    made = rows(url_of, "messages")
    for row in made:
        url, question = row.pop("image"), row["messages"][0]
        parts = [{"type": "text", "text": f"\n{question['content']}"}]
        if url is not None:
            row["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": url}}, *parts]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, made)))
    return DataSource(path=str(folder / "data.jsonl"))


def struct(number: int) -> dict[str, Any]:
    return {"bytes": png(number), "path": f"{number}.png"}


def parquet(folder: Path) -> DataSource:
    pq.write_table(pa.Table.from_pylist(rows(struct)), folder / "data.parquet", row_group_size=3)
    return DataSource(path=str(folder / "data.parquet"))


def plain_bytes(folder: Path) -> DataSource:
    table = pa.Table.from_pylist([{"jpg": row.pop("image"), "extra": b"x", **row} for row in rows(png)])
    pq.write_table(table, folder / "data.parquet", row_group_size=3)
    return DataSource(path=str(folder / "data.parquet"), columns={"image": "jpg", "conversations": "conversations", "id": "id"})


def lists(folder: Path) -> DataSource:
    """Lists of images and pairs of texts, as in the_cauldron and FineVision."""
    made = []
    for row in rows(struct, "messages"):
        image, (question, answer) = row.pop("image"), row.pop("messages")
        pair = {"user": question["content"], "assistant": answer["content"], "source": "x"}
        made.append({"key": row["id"], "images": [image] if image else [], "texts": [pair]})
    pq.write_table(pa.Table.from_pylist(made), folder / "data.parquet", row_group_size=3)
    return DataSource(path=str(folder / "data.parquet"), columns={"images": "images", "messages": "texts", "id": "key"})


def features() -> datasets.Features:
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    return datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(), "conversations": [turn]})


def saved(folder: Path) -> DataSource:
    made = [{**row, "image": random_image(number) if row["image"] else None} for number, row in enumerate(rows(struct))]
    datasets.Dataset.from_list(made, features=features()).save_to_disk(str(folder / "saved"), num_shards=2)
    return DataSource(path=str(folder / "saved"))


def saved_parts(folder: Path) -> DataSource:
    whole = datasets.Dataset.from_list(rows(struct), features=features())
    datasets.DatasetDict({"train": whole.select(range(2)), "held": whole}).save_to_disk(str(folder / "parts"))
    return DataSource(path=str(folder / "parts"), split="held")


def hub_folder(folder: Path) -> DataSource:
    (folder / "set" / "data").mkdir(parents=True)
    whole = datasets.Dataset.from_list(rows(struct), features=features())
    for number, (start, stop) in enumerate(((0, 3), (3, NUM))):
        whole.select(range(start, stop)).to_parquet(folder / "set" / "data" / f"train-{number:05}-of-00002.parquet")
    whole.select(range(2)).to_parquet(folder / "set" / "data" / "test-00000-of-00001.parquet")
    return DataSource(path=str(folder / "set"))


def shards(folder: Path) -> DataSource:
    for number, (start, stop) in enumerate(((0, 3), (3, NUM))):
        pq.write_table(pa.Table.from_pylist(rows(struct)[start:stop]), folder / f"part-{number:03}.parquet")
    return DataSource(path=str(folder / "part-{000..001}.parquet"))


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tars(folder: Path, mode: Any = "w") -> DataSource:
    made = rows(lambda number: f"{number}.png")
    for shard, (start, stop) in enumerate(((0, 3), (3, NUM))):
        with tarfile.open(folder / f"{shard:02}.tar", mode) as archive:
            for number in range(start, stop):
                if made[number]["image"] is not None:
                    add(archive, f"a.b/{number}.PNG", png(number))
                add(archive, f"a.b/{number}.json", json.dumps(made[number]).encode())
    return DataSource(path=str(folder / "*.tar"))


def captions(folder: Path) -> DataSource:
    with tarfile.open(folder / "captions.tar.gz", "w:gz") as archive:
        for number in range(NUM):
            add(archive, f"{number:05}.cls", b"7")
            add(archive, f"{number:05}.jpg" if number % 2 else f"{number:05}.png", png(number))
            add(archive, f"{number:05}.txt", f"It is {number}.".encode())
    return DataSource(path=str(folder / "captions.tar.gz"), columns={"image": "jpg;png", "answer": "txt"})


NUMBERED = (files, zipped, tars, data_urls, openai_parts, parquet, plain_bytes, lists, saved, saved_parts, hub_folder, shards)
STREAMED = (captions,)


def check(record: Record | Problem, number: int, asked: str | None = None) -> None:
    assert isinstance(record, Record), record
    question, answer = (turn.text for turn in record.turns)
    shown = number != TEXT_ONLY or asked is not None
    assert answer == f"It is {number}."
    assert question == ("<image>\n" if shown else "") + (f"What is {number}?" if asked is None else asked)
    assert len(record.images) == shown
    if shown:
        image = open_image(record.images[0], record.source)
        assert image.tobytes() == random_image(number).tobytes() and image_size(record.images[0], "") == (40, 40)


@pytest.mark.parametrize("make", NUMBERED)
def test_forms_that_are_addressed_by_number(make: Callable[[Path], DataSource], tmp_path: Path) -> None:
    source = find_source(make(tmp_path))
    table = open_records(source)
    assert len(table) == NUM and (make is not files) == any("://" in image for record in table[:] for image in record.images)
    for number in (NUM - 1, *range(NUM)):
        check(pickle.loads(pickle.dumps(table))[number], number)
    assert {record.id for record in table[:]} == {f"r{number}" for number in range(NUM)} or make is data_urls
    again = open_records(source)
    assert again.content == table.content


@pytest.mark.parametrize("make", (*NUMBERED, *STREAMED))
def test_forms_as_streams(make: Callable[[Path], DataSource], tmp_path: Path) -> None:
    """From any row on, and in shares; images come with their bytes."""
    source = find_source(make(tmp_path), streaming=True)
    reader, columns = RecordReader(source.images(), "error"), ColumnNames(source.settings.columns)
    expected = 0
    for place, file in enumerate(source.files):
        read = lambda part, file=file, place=place: [  # noqa: E731
            (number, reader.record_or_problem(row, source.path, number + 1))
            for number, row in READERS[source.kind](file, source.name_of(place), columns, True, part)
        ]
        whole = read(Part())
        assert [number for number, _ in whole] == list(range(len(whole)))
        assert read(Part(start=2)) == whole[2:]
        assert sorted((*read(Part(0, 0, 2)), *read(Part(0, 1, 2))), key=lambda pair: pair[0]) == whole
        for _, record in whole:
            check(record, expected, "" if make is captions else None)
            expected += 1
    assert expected == NUM
    shutil.rmtree(tmp_path / "sub", ignore_errors=True)


def test_the_same_records_have_the_same_digests_in_every_form(tmp_path: Path) -> None:
    contents = {}
    for make in (files, zipped, parquet, shards, hub_folder):
        (tmp_path / make.__name__).mkdir()
        contents[make.__name__] = open_records(find_source(make(tmp_path / make.__name__))).content
    assert contents["files"] == contents["zipped"]
    assert contents["parquet"] == contents["shards"] == contents["hub_folder"]
