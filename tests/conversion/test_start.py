"""The start of a run: its data is read and measured once and by one process, its model is loaded once."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets.config
import pytest
import tiny_runs
from forks import Forks
from helpers import QUIET
from processes import on_processes
from tiny_runs import record, stage, succeed, write_data, write_recipe
from transformers import AutoImageProcessor, AutoTokenizer

from diffvl.config.recipe import Data
from diffvl.conversion.run import SAMPLE_SETTINGS
from diffvl.data import packing, table
from diffvl.data.loader import load_data
from diffvl.decode import answer as decode
from diffvl.evaluation.evaluate import held_out_answers
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store import checkpoint, published
from diffvl.train import launch as processes


@pytest.mark.parametrize("holdout", [0, 1])
def test_a_stage_loads_its_model_and_measures_its_data_once(
    holdout: int, source: Callable[[str], Path], tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[str] = []
    measured: list[int] = []
    load, measure = checkpoint.load_model, packing._measure
    monkeypatch.setattr(checkpoint, "load_model", lambda path, *dtype: (loaded.append(path.name), load(path, *dtype))[1])
    monkeypatch.setattr(decode, "load_checkpoint", lambda path: pytest.fail(f"{path} loaded to answer"))
    monkeypatch.setattr(packing, "_measure", lambda *arguments: (measured.append(arguments[-1]), measure(*arguments))[1])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    packed = {"data": {"holdout": holdout, "row_length": 400}, "batch_size": 1}
    files = [write_data(tmp_path, *[record(answer=answer)] * 5, name=f"{answer}.json") for answer in ("Red.", "Blue.")]
    stages = {name: stage(name, file, **packed) for name, file in zip(("align", "diffuse"), files, strict=True)}
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, **stages)
    succeed("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    assert [name for name in loaded if not name.endswith(checkpoint.PARTIAL)] == ["prepared", "align"] and len(measured) == 10
    samples = (tmp_path / "out" / "diffuse" / "samples.jsonl").read_text(encoding="utf-8")
    assert len(samples.splitlines()) == holdout


def test_nothing_is_opened_twice(source: Callable[[str], Path], tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both stages read the same files. What was written is read once more, to prove it; a model once more for each stage."""
    opened: dict[str, Counter[str]] = {}

    def count(owner: Any, name: str) -> None:
        call, counter = getattr(owner, name), opened.setdefault(f"{owner.__name__.rpartition('.')[2]}.{name}", Counter())

        def counted(path: Any, *arguments: Any, **named: Any) -> Any:
            counter[Path(getattr(path, "path", path)).name] += 1
            return call(path, *arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(published, "_settings")  # of a checkpoint that others published: its config.json
    count(table, "_content_of")
    count(table, "parse_source")
    for owner in (AutoTokenizer, AutoImageProcessor, DiffVLProcessor, DiffVLForConditionalGeneration):
        count(owner, "from_pretrained")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train, held_out = (write_data(tmp_path, *[record(answer=answer)] * 2, name=f"{answer}.json") for answer in ("Red.", "Blue."))
    stages = {name: stage(name, train, data={"eval": str(held_out)}) for name in ("align", "diffuse")}
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, **stages)
    succeed("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    trunk = source("llama").name
    assert opened == {
        "published._settings": {trunk: 1, tower.name: 1},
        "table._content_of": {train.name: 1, held_out.name: 1},
        "table.parse_source": {train.name: 1, held_out.name: 1},
        "AutoTokenizer.from_pretrained": {trunk: 1, "prepared.partial": 1},
        "AutoImageProcessor.from_pretrained": {tower.name: 1, "prepared.partial": 1},
        "DiffVLProcessor.from_pretrained": {"prepared.partial": 1},
        "DiffVLForConditionalGeneration.from_pretrained": {"prepared.partial": 1, "prepared": 1, "align": 1},
    }


@pytest.mark.parametrize(("name", "when", "start"), [("align", "after", "align"), ("diffuse", "before", "align")])
def test_the_model_in_memory_answers_as_its_checkpoint_does(
    name: str, when: str, start: str, run: tiny_runs.Run, shapes: dict[str, Path]
):
    decoder = decode.load_for_decoding(run.root / start)
    file = shapes["align" if name == "align" else "train"]
    data = Data(train=str(file), holdout=1, max_length=tiny_runs.MAX_LENGTH)
    held_out = load_data(data, decoder.processor, None).held_out
    assert held_out is not None
    (fresh,) = held_out_answers(decoder, held_out, data, SAMPLE_SETTINGS, QUIET)
    (told,) = map(json.loads, (run.root / name / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    assert told[when] == fresh["answer"] and told["question"] == fresh["question"]


def test_barriers_are_patient(monkeypatch: pytest.MonkeyPatch):
    """Longer than NCCL's own 10 minutes, which reading, preparing, answering and saving exceed."""
    given: dict[str, Any] = {}

    class State:
        num_processes = 1

        def __init__(self, **named: Any) -> None:
            given.update(named)

    monkeypatch.setattr(processes, "PartialState", State)
    processes.process_state()
    assert given["timeout"] >= timedelta(hours=2)


# --- two processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["diffvl", pytest.param("fresh diffvl", marks=pytest.mark.slow)])
def test_a_command_on_two_processes(program: str, forks: Forks, source: Callable[[str], Path], tower: Path, tmp_path: Path):
    """One reads, measures, prepares and answers, the other waits; a mistake that one finds ends both."""
    file = write_data(tmp_path, *[record()] * 5)
    recipe = write_recipe(
        tmp_path / "recipe.yaml", tower, diffuse=stage("diffuse", file, data={"holdout": 1, "row_length": 400}, batch_size=1)
    )
    words = ("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out")
    bad = write_data(tmp_path, record(), record(answer=""), name="bad.json")
    ended = on_processes(forks, tmp_path, program, [*words, "--data", bad])
    assert [one.code for one in ended] == [2, 2]
    assert ["bad.json:3: turn 2: empty answer" in one.err for one in ended] == [True, False], "one of them tells it"
    assert not any("Traceback" in one.err for one in ended)
    assert not (tmp_path / "out").exists()
    ended = on_processes(forks, tmp_path, program, words)
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[1].out == "" and len((tmp_path / "out" / "diffuse" / "samples.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("has_bf16", [True, False])
def test_bf16_where_it_is_only_emulated_is_told_before_any_work(
    has_bf16: bool,
    source: Callable[[str], Path],
    tower: Path,
    shapes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(processes, "has_bf16", lambda: has_bf16)
    stages = {"align": stage("align", shapes["align"]), "more": stage("diffuse", shapes["train"], precision="bf16")}
    recipe = write_recipe(tmp_path / "r.yaml", tower, **stages)
    words = ("convert", source("qwen2"), "--recipe", recipe, "--out", tmp_path / "run", "--dry-run")
    told = "warning: stages.more.precision is bf16, which this machine only emulates, many times slower than fp32; --set "
    said = " ".join(succeed(*words).out.split())
    assert (f"{told}stages.more.precision=auto takes fp32 here" in said) is not has_bf16 and "stages.align.precision" not in said
    for more in (("--for", "80GB"), ("--set", "stages.more.precision=auto")):
        assert "emulates" not in succeed(*words, *more).out
