"""Sizes of images from the heads of their files, and samples of models whose image tokens follow from these."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import trained_on
from native_processors import image, native
from PIL import Image
from rich.console import Console
from shared_fixtures import TILED, Loaded

from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data import images
from diffvl.data.images import image_size, open_image
from diffvl.data.loader import load_data
from diffvl.data.packing import lengths_of
from diffvl.data.problems import Problem
from diffvl.data.records import iterate_records
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import Sample, collate, encode_record, sample_of
from diffvl.data.sources import find_source
from diffvl.data.table import RecordTables
from diffvl.demo.standin_processors import PROCESSORS
from diffvl.errors import DataError
from diffvl.hub.seen_diffvl import size_as_seen
from diffvl.prepare.tiling import with_tiling

ORIENTATION = 0x0112
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "gif": "GIF", "bmp": "BMP", "ppm": "PPM", "ico": "ICO"}


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def late_exif(path: Path, orientation: int) -> None:
    """Writes a PNG file whose orientation stands behind its pixels, as it may."""
    file = io.BytesIO()
    image(40, 60).save(file, "PNG")
    content = file.getvalue()
    body = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + body
    end = content.rindex(b"IEND") - 4
    written = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:end] + written + content[end:])


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 8])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_head_says_what_is_seen(suffix: str, orientation: int | None, tmp_path: Path):
    path = tmp_path / f"a.{suffix}"
    settings: dict[str, Any] = {"exif": exif(orientation)} if orientation and suffix in ("jpg", "png", "webp", "tif") else {}
    image(40, 60).save(path, FORMATS[suffix], **settings)
    seen = open_image(str(path), "x")
    assert image_size(str(path), "x") == (seen.height, seen.width)
    assert (seen.height > seen.width) == (bool(settings) and orientation in (5, 6, 8))
    assert size_as_seen(seen) == (seen.height, seen.width), "it turns no second time"


def test_a_head_that_does_not_say_all(tmp_path: Path):
    late_exif(tmp_path / "late.png", 6)
    seen = open_image(str(tmp_path / "late.png"), "x")
    assert image_size(str(tmp_path / "late.png"), "x") == (seen.height, seen.width) == (60, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_nothing_is_decoded_for_a_size(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image(40, 60).save(tmp_path / f"a.{suffix}", FORMATS[suffix], exif=exif(6))

    def fail(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(images, "as_seen", fail)
    assert image_size(str(tmp_path / f"a.{suffix}"), "x") == (60, 40)


def test_files_that_have_no_size(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="f:3: image .*a.png cannot be read"):
        image_size(str(tmp_path / "a.png"), "f:3")
    with pytest.raises(DataError, match="f:3: image .*b.png does not exist"):
        image_size(str(tmp_path / "b.png"), "f:3")


# --- records of native models ------------------------------------------------------------------------------------------------

SHAPES = ((90, 120), (140, 64), (56, 56), (30, 41))


def data_file(folder: Path) -> Path:
    """Records with one image, two in two turns, one used twice, and none."""
    for number, (height, width) in enumerate(SHAPES):
        image(height, width, number).save(folder / f"{number}.png")

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]

    records = [
        {"image": "0.png", "conversations": turns("<image>\nWhat?", "This.")},
        {"image": ["1.png", "2.png"], "conversations": turns("See <image> now.", "Yes.", "And\n<image>", "Too.")},
        {"image": ["3.png", "3.png"], "conversations": turns("<image><image>Same?", "It is.")},
        {"conversations": turns("Hi", "Hello.")},
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", PROCESSORS)
def test_samples(family: str, tmp_path: Path):
    """Their tokens are counted from heads alone, and are those of the decoded images; a batch has the images in order."""
    given = native(family)
    records = list(iterate_records(data_file(tmp_path)))
    samples = []
    for index, record in enumerate(records):
        sample = sample_of(record, index, given.processor)
        assert sample.ids == encode_record(record, given.processor).ids
        assert sorted(sample.pixels or {}) == (given.facts.image_inputs if record.images else [])
        samples.append(sample)
    batch = collate([samples[:2], samples[2:]], pad_token_id=0)
    assert sorted(batch["pixels"]) == given.facts.image_inputs
    expected = given.processor.pixels([open_image(path, "x") for record in records for path in record.images])
    assert all(torch.equal(batch["pixels"][name], expected[name]) for name in expected)
    assert "pixels" not in collate([[samples[3]]], pad_token_id=0)


def test_samples_in_tiles(loaded: Callable[[str], Loaded], tmp_path: Path):
    """Of a tower of ours: an image alone in its question has tiles, in a later turn too; two in one are one view each. Rows and
    packed lengths follow from the heads of the files."""
    model, processor = loaded(TILED)
    path = data_file(tmp_path)
    records = list(iterate_records(path))
    samples = [sample_of(record, index, processor) for index, record in enumerate(records)]
    assert [sample.ids for sample in samples] == [encode_record(record, processor).ids for record in records]
    pixels = collate([samples], pad_token_id=0)["pixels"]
    assert processor.tiles is not None
    views = [processor.tiles.views(size) for size in SHAPES[:3]]
    assert pixels["num_tiles"].tolist() == [*views, 1, 1] and min(views) > 2
    assert pixels["image_sizes"].tolist() == [list(SHAPES[number]) for number in (0, 1, 2, 3, 3)]
    shown = sum(sample.ids.count(processor.image_token_id) for sample in samples)
    assert model.images.encode(pixels).total == shown
    data = Data(train=str(path), max_length=512, row_length=512)
    rows = load_data(data, processor, None).train
    assert (
        isinstance(rows, SampleDataset)
        and rows.lengths is not None
        and rows.lengths.tolist() == [len(sample.ids) for sample in samples]
    )
    other = with_tiling(processor, {"grids": [[1, 1]], "max_tiles": 1})
    smaller = load_data(data, other, None).train
    assert (
        isinstance(smaller, SampleDataset) and smaller.lengths is not None and smaller.lengths.tolist() != rows.lengths.tolist()
    )


def test_one_look_at_each_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = list(iterate_records(data_file(tmp_path)))[2]
    looked = []
    monkeypatch.setattr("diffvl.data.samples.image_size", lambda path, source: looked.append(path) or image_size(path, source))
    encode_record(record, native("llava").processor)
    assert len(looked) == 1


def test_what_does_not_fit_is_told_by_file_and_line(tmp_path: Path):
    """Before anything is decoded; also an image that the processor refuses."""
    path = data_file(tmp_path)
    image(5, 2000).save(tmp_path / "1.png")
    given = native("qwen2_vl")
    records = list(iterate_records(path))
    length = len(encode_record(records[0], given.processor).ids)
    with pytest.raises(DataError, match=f"data.jsonl:1: {length} tokens, images included, where at most {length - 1}"):
        sample_of(records[0], 0, given.processor, length - 1)
    with pytest.raises(DataError, match=r"data.jsonl:2: record .*: Qwen2VLProcessor refuses an image of 2000x5 pixels") as caught:
        encode_record(records[1], given.processor)
    assert caught.value.kind == images.UNREADABLE
    dataset = SampleDataset(records, path, torch.arange(4).numpy(), given.processor, 512)
    assert [type(one) for row in range(4) for one in dataset[row]] == [Sample, Problem, Sample, Sample]
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    with pytest.raises(DataError, match="data.jsonl:1: image .*0.png cannot be read"):
        sample_of(records[0], 0, given.processor)


def test_a_head_that_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = next(iterate_records(data_file(tmp_path)))
    monkeypatch.setattr("diffvl.data.samples.image_size", lambda *_: (56, 56))
    with pytest.raises(DataError, match="data.jsonl:1: an image has other sizes in its head and in its pixels: save it anew"):
        sample_of(record, 0, native("qwen2_vl").processor)


def test_rows_are_packed_by_these_lengths(tmp_path: Path):
    """What is remembered of them depends on how images are resized."""
    path = data_file(tmp_path)
    data = Data(train=str(path), max_length=512, row_length=512)
    given = native("qwen3_vl")
    rows = trained_on(load_data(data, given.processor, None))
    records = list(iterate_records(path))
    assert rows.lengths is not None
    assert rows.lengths.tolist() == [len(encode_record(record, given.processor).ids) for record in records]
    table = RecordTables().open(find_source(DataSource(path=str(path))), data)
    size = given.processor.image_processor.size
    try:
        given.processor.image_processor.size = type(size)(shortest_edge=56 * 56, longest_edge=56 * 56)
        given.processor.images._by_size.clear()  # type: ignore[union-attr]
        smaller = lengths_of(table, given.processor, Console(quiet=True)).tolist()
    finally:
        given.processor.image_processor.size = size
        given.processor.images._by_size.clear()  # type: ignore[union-attr]
    assert smaller != rows.lengths.tolist()
