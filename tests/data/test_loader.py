"""Samples are encoded once, when their turn comes; lengths are measured only where they are asked for, and remembered."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import numpy
import pytest
from helpers import QUIET, trained_on
from shared_fixtures import Loaded
from tiny_runs import record, write_data

from diffvl.config.recipe import MAX_SKIPPED, Data
from diffvl.data import loader, packing, sample_dataset
from diffvl.data.loader import StageData, check_images, load_data, num_workers
from diffvl.data.problems import Problem
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import NO_SAMPLE, PROBLEMS, TOO_LONG, Sample, collate, is_filler
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor

LONG = record(answer="Yes. " * 200)  # 1047 tokens


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def processor(loaded: Callable[[str], Loaded]) -> DiffVLProcessor:
    return loaded("llama")[1]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of the records that this process encodes from now on."""
    seen: list[str] = []
    for module in (packing, sample_dataset.sample_of.__globals__):
        names = module if isinstance(module, dict) else vars(module)
        encode = names["encode_record"]
        counted = lambda one, *rest, encode=encode: (seen.append(one.source), encode(one, *rest))[1]  # noqa: E731
        monkeypatch.setitem(names, "encode_record", counted)
    return seen


def settings(file: Path, **more: Any) -> Data:
    return Data(train=str(file), max_length=400, **more)


def test_nothing_is_encoded_before_its_turn(tmp_path: Path, processor: DiffVLProcessor, encoded: list[str]):
    file = write_data(tmp_path, *[record()] * 9, LONG)
    data = load_data(settings(file, holdout=3, too_long="drop"), processor, 512)
    assert encoded == [] and len(trained_on(data)) == 7 and data.held_out is not None
    (sample,) = data.train[0]
    assert isinstance(sample, Sample) and encoded == ["data.json:3"]


def test_packing_measures_each_record_once(tmp_path: Path, processor: DiffVLProcessor, encoded: list[str]):
    file = write_data(tmp_path, *[record(answer="Yes. " * number) for number in range(1, 10)])
    packed = settings(file, row_length=400)
    first = trained_on(load_data(packed, processor, 512))
    assert first.lengths is not None and len(encoded) == 9
    os.utime(file, (1, 1))
    load_data(packed, processor, 512)
    copy = tmp_path / "copy" / "other.json"
    copy.parent.mkdir()
    shutil.copy(tmp_path / "good.png", copy.parent)
    shutil.copy(file, copy)
    again = trained_on(load_data(settings(copy, row_length=400), processor, 512))
    assert len(encoded) == 9 and again.lengths is not None and again.lengths.tolist() == first.lengths.tolist()
    file.write_text(file.read_text().replace("red dot", "dot") + " ")
    write_data(tmp_path, record())
    load_data(packed, processor, 512)
    assert len(encoded) == 10


def test_several_processes_measure_the_same(tmp_path: Path, processor: DiffVLProcessor, monkeypatch: pytest.MonkeyPatch):
    file = write_data(tmp_path, *[record(answer="Yes. " * number) for number in range(1, 10)], LONG)
    packed = settings(file, row_length=400, too_long="drop")
    alone = trained_on(load_data(packed, processor, 512))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    monkeypatch.setattr(packing, "_PAYS_FROM", 1)
    monkeypatch.setattr(packing, "_AT_ONCE", 2)
    monkeypatch.setattr(packing, "num_cores", lambda: 2)
    together = trained_on(load_data(packed, processor, 512))
    assert alone.lengths is not None and together.lengths is not None
    assert together.lengths.tolist() == alone.lengths.tolist() and together.indices.tolist() == list(range(9))


def test_a_length_check_tells_all_in_one_go(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, record(), LONG, record(answer="A <|MASK|> here."), LONG)
    with pytest.raises(DataError) as caught:
        load_data(settings(file, check_lengths=True), processor, 512)
    message = str(caught.value)
    assert message.startswith(f"{file}: 3 problems\n  too long: 2\n    {file}:3: 1047 tokens, images included, where at most 400")
    assert "does not fit the chat template: 1" in message and f"{file}:4: record" in message
    skip = settings(file, check_lengths=True, on_error="skip", max_skipped=0.75)
    assert trained_on(load_data(skip, processor, 512)).indices.tolist() == [0, 1, 2, 3]  # it only checks
    packed = settings(file, row_length=400, on_error="skip", max_skipped=0.75)
    data = trained_on(load_data(packed, processor, 512))
    assert data.indices.tolist() == [0] and [problem.number for problem in data.known] == [2, 3, 4]
    with pytest.raises(DataError, match=r"3 of 4 records cannot be used \(75.00%\)"):
        load_data(settings(file, check_lengths=True, on_error="skip"), processor, 512)


def test_what_is_dropped_counts_for_nothing(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, LONG, LONG, record())
    assert len(trained_on(load_data(settings(file, check_lengths=True, too_long="drop"), processor, 512))) == 3
    packed = settings(file, row_length=400, too_long="drop", on_error="skip")
    assert trained_on(load_data(packed, processor, 512)).indices.tolist() == [2]


def test_a_problem_stands_for_its_record(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, {**record(image="bad.png"), "id": "x"}, LONG, record(answer="A <|MASK|> here."))
    (tmp_path / "bad.png").write_text("I am no image")
    problems = [trained_on(load_data(settings(file), processor, 512))[place][0] for place in range(3)]
    assert [isinstance(problem, Problem) for problem in problems] == [True] * 3
    bad, long, masked = map(str, problems)
    assert bad.startswith(f"{file}:2: image {tmp_path}/bad.png cannot be read") and bad.endswith("(record 1, id 'x')")
    assert long == f"{file}:3: 1047 tokens, images included, where at most 400 are allowed (record 2)"
    assert masked.startswith(f"{file}:4: record data.json:4 does not fit") and [p.kind for p in problems][1] == TOO_LONG  # type: ignore[union-attr]


def test_places_stay_empty(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, record(), LONG, record(answer="Blue."), LONG)
    train = trained_on(load_data(settings(file), processor, 512))
    rows = [[*train[0], *train[1]], train[3], train[2]]
    batch = collate(rows, pad_token_id=0)
    assert batch["sample"].tolist() == [0, 2] and batch["row"].tolist() == [0, 1]
    assert [problem.number for problem in batch[PROBLEMS]] == [2, 4] and not is_filler(batch)
    empty = collate([train[1]], pad_token_id=0)
    assert is_filler(empty) and empty["sample"].tolist() == [NO_SAMPLE] and "pixels" not in empty


def test_all_damaged_images_are_told_at_once(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, record(), *[record(image="bad.png")] * 7)
    (tmp_path / "bad.png").write_text("I am no image")
    data = settings(file)
    samples = StageData(trained_on(load_data(data, processor, 512)), None)
    with pytest.raises(DataError) as caught:
        check_images(samples, data, QUIET)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{file}: 7 problems" and lines[1].startswith(f"  {file}:3: image {tmp_path}/bad.png cannot be read")
    assert lines[6] == "  and 2 more" and len(Path(lines[7].removeprefix("all of them: ")).read_text().splitlines()) == 7
    check_images(samples, settings(file, check_images=7), QUIET)
    check_images(samples, settings(file, on_error="skip", max_skipped=0.9), QUIET)
    with pytest.raises(DataError, match="7 of 8 records cannot be used"):
        check_images(samples, settings(file, on_error="skip"), QUIET)


def test_workers_for_large_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "num_cores", lambda: 16)
    assert [num_workers(Data(), samples, 1) for samples in (10, 999, 1000, 10**6)] == [0, 0, 4, 4]
    assert [num_workers(Data(), 10**6, processes) for processes in (2, 4, 8, 16)] == [4, 3, 1, 1]
    assert num_workers(Data(workers=7), 10, 1) == 7 and num_workers(Data(workers=0), 10**6, 1) == 0
    monkeypatch.setattr(loader, "num_cores", lambda: 1)
    assert num_workers(Data(), 10**6, 1) == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_skipped": 0.5}, "max_skipped has no effect with on_error: stop"),
        ({"check_lengths": True, "row_length": 4096}, "check_lengths has no effect with row_length"),
        ({"max_skipped": 1.5, "on_error": "skip"}, "less than or equal to 1"),
    ],
)
def test_settings_without_effect(wrong: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Data.model_validate(wrong)
    assert Data.model_validate(json.loads(Data().model_dump_json())).max_skipped == MAX_SKIPPED


def test_a_holdout_is_the_same_with_and_without_lengths(tmp_path: Path, processor: DiffVLProcessor):
    file = write_data(tmp_path, *[record()] * 10)
    plain, packed = (load_data(settings(file, holdout=3, **more), processor, 512) for more in ({}, {"row_length": 400}))
    for one, other in ((trained_on(plain), trained_on(packed)), (plain.held_out, packed.held_out)):
        assert isinstance(one, SampleDataset) and isinstance(other, SampleDataset)
        assert numpy.array_equal(one.indices, other.indices)
