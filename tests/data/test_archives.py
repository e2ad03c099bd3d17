"""Tars whose records are found by number, held-out ones beside a stream; and videos in tars and in zips."""

import base64
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import torch
from helpers import random_image
from native_processors import native
from shards import add, png, value_of, write_tars
from tiny_videos import frames, write_frames, write_video

from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data.columns import ColumnNames
from diffvl.data.images import open_image
from diffvl.data.loader import load_data
from diffvl.data.problems import Problem
from diffvl.data.reading import READERS
from diffvl.data.records import Record, RecordReader
from diffvl.data.rows import Part
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import Sample
from diffvl.data.sources import find_source
from diffvl.data.stream import StreamDataset
from diffvl.data.table import open_records
from diffvl.data.videos import open_video, video_size
from diffvl.errors import DataError
from diffvl.hub.clips_diffvl import Sampler

SAMPLER = Sampler(lambda facts: range(0, facts.total_num_frames, 3), 2.0)
ASKED: dict[str, Any] = {"conversations": [{"from": "human", "value": "<video>\nSo?"}, {"from": "gpt", "value": "It turns."}]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_tar(file: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(file, mode) as archive:
        for name, content in members.items():
            add(archive, name, content)
    return file


def by_number(file: Path, **settings: Any) -> list[Record]:
    return list(open_records(find_source(DataSource(path=str(file), **settings)))[:])


def streamed(file: Path, **settings: Any) -> list[Record]:
    source = find_source(DataSource(path=str(file), **settings), streaming=True)
    reader, columns = RecordReader(source.images(), "error"), ColumnNames(source.settings.columns)
    rows = READERS[source.kind](str(file), file.name, columns, True, Part())
    records = [reader.record_or_problem(row, file, number + 1) for number, row in rows]
    assert not [record for record in records if isinstance(record, Problem)], records
    return records  # type: ignore[return-value]


READ: tuple[Callable[..., list[Record]], ...] = (by_number, streamed)

# --- tars by number ----------------------------------------------------------------------------------------------------------


def test_a_held_out_tar_beside_training_tars(tmp_path: Path):
    """It needs no setting: training streams, and what is held out is found by number."""
    pattern, held = write_tars(tmp_path / "train", 2, 3), write_tars(tmp_path / "held", 1, 4).parent / "000.tar"
    settings = Data(train=str(pattern), eval=str(held), streaming=True, max_length=400)
    data = load_data(settings, native("qwen2_vl").processor, None)
    assert isinstance(data.train, StreamDataset) and isinstance(data.held_out, SampleDataset)
    assert [data.held_out.place_of(number) for number in range(4)] == [f"000.tar:{number}" for number in (1, 2, 3, 4)]
    for number in (3, 0, 2):
        (sample,) = data.held_out[number]
        assert isinstance(sample, Sample) and sample.images == 1
        image = open_image(data.held_out.record(number).images[0], "")
        assert image.tobytes() == random_image(number).tobytes()


def test_training_tars_by_number(tmp_path: Path):
    """Several, in the order of their names, each record with its place; the table is made once."""
    pattern = write_tars(tmp_path / "train", 2, 3)
    table = open_records(find_source(DataSource(path=str(pattern))))
    assert [record.source for record in table[:]] == [f"{file}:{place}" for file in ("000.tar", "001.tar") for place in (1, 2, 3)]
    assert [open_image(record.images[0], "").tobytes() for record in table[:]] == [
        random_image(number).tobytes() for number in range(6)
    ]
    assert table.images_exist() and list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("read", READ)
def test_an_image_as_text_in_a_samples_json(read: Callable[..., list[Record]], tmp_path: Path):
    url = f"data:image/png;base64,{base64.b64encode(png(5)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "So?"}]
    spoken = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes."}]}
    file = write_tar(
        tmp_path / "a.tar", {"0.json": json.dumps({**value_of(0), "image": url}).encode(), "1.json": json.dumps(spoken).encode()}
    )
    for record in read(file):
        assert open_image(record.images[0], record.source).tobytes() == random_image(5).tobytes()
    named = write_tar(tmp_path / "b.tar", {"0.spoken.json": json.dumps(spoken["messages"]).encode()})
    (record,) = read(named, columns={"messages": "spoken.json"})
    assert open_image(record.images[0], record.source).tobytes() == random_image(5).tobytes()


@pytest.mark.parametrize(("name", "mode", "program"), [("a.tar.gz", "w:gz", "gunzip"), ("a.tar", "w:xz", "unxz")])
def test_a_packed_tar_has_no_numbers(name: str, mode: str, program: str, tmp_path: Path):
    file = write_tar(tmp_path / name, {"0.json": json.dumps(value_of(0)).encode()}, mode)
    with pytest.raises(DataError, match=rf"{name}: a packed tar is read from front to back only: unpack it \({program}\), or, "):
        by_number(file)
    assert len(streamed(file)) == 1


@pytest.mark.parametrize("end", ("in an image", "in a header"))
def test_a_tar_cut_short(end: str, tmp_path: Path):
    """Though images are stepped over while its records are read."""
    file = write_tars(tmp_path, 1, 3).parent / "000.tar"
    with tarfile.open(file) as archive:
        last = archive.getmembers()[-1]
    file.write_bytes(file.read_bytes()[: last.offset_data + 10 if end == "in an image" else last.offset + 100])
    with pytest.raises(DataError, match=rf"{re.escape(str(file))}:3: the tar is damaged or cut short after its sample 2 "):
        by_number(file)


def test_another_tar_in_its_place(tmp_path: Path):
    file = write_tars(tmp_path, 1, 3).parent / "000.tar"
    first, *_, last = by_number(file)
    write_tar(file, {"0.json": json.dumps(value_of(0)).encode(), "0.txt": b"a" * 5000, "0.png": png(0)})
    for record in (first, last):
        with pytest.raises(DataError, match=rf"{record.source}: image \d+.png in .*000.tar: .* it was another one when the run"):
            open_image(record.images[0], record.source)


# --- videos ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `clip.mp4` and `many/`, its frames."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "clip.mp4", frames(10, 64, 48))
    write_frames(folder / "many", frames(4, 40, 30))
    return folder


def require_shown(record: Record, expected: Sequence[Any]) -> None:
    """The record's videos are these files, or lists of frames, to the bit."""
    assert len(record.videos) == len(expected)
    for video, file in zip(record.videos, expected, strict=True):
        shown, own = open_video(video, record.source, SAMPLER), open_video(file, "", SAMPLER)
        assert shown.size == own.size == video_size(video, record.source, SAMPLER)
        assert torch.equal(shown.frames, own.frames)


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(
    "settings", [{}, {"columns": {"question": "ask", "answer": "txt", "video": "mp4;webm"}}], ids=["JSON", "columns"]
)
def test_videos_in_a_tar(settings: dict[str, Any], read: Callable[..., list[Record]], videos: Path, tmp_path: Path):
    text = {"0.json": json.dumps(ASKED).encode()} if not settings else {"0.ask": b"So?", "0.txt": b"It turns."}
    file = write_tar(tmp_path / "a.tar", {**text, "0.mp4": (videos / "clip.mp4").read_bytes()})
    (record,) = read(file, **settings)
    assert record.turns[0].text == "<video>\nSo?" and record.turns[1].text == "It turns."
    require_shown(record, [str(videos / "clip.mp4")])


@pytest.mark.parametrize("read", READ)
def test_several_videos_and_an_image_in_a_sample(read: Callable[..., list[Record]], videos: Path, tmp_path: Path):
    """In the order in which its JSON names them."""
    other = write_video(tmp_path / "other.mp4", frames(7, 32, 48, 1))
    turns = [{"from": "human", "value": "<video>, <image> or <video>?"}, {"from": "gpt", "value": "All."}]
    record = {"videos": ["0.b.mp4", "0.a.mp4"], "image": "x/0.png", "conversations": turns}
    members = {"0.a.mp4": (videos / "clip.mp4").read_bytes(), "0.b.mp4": other.read_bytes(), "0.png": png(3)}
    file = write_tar(tmp_path / "a.tar", {"0.json": json.dumps(record).encode(), **members})
    (found,) = read(file)
    require_shown(found, [str(other), str(videos / "clip.mp4")])
    assert open_image(found.images[0], "").tobytes() == random_image(3).tobytes()


def in_zip(videos: Path, folder: Path, *named: Any) -> list[Record | Problem]:
    """Records that show what is named so, in a zip of the folder."""
    with zipfile.ZipFile(folder / "videos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in videos.rglob("*.*"):
            archive.write(file, f"all/{file.relative_to(videos)}")
    (folder / "data.json").write_text(json.dumps([{**ASKED, "video": one} for one in named]), encoding="utf-8")
    source = find_source(DataSource(path=str(folder / "data.json"), image_folder=str(folder / "videos.zip" / "all")))
    table = open_records(source, Data(on_error="skip", max_skipped=0.99))
    assert table.images_exist()
    return [*(table[int(number)] for number in table.usable), *table.problems]


def test_videos_in_a_zip(videos: Path, tmp_path: Path):
    """Files and lists of frames."""
    listed = [f"many/frame_{number}.png" for number in (0, 2, 3)]
    file, shown = in_zip(videos, tmp_path, "clip.mp4", listed)
    assert isinstance(file, Record) and isinstance(shown, Record)
    require_shown(file, [str(videos / "clip.mp4")])
    require_shown(shown, [tuple(str(videos / name) for name in listed)])


def test_videos_that_are_not_in_a_zip(videos: Path, tmp_path: Path):
    _, *wrong = in_zip(videos, tmp_path, "clip.mp4", "none.mp4", "../clip.mp4", "../../clip.mp4", "many", ["many/none.png"])
    assert all(isinstance(one, Problem) for one in wrong)
    says = [
        r"data.json:1: video not found: all/none.mp4 in .*videos.zip \(relative paths start at data.image_folder",
        r"data.json:1: video not found: clip.mp4 in .*videos.zip",
        r"data.json:1: video ../../clip.mp4 is outside of .*videos.zip, in which videos are looked for",
        r"data.json:1: video not found: all/many in .*; of a folder of frames in a zip, list the frames\)",
        r"data.json:1: image not found: all/many/none.png in .*videos.zip",
    ]
    for one, text in zip(wrong, says, strict=True):
        assert re.search(text, str(one)), one


@pytest.mark.parametrize("read", READ)
def test_a_damaged_video_is_told_with_its_place(read: Callable[..., list[Record]], videos: Path, tmp_path: Path):
    members = {"0.mp4": (videos / "clip.mp4").read_bytes()[:600], "1.mp4": b"no video"}
    texts = {f"{number}.json": json.dumps(ASKED).encode() for number in range(2)}
    file = write_tar(tmp_path / "a.tar", {name: (members | texts)[name] for name in sorted(members | texts)})
    for number, record in enumerate(read(file)):
        with pytest.raises(DataError, match=rf"^a.tar:{number + 1}: the video '.*a.tar' cannot be read \("):
            open_video(record.videos[0], record.source, SAMPLER)


def test_a_zip_that_is_gone_is_told_with_the_record(videos: Path, tmp_path: Path):
    (record,) = in_zip(videos, tmp_path, "clip.mp4")
    assert isinstance(record, Record)
    (tmp_path / "videos.zip").unlink()
    with pytest.raises(DataError, match=r"data.json:1.*: video all/clip.mp4 in .*videos.zip does not exist"):
        open_video(record.videos[0], record.source, SAMPLER)
