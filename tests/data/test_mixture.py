"""Several sources in one run: exact shares, the same on any number of processes, and each source as it is alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy
import pytest
from shared_fixtures import Loaded
from tiny_runs import record, write_data

from diffvl.config.recipe import Data
from diffvl.data.fingerprint import data_record, is_same_data, require_same_data, write_data_record
from diffvl.data.left_out import LeftOut
from diffvl.data.loader import load_data
from diffvl.data.mixture import MixOrder, Mixture, Shares, shares_of
from diffvl.errors import ConfigError, DataError
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store.metrics import read_json_lines
from diffvl.train.order import StepOrder


def data_of(**settings: Any) -> Data:
    return Data.model_validate(settings)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def processor(loaded: Callable[[str], Loaded]) -> DiffVLProcessor:
    return loaded("llama")[1]


# --- shares --------------------------------------------------------------------------------------------------------------


def test_weights_become_whole_draws() -> None:
    assert shares_of([2, 1]) == shares_of([0.5, 0.25]) == Shares((2, 1))
    assert shares_of([0.3, 0.7, 1.0]).counts == (3, 7, 10)
    with pytest.raises(ConfigError, match="give them fewer digits"):
        shares_of([0.1234567, 1.0])


@pytest.mark.parametrize("weights", ([1, 1], [2, 1], [0.7, 0.2, 0.1], [97, 3]))
def test_shares_are_exact_and_even(weights: list[float]) -> None:
    """Exact in every cycle; at no point is a source behind by more than a few draws."""
    shares = shares_of(weights)
    count = 5 * shares.cycle
    drawn = [shares.source_of(draw, seed=1) for draw in range(count)]
    for source, share in enumerate(shares.counts):
        own = [rank for one, rank in drawn if one == source]
        assert own == list(range(5 * share))
        so_far = numpy.cumsum([one == source for one, _ in drawn])
        assert abs(so_far - numpy.arange(1, count + 1) * share / shares.cycle).max() <= 2
    assert drawn != [shares.source_of(draw, seed=2) for draw in range(count)] or len(set(shares.counts)) == 1


def test_each_source_is_gone_through_before_it_begins_again() -> None:
    order = MixOrder([4, 10], Shares((2, 1)), seed=3)
    rows = order.rows(0, 60).tolist()
    small = [row for row in rows if row < 4]
    assert len(small) == 40 and all(sorted(small[start : start + 4]) == [0, 1, 2, 3] for start in range(0, 40, 4))
    assert len({tuple(small[start : start + 4]) for start in range(0, 40, 4)}) > 1
    large = [row for row in rows if row >= 4]
    assert sorted(large[:10]) == sorted(large[10:]) == list(range(4, 14))
    fresh = MixOrder([4, 10], Shares((2, 1)), seed=3)
    assert fresh.rows(17, 31).tolist() == rows[17:31]  # no state


def test_a_step_has_the_same_rows_however_it_is_cut() -> None:
    def step(batch_size: int, accumulation: int, processes: int) -> list[Counter[int]]:
        orders = [
            StepOrder(14, batch_size, accumulation, 3, processes, rank, MixOrder([4, 10], Shares((2, 1)), 3))
            for rank in range(processes)
        ]
        cut = [[row for batch in order.micro_batches(number) for row in batch] for number in range(9) for order in orders]
        return [Counter(sum(cut[start : start + processes], [])) for start in range(0, len(cut), processes)]

    assert step(6, 1, 1) == step(3, 1, 2) == step(1, 3, 2) == step(2, 3, 1)


# --- sets ----------------------------------------------------------------------------------------------------------------


def two(folder: Path, *more: dict[str, Any]) -> list[dict[str, Any]]:
    """Two sources of 5 and 3 records; the second has one without its image."""
    for name, count in (("one", 5), ("two", 3)):
        (folder / name).mkdir()
        write_data(folder / name, *[record(answer=f"{name} {number}.") for number in range(count)])
    settings = [{"path": str(folder / name / "data.json")} for name in ("one", "two")]
    return [{**one, **extra} for one, extra in zip(settings, more or ({}, {}), strict=True)]


def test_without_weights_each_record_is_drawn_once(tmp_path: Path, processor: DiffVLProcessor) -> None:
    train = load_data(data_of(train=two(tmp_path), max_length=400), processor, 512).train
    assert isinstance(train, Mixture) and len(train) == 8 and train.order(0) is None
    samples = [train[place][0] for place in range(8)]
    assert [sample.index for sample in samples] == list(range(8))  # type: ignore[union-attr]
    assert [train.place_of(index) for index in (0, 4, 5, 7)] == [f"data.json:{line}" for line in (2, 6, 2, 4)]
    with pytest.raises(IndexError):
        train[8]


def test_held_out_records_come_from_all_sources(tmp_path: Path, processor: DiffVLProcessor) -> None:
    sources = two(tmp_path)
    data = load_data(data_of(train=sources, max_length=400, holdout=4), processor, 512)
    assert isinstance(data.train, Mixture) and data.held_out is not None
    answers = [data.held_out.record(place).turns[-1].text for place in range(len(data.held_out))]
    assert answers == ["one 0.", "one 2.", "one 4.", "two 1."] and len(data.train) == 4
    left = [data.train.record(place).turns[-1].text for place in range(4)]
    assert not set(left) & set(answers)
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        load_data(data_of(train=sources, max_length=400, holdout=8), processor, 512)


def test_each_source_is_packed_by_itself(tmp_path: Path, processor: DiffVLProcessor) -> None:
    weighed = two(tmp_path, {"weight": 1}, {"weight": 3})
    train = load_data(data_of(train=weighed, max_length=400, row_length=2000), processor, 512).train
    assert isinstance(train, Mixture) and train.shares == Shares((1, 3))
    packed = train.packed(2000, seed=0)
    assert isinstance(packed, Mixture)
    assert sorted(sample.index for place in range(len(packed)) for sample in packed[place]) == list(range(8))
    assert all(len({sample.index > 4 for sample in packed[place]}) == 1 for place in range(len(packed)))


def test_a_run_knows_the_sources_and_shares_that_it_began_with(tmp_path: Path, processor: DiffVLProcessor) -> None:
    weighed = two(tmp_path, {"weight": 1}, {"weight": 3})

    def opened(*sources: dict[str, Any]) -> Any:
        return load_data(data_of(train=list(sources), max_length=400), processor, 512)

    work = tmp_path / "work"
    work.mkdir()
    write_data_record(work, data_record(opened(*weighed)))
    assert is_same_data(work, data_record(opened(*weighed)))
    assert is_same_data(work, data_record(opened(*({**one, "weight": 2 * one["weight"]} for one in weighed))))
    with pytest.raises(DataError, match=r"data.train.0: .*its share of the mix was 1 of 4 and is 1 of 3"):
        require_same_data(work, opened(weighed[0], {**weighed[1], "weight": 2}))
    with pytest.raises(DataError, match=r"train.0: .*record 1 is the first that differs"):
        require_same_data(work, opened(*reversed(weighed)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one, other: [one, {**other, "weight": None}], "some entries of train have a weight and some have none"),
        (lambda one, other: [one], "weight has no effect on a single entry of train"),
        (lambda one, other: [{"path": one["path"], "split": "train"}, {"path": other["path"]}], "data.split has no effect on"),
        (lambda one, other: [{"path": one["path"]}, {"path": f"{one['path'][:-9]}*.json"}], "data.json stands in two entries"),
        (lambda one, other: [one, {**one, "weight": 5}], "names .* twice: give it one entry, with a larger weight"),
    ],
)
def test_what_cannot_be_mixed(change: Any, says: str, tmp_path: Path, processor: DiffVLProcessor) -> None:
    with pytest.raises((ConfigError, DataError, ValueError), match=says):
        load_data(data_of(train=change(*two(tmp_path, {"weight": 1}, {"weight": 3})), max_length=400), processor, 512)


def test_each_split_of_a_folder_has_its_own_share_of_wrong_records(tmp_path: Path, processor: DiffVLProcessor) -> None:
    """Both are read below one path: two wrong records of ten may be in either, so four are not too many of one."""
    parts = tmp_path / "set" / "data"
    parts.mkdir(parents=True)
    for split in ("train", "test"):
        records = [record(None, "What?", f"It is {split} {number}.") for number in range(10)]
        datasets.Dataset.from_list(records).to_parquet(parts / f"{split}-00000-of-00001.parquet")
    train = [{"path": str(tmp_path / "set"), "split": split} for split in ("train", "test")]
    data = data_of(train=train, max_length=400, on_error="skip", max_skipped=0.2)
    mixed = load_data(data, processor, 512).train
    assert isinstance(mixed, Mixture)
    sets = mixed.parts
    left_out = LeftOut(tmp_path / "left_out.jsonl", data, sets, True)
    left_out.begin(0)
    wrong = [[one.problem_of(one.record(number), number, DataError("wrong", "wrong")) for number in range(3)] for one in sets]
    assert wrong[0][0].path == wrong[1][0].path and wrong[0][0].number == wrong[1][0].number
    left_out.add([*wrong[0][:2], *wrong[1][:2]], 1, 1)
    assert [line["set"] for line in read_json_lines(tmp_path / "left_out.jsonl")] == [0, 0, 1, 1]
    again = LeftOut(tmp_path / "left_out.jsonl", data, sets, True)
    again.begin(1)
    assert len(again) == 4
    for one in (left_out, again):
        with pytest.raises(DataError, match=r"3 of 10 records cannot be used .*more than data.max_skipped=0.2") as told:
            one.add(wrong[1][2:], 1, 2)
        assert "test-00000-of-00001.parquet:3" in str(told.value) and "train-0" not in str(told.value)
