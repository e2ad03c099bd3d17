"""The records that `diffvl compare` asks: those that the runs have held out, and of them those that a run would use."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
from helpers import random_image
from tiny_runs import record, write_data

from diffvl.compare import compare as comparing
from diffvl.compare.compare import CompareRequest
from diffvl.compare.entrants import Entrant, open_entrants
from diffvl.compare.held_out import records_to_ask
from diffvl.config.recipe import Data
from diffvl.data.fingerprint import data_record, facts_of
from diffvl.data.loader import load_data
from diffvl.data.sample_dataset import SampleDataset
from diffvl.errors import DataError, UsageError
from diffvl.store import checkpoint
from diffvl.terminal.console import console

QUIET = console(quiet=True)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> tiny_runs.Run:
    return tiny_runs.finished_run(tmp_path_factory, source, tower, shapes)


def trained_on(run: tiny_runs.Run, data: Data) -> list[Entrant]:
    """Two runs, as if their stages had had this data."""
    return [
        replace(one, data=data, facts={}) for one in open_entrants([str(run.align), str(run.diffuse)], trust_remote_code=False)
    ]


def answer_of(number: int) -> str:
    return f"Dot {number}." if number % 7 else f"Dot {number}." + " Long." * 40


def test_a_packed_run_is_asked_what_it_has_held_out(run: tiny_runs.Run, tmp_path: Path):
    """It puts records aside that fit no row before it holds any out; others would have been trained on."""
    random_image().save(tmp_path / "good.png")
    file = write_data(tmp_path, *(record(answer=answer_of(number)) for number in range(60)))
    data = Data(train=str(file), holdout=7, max_length=100, row_length=200, too_long="drop")
    trained = load_data(data, checkpoint.load_description(run.diffuse)[1], None).train
    assert isinstance(trained, SampleDataset)
    seen = {trained.record(place).source for place in range(len(trained))}
    asked = records_to_ask(trained_on(run, data), None, None, QUIET)
    assert len(asked.records) == 7 and len(seen) == 44 and asked.left_out == 0
    assert not seen & {one.source for one in asked.records}


def test_what_training_leaves_out_is_not_asked(run: tiny_runs.Run, tmp_path: Path):
    random_image().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("I am no image", encoding="utf-8")
    records = [record(answer="One."), record(image="bad.png"), record(answer="Long. " * 60), record(answer="Two.")]
    held = write_data(tmp_path, *records, name="held.json")
    train = write_data(tmp_path, record())
    data = Data(train=str(train), eval=str(held), max_length=100, too_long="drop", on_error="skip", max_skipped=0.5)
    asked = records_to_ask(trained_on(run, data), None, None, QUIET)
    assert [one.turns[-1].text for one in asked.records] == ["One.", "Two."]
    assert asked.told() == f"2 records of {held} (2 that cannot be used are left out, as in training)"
    first = records_to_ask(trained_on(run, data), None, 1, QUIET)
    assert (len(first.records), first.left_out) == (1, 0)
    with pytest.raises(DataError, match=f"{held}:3: image {tmp_path}/bad.png cannot be read"):
        records_to_ask(trained_on(run, data.model_copy(update={"on_error": "stop"})), None, None, QUIET)
    worst = write_data(tmp_path, record(image="bad.png"), name="worst.json")
    with pytest.raises(UsageError, match=f"1 records of {worst}: none of them can be used"):
        records_to_ask(trained_on(run, data.model_copy(update={"eval": str(worst)})), None, None, QUIET)


@pytest.mark.parametrize("held", ["holdout", "eval"])
def test_records_that_changed_after_training_are_not_held_out(held: str, run: tiny_runs.Run, tmp_path: Path):
    """Every n-th record is set apart: with one record more others are, which were trained on."""
    random_image().save(tmp_path / "good.png")
    records = [record(answer=f"Dot {number}.") for number in range(9)]
    file, other = write_data(tmp_path, *records), write_data(tmp_path, record(answer="Another."), name="other.json")
    data = Data(train=str(file), holdout=3) if held == "holdout" else Data(train=str(other), eval=str(file))
    processor = checkpoint.load_description(run.diffuse)[1]
    facts = {"data": facts_of(data_record(load_data(data, processor, None)))}
    trained = [replace(one, facts=facts) for one in trained_on(run, data)]
    assert len(records_to_ask(trained, None, None, QUIET).records) == (3 if held == "holdout" else 9)
    write_data(tmp_path, *records, record(answer="One more."))
    with pytest.raises(DataError, match=f"{run.align} was not trained with {file} as it is now.*diffvl compare ... --data FILE"):
        records_to_ask(trained, None, None, QUIET)
    assert len(records_to_ask(trained, file, None, QUIET).records) == 10


def test_what_a_run_cannot_be_asked_is_known_before_anything_is_answered(
    run: tiny_runs.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    random_image().save(tmp_path / "good.png")
    long = write_data(tmp_path, record(answer="One."), record(answer="Long. " * 600), name="long.json")
    monkeypatch.setattr(comparing, "_answers", lambda *_: pytest.fail("nothing may be answered"))
    with pytest.raises(DataError, match=f"{long}:3: "):
        comparing.compare(CompareRequest((str(run.align), str(run.diffuse)), data=long, speed=False), QUIET)
