"""Runs that are fed by mixtures and by streams: exact on a resume, and refused where they would read other records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import pytest
from forks import Forks
from helpers import metrics, weights_of
from shards import write_tars
from shared_fixtures import Loaded
from tiny_runs import record, write_data
from training_runs import crash, run, run_two

from diffvl.config.recipe import Data, Recipe
from diffvl.config.resolve import resolve
from diffvl.data.loader import load_data
from diffvl.errors import CheckpointError
from diffvl.train.feed import NumberedFeed, StreamFeed

NUM = 9  # records of each of the tars


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def recipe_of(data: dict[str, Any], **stage: Any) -> Recipe:
    """Four steps."""
    settings = {
        "objective": {"kind": "block_diffusion", "block_size": 4},
        "trainable": {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3},
        "data": {"max_length": 400, **data},
        "steps": 4,
        "batch_size": 1,
        "accumulation": 2,
        "precision": "fp32",
        **stage,
    }
    return resolve({"stages": {"diffuse": settings}}, [], "test")


def streamed(folder: Path, **data: Any) -> dict[str, Any]:
    return {"train": str(write_tars(folder, 3, NUM)), "streaming": True, "window": 4, "workers": 0, **data}


def same(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({"workers": 2, "row_length": 400}, id="workers, packed"),
        pytest.param({}, id="alone", marks=SLOW),
        pytest.param({"workers": 2}, id="workers", marks=SLOW),
        pytest.param({"row_length": 400}, id="packed", marks=SLOW),
    ],
)
def test_a_stream_goes_on_exactly(
    data: dict[str, Any], prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of a window, and of the round of the loader's processes."""
    recipe = recipe_of(streamed(tmp_path, **data), save_every=3, accumulation=1)
    whole = run(prepared("llama"), recipe, tmp_path / "whole")
    crash(prepared("llama"), recipe, tmp_path / "resumed", 4, False, monkeypatch)
    same(run(prepared("llama"), recipe, tmp_path / "resumed", resume=True), whole)


def feed(dataset: Any, processes: int = 1, workers: int | None = 0) -> StreamFeed:
    stage = recipe_of({"train": "a.tar", "streaming": True, "workers": workers}).stages["diffuse"]
    return StreamFeed(dataset, stage, 0, lambda rows: {}, processes, 0)


def test_other_streams_are_refused(loaded: Callable[[str], Loaded], tmp_path: Path) -> None:
    """Another number of processes, or of loader processes; and a run that began without streams, or goes on without them."""
    data = Data(train=str(write_tars(tmp_path, 1, 2)), streaming=True, max_length=400)
    dataset = load_data(data, loaded("llama")[1], 512).train
    state = feed(dataset, workers=2).state()
    feed(dataset, workers=2).resume(state)
    with pytest.raises(
        CheckpointError, match="began with 1 process of 2 loader processes, and goes on with 1 process of 3 loader"
    ):
        feed(dataset, workers=3).resume(state)
    with pytest.raises(CheckpointError, match="goes on with 2 processes of 2 .*Resume with 1 processes and data.workers=2"):
        feed(dataset, 2, workers=2).resume(state)
    with pytest.raises(CheckpointError, match="began without data.streaming"):
        feed(dataset).resume({})
    with pytest.raises(CheckpointError, match="began with data.streaming=true"):
        NumberedFeed.resume(None, state)  # type: ignore[arg-type]  # it asks nothing of the feed


@pytest.mark.slow
def test_two_processes_share_a_stream(prepared: Callable[[str], Path], forks: Forks, tmp_path: Path) -> None:
    """Twice the same, and not to be gone on with by one."""
    recipe = recipe_of(streamed(tmp_path, workers=1), steps=3, save_every=3)
    runs = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        runs.append(run_two(forks, prepared("llama"), recipe, tmp_path / name))
    assert runs[0] == runs[1]
    longer = recipe_of(streamed(tmp_path, workers=1), steps=4, save_every=3)
    with pytest.raises(CheckpointError, match="began with 2 processes of 1 loader process, and goes on with 1 process of 1"):
        run(prepared("llama"), longer, tmp_path / "one" / "run", resume=True)


@pytest.mark.slow
def test_a_mixture_goes_on_exactly(prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    for number, weight in enumerate((1, 3)):
        (tmp_path / str(number)).mkdir()
        file = write_data(tmp_path / str(number), *[record(answer=f"{number} {place}.") for place in range(3)])
        sources.append({"path": str(file), "weight": weight})
    recipe = recipe_of({"train": sources}, save_every=2)
    whole = run(prepared("llama"), recipe, tmp_path / "whole")
    crash(prepared("llama"), recipe, tmp_path / "resumed", 4, False, monkeypatch)
    same(run(prepared("llama"), recipe, tmp_path / "resumed", resume=True), whole)
