"""Streams: every record once an epoch, an exact position, windows, and what a file that breaks off does."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets.config
import fsspec
import pytest
from shards import add, png, value_of, write_tars
from shared_fixtures import Loaded

from diffvl.config.recipe import Data
from diffvl.config.sources import DataSource
from diffvl.data.fingerprint import data_record, require_same_data, write_data_record
from diffvl.data.left_out import LeftOut
from diffvl.data.loader import load_data
from diffvl.data.problems import Problem
from diffvl.data.samples import Sample
from diffvl.data.sources import Source
from diffvl.data.stream import Position, StreamDataset, StreamPart, StreamState
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor

SHARDS, EACH = 3, 5


def data_of(**settings: Any) -> Data:
    return Data.model_validate(settings)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def processor(loaded: Callable[[str], Loaded]) -> DiffVLProcessor:
    return loaded("llama")[1]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"), SHARDS, EACH)


def opened(processor: DiffVLProcessor, train: Any, seed: int = 0, row_length: int | None = None, **data: Any) -> StreamDataset:
    settings = data_of(train=train, streaming=True, max_length=400, row_length=row_length, **{"window": 4, **data})
    dataset = load_data(settings, processor, 512).train
    assert isinstance(dataset, StreamDataset)
    return dataset.packed(row_length, seed) if row_length else dataset.begun(seed)


def fresh(dataset: StreamDataset) -> StreamState:
    return StreamState(0, (Position(),) * len(dataset.parts))


def taken(dataset: StreamDataset, count: int, stream: int = 0, streams: int = 1, state: StreamState | None = None) -> list[Any]:
    """(indices of a row's samples, state after it) of the next rows; no problems may be among them."""
    rows = dataset.rows(stream, streams, state or fresh(dataset))
    out = []
    for row, after in islice(rows, count):
        samples = [sample for sample in row if isinstance(sample, Sample)]
        assert len(samples) == len(row), row
        out.append(([sample.index for sample in samples], StreamState.from_json(json.loads(json.dumps(after.to_json())))))
    return out


@pytest.mark.parametrize("streams", (1, 2, 5))
def test_an_epoch_has_every_record_once(streams: int, tars: Path, processor: DiffVLProcessor) -> None:
    """However many streams there are, more than files or fewer."""
    dataset = opened(processor, str(tars))
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for stream in range(streams):
            for row, after in dataset.rows(stream, streams, fresh(dataset)):
                if after.positions[0].epoch > epoch:
                    break
                seen.update(sample.index for sample in row if after.positions[0].epoch == epoch)  # type: ignore[union-attr]
        assert len(seen) == SHARDS * EACH and set(seen.values()) == {1}
    assert {dataset.place_of(index) for index in seen} == {f"{s:03}.tar:{n}" for s in range(SHARDS) for n in range(1, EACH + 1)}


def test_the_order_is_of_the_seed_and_the_epoch(tars: Path, processor: DiffVLProcessor) -> None:
    def order(seed: int) -> list[int]:
        return [row[0] for row, _ in taken(opened(processor, str(tars), seed), 2 * SHARDS * EACH)]

    first = order(0)
    assert first == order(0) != order(1)
    assert sorted(first[: SHARDS * EACH]) == sorted(first[SHARDS * EACH :]) and first[: SHARDS * EACH] != first[SHARDS * EACH :]
    assert first[:EACH] != sorted(first[:EACH])


@pytest.mark.parametrize("row_length", (None, 900))
def test_a_position_goes_on_exactly(row_length: int | None, tars: Path, processor: DiffVLProcessor) -> None:
    """From after any row of two epochs, in a new object, through JSON."""
    whole = taken(opened(processor, str(tars), 3, row_length), 20, 1, 2)
    if row_length:
        assert max(len(row) for row, _ in whole) > 1
    for cut in (0, 2, 3, 4, 8, 11, 16):
        fresh_one = opened(processor, str(tars), 3, row_length)
        assert taken(fresh_one, 3, 1, 2, whole[cut][1]) == whole[cut + 1 : cut + 4]


def test_a_stream_that_forgets_its_window_is_caught(tars: Path, processor: DiffVLProcessor) -> None:
    """As a shuffle buffer does: with the place in the window lost, records come twice or never."""
    whole = [row for row, _ in taken(opened(processor, str(tars)), 20)]
    state = taken(opened(processor, str(tars)), 6)[-1][1]
    (place,) = state.positions
    forgetful = StreamState(state.draws, (Position(place.epoch, place.unit, place.row, 0),))
    assert [row for row, _ in taken(opened(processor, str(tars)), 10, state=forgetful)] != whole[6:16]


def test_streams_are_mixed_exactly(tmp_path: Path, processor: DiffVLProcessor) -> None:
    for name, count in (("one", 2), ("two", 1)):
        write_tars(tmp_path / name, count, 6)
    sources = [{"path": f"{tmp_path}/one/*.tar", "weight": 1}, {"path": f"{tmp_path}/two/*.tar", "weight": 2}]
    dataset = opened(processor, sources)
    whole = taken(dataset, 30)
    from_two = [row[0] >> 56 for row, _ in whole]
    assert all(sum(from_two[start : start + 3]) == 2 for start in range(0, 30, 3))
    assert taken(opened(processor, sources), 10, state=whole[10][1]) == whole[11:21]


def test_nothing_is_opened_before_its_turn(tars: Path, processor: DiffVLProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *how, **more: (read.append(more["fileobj"].name), whole(*how, **more))[1])
    dataset = opened(processor, str(tars))
    assert read == []
    taken(dataset, 1)
    assert len(read) == 1


# --- what goes wrong -----------------------------------------------------------------------------------------------------


def rows_of(dataset: StreamDataset, count: int) -> list[Sample | Problem]:
    return [item for row, _ in islice(dataset.rows(0, 1, fresh(dataset)), count) for item in row]


@pytest.mark.parametrize("end", ("in a member", "in a header", "at a header", "gzip"))
def test_a_tar_cut_short_is_told(end: str, tmp_path: Path, processor: DiffVLProcessor) -> None:
    file = write_tars(tmp_path, 1, 5).parent / "000.tar"
    if end == "gzip":
        packed = tmp_path / "000.tar.gz"
        with tarfile.open(packed, "w:gz") as archive:
            for number in range(5):
                add(archive, f"{number}.json", json.dumps(value_of(number)).encode())
        packed.write_bytes(packed.read_bytes()[:-20])
        file = packed
    else:
        with tarfile.open(file) as archive:
            member = archive.getmembers()[-2]  # the JSON of the last sample
        size = {"in a member": member.offset_data + 10, "in a header": member.offset + 100, "at a header": member.offset}[end]
        file.write_bytes(file.read_bytes()[:size])
    problem = next(
        item for item in rows_of(opened(processor, str(file), window=1, on_error="skip"), 9) if isinstance(item, Problem)
    )
    assert (
        problem.ends
        and str(problem).startswith(f"{file}:")
        and "the tar is damaged or cut short after its sample" in str(problem)
    )
    left_out = LeftOut(tmp_path / "left_out.jsonl", Data(on_error="skip", max_skipped=1.0), (), True)
    with pytest.raises(DataError, match="cut short after its sample"):
        left_out.add([problem], 1, 1)


def test_a_wrong_sample_leaves_its_place_empty(tmp_path: Path, processor: DiffVLProcessor) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.json", b"{oops" if number == 1 else json.dumps(value_of(number)).encode())
            add(archive, f"{number}.png", b"no image" if number == 2 else png(number))
    for row_length in (None, 900):
        found = rows_of(opened(processor, str(tmp_path / "a.tar"), row_length=row_length, on_error="skip"), 4)[:4]
        problems = {item.line: item for item in found if isinstance(item, Problem)}
        assert len(problems) == 2 and "malformed JSON" in str(problems[2]) and "a.tar:2: " in str(problems[2])
        assert "a.tar:3: image 2.png in " in str(problems[3]) and "cannot be read" in str(problems[3])


@pytest.mark.parametrize(
    ("members", "settings", "says"),
    [
        ({"0.txt": b"A dot.", "0.png": png(0)}, {}, "no member .json with an object in it; this sample has `txt`"),
        ({"0.json": b"{}", "0.png": png(0)}, {"columns": {"answer": "txt"}}, "no member or key `txt`, which data.columns names"),
        ({"0.json": json.dumps(value_of(0)).encode(), "0.wav": b""}, {}, "sounds are not supported"),
        ({"0.json": json.dumps(value_of(0)).encode(), "0.mp4": b""}, {}, "it shows a video, and this checkpoint takes none"),
        (
            {"0.json": json.dumps({**value_of(0), "images": ["a", "b"]}).encode(), "0.png": png(0)},
            {},
            "1 images as members, and 2",
        ),
    ],
)
def test_samples_that_are_no_records(
    members: dict[str, bytes], settings: dict[str, Any], says: str, tmp_path: Path, processor: DiffVLProcessor
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    (item,) = rows_of(opened(processor, str(tmp_path / "a.tar"), **settings), 1)
    assert isinstance(item, Problem) and says in str(item) and str(item).startswith(f"{tmp_path}/a.tar:1: ")


def test_a_share_of_a_stream_may_be_wrong(tmp_path: Path) -> None:
    """Nobody knows how large it is: the share is of what was met so far."""
    part = StreamPart(Source(tmp_path, "tar", (), DataSource(path="a.tar")))
    left_out = LeftOut(tmp_path / "left_out.jsonl", Data(on_error="skip"), [part], True)
    left_out.begin(0)
    problems = [Problem("empty answer", tmp_path, number, number, None, "wrong") for number in range(1, 13)]
    left_out.count(1000)
    left_out.add(problems[:10], 1, 1)
    with pytest.raises(DataError, match="11 of 1000 records cannot be used"):
        left_out.add(problems[10:11], 1, 2)
    again = LeftOut(tmp_path / "left_out.jsonl", Data(on_error="skip"), [part], True)
    again.begin(1, seen=2000)
    again.add(problems[10:], 1, 2)


def test_other_files_are_refused_on_a_resume(tmp_path: Path, processor: DiffVLProcessor) -> None:
    pattern = str(write_tars(tmp_path, 2, 3))
    load = lambda: load_data(data_of(train=pattern, streaming=True, max_length=400), processor, 512)  # noqa: E731
    (tmp_path / "work").mkdir()
    write_data_record(tmp_path / "work", data_record(load()))
    require_same_data(tmp_path / "work", load())
    (tmp_path / "001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"began with .* \(2 files\), now .* \(2 files\); file 2 is the first that differs"):
        require_same_data(tmp_path / "work", load())


@pytest.mark.parametrize("form", ("tar", "parquet", "jsonl"))
def test_remote_files(form: str, tmp_path: Path, processor: DiffVLProcessor) -> None:
    """Whatever fsspec reaches; here its own memory."""
    files = fsspec.filesystem("memory")
    if form == "tar":
        content = (write_tars(tmp_path, 1, 3).parent / "000.tar").read_bytes()
    elif form == "jsonl":
        content = "\n".join(json.dumps(value_of(number)) for number in range(3)).encode()
    else:
        datasets.Dataset.from_list([value_of(number) for number in range(3)]).to_parquet(tmp_path / "a.parquet")
        content = (tmp_path / "a.parquet").read_bytes()
    for shard in range(2):
        files.pipe(f"/remote/{form}/{shard:03}.{form}", content)
    for name in (f"memory://remote/{form}/*.{form}", f"memory://remote/{form}/{{000..001}}.{form}"):
        dataset = opened(processor, name)
        first = taken(dataset, 6)
        assert len({row[0] for row, _ in first}) == 6 and taken(dataset, 3, state=first[2][1]) == first[3:]
    with pytest.raises(DataError, match=r"set data.streaming=true"):
        load_data(data_of(train=name, max_length=400), processor, 512)


def test_a_column_that_no_row_has_stops_a_stream(
    tmp_path: Path, processor: DiffVLProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    """And keys that are not used are told once, as of a file."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({**value_of(number), "colour": "red"}) for number in range(3)))
    columns = {"conversations": "conversations", "image": "picture"}
    first, *_ = rows_of(opened(processor, str(file), columns=columns), 2)
    assert isinstance(first, Problem) and first.ends and "no row has `picture`, which data.columns names" in str(first)
    assert all(isinstance(item, Sample) for item in rows_of(opened(processor, str(file)), 4))
    assert [entry.getMessage() for entry in caplog.records] == [
        f"{file}: keys that are not used: `colour` (3 records, first in a.jsonl:1)"
    ]
