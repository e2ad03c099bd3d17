"""`diffvl convert --control`: the same run but for its objective, the page at its end, and how it goes on."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import torch
from helpers import metrics, random_image, weights_of
from pages import Page
from tiny_runs import record, refused, stage, succeed, write_data, write_recipe

from diffvl.compare import control
from diffvl.config.objectives import ArObjective
from diffvl.config.resolve import read_yaml, resolve
from diffvl.demo import standin_dllms


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> tiny_runs.Run:
    return tiny_runs.finished_run(tmp_path_factory, source, tower, shapes)


@pytest.fixture
def recipe(tower: Path, shapes: dict[str, Path], tmp_path: Path) -> Path:
    shown = {"data": {"holdout": 1}, "eval_every": 1, "eval_limit": 1, "lora": {"rank": 2}}
    return write_recipe(tmp_path / "recipe.yaml", tower, diffuse=stage("diffuse", shapes["train"], **shown))


def test_the_control_differs_by_its_objective_alone_and_a_page_compares_both(
    run: tiny_runs.Run, recipe: Path, tower: Path, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(control, "NEW_TOKENS", 3)
    out = tmp_path / "out"
    words = ("convert", "--from", run.align, "--stage", "diffuse", "--recipe", recipe, "--out", out)
    refused(*words, "--no-speed", says=["--no-speed has no effect without --control"])
    words = (*words, "--control", "--no-speed")
    planned = succeed(*words, "--dry-run").out
    assert "control ar; trains connector 0.001, trunk 0.001 with LoRA; 2 steps" in planned and not out.exists()
    assert f"compare {out}/control and {out}/diffuse -> {out}/compare.html" in planned
    ended = succeed(*words)
    assert f"wrote {out}/diffuse" in ended.out and "control" in ended.out and f"page: {out}/compare.html" in ended.out
    ours, theirs = (resolve(read_yaml(out / name / "run.yaml"), [], name).stages["diffuse"] for name in ("diffuse", "control"))
    assert theirs.objective == ArObjective() and theirs.trainable == {"connector": 1e-3, "trunk": 1e-3}
    assert theirs.model_copy(update={"objective": ours.objective, "trainable": ours.trainable}) == ours
    # It is what the recipe of a control alone gives: the same start, samples, order and steps.
    settings = {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3, "trunk": 1e-3}}
    shown = {"data": {"holdout": 1}, "eval_every": 1, "eval_limit": 1, "lora": {"rank": 2}}
    alone = write_recipe(tmp_path / "alone.yaml", tower, diffuse={**stage("diffuse", shapes["train"], **shown), **settings})
    succeed("convert", "--from", run.align, "--stage", "diffuse", "--recipe", alone, "--out", tmp_path / "alone")
    assert metrics(tmp_path / "alone" / "diffuse") == metrics(out / "control")
    weights, expected = weights_of(out / "control"), weights_of(tmp_path / "alone" / "diffuse")
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    page = out / "compare.html"
    seen = Page(page.read_text(encoding="utf-8")).text
    assert "control, diffuse: compared" in seen and "Nothing was timed: --no-speed was given." in seen
    # What is there stays; what is missing is made.
    shutil.rmtree(out / "control")
    page.unlink()
    told = succeed(*words, "--resume")
    assert re.search(r"diffuse: finished already, kept", told.out) and page.is_file()
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(out / "control").items())
    before = tiny_runs.tree(out)
    told = succeed(*words, "--resume")
    assert f"compare: finished already, kept: {page}" in told.err and tiny_runs.tree(out) == before


def test_a_control_without_a_meaning_is_refused_before_anything(
    run: tiny_runs.Run, recipe: Path, tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    out = tmp_path / "out"

    def refuses(*words: object, says: str) -> None:
        refused("convert", *words, "--out", out, "--control", says=[says])
        assert not out.exists()

    after = ("--from", run.align, "--stage", "diffuse", "--recipe", recipe)
    refuses(*after, "--set", "stages.diffuse.data.holdout=0", "--set", "stages.diffuse.eval_every=null", says="data.holdout=200")
    both = write_recipe(tmp_path / "both.yaml", tower, align=stage("align", shapes["align"]))
    refuses(run.root / "prepared", "--recipe", both, says="is a DiffVL directory already")
    refuses("--from", run.root / "prepared", "--recipe", both, says="this run is a control itself")
    ar = {"objective": {"kind": "ar"}, "trainable": {"trunk": 1e-3}}
    alone = write_recipe(tmp_path / "alone.yaml", tower, diffuse={**stage("diffuse", shapes["train"]), **ar})
    refuses("--from", run.align, "--stage", "diffuse", "--recipe", alone, says="this run is a control itself")


def test_a_control_of_what_has_learnt_to_see_blocks_is_refused(
    run: tiny_runs.Run, tower: Path, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its start would be a block-diffusion model: no AR baseline. One with causal context still answers left to right."""
    held = {"data": {"holdout": 1}}
    more, causal = stage("diffuse", shapes["train"], **held), stage("diffuse", shapes["train"], **held)
    causal["objective"] = {**causal["objective"], "context": "causal"}
    words = ("--control", "--dry-run", "--out", tmp_path / "out")
    says = ["starts, which is", "has learnt to see whole blocks", "`diffvl compare`"]
    two = write_recipe(tmp_path / "two.yaml", tower, diffuse=more, more=more)
    refused("convert", "--from", run.align, "--recipe", two, *words, says=[*says, "the stage diffuse"])
    refused("convert", "--from", run.diffuse, "--stage", "more", "--recipe", two, *words, says=[*says, str(run.diffuse)])
    after = write_recipe(tmp_path / "after.yaml", tower, diffuse=causal, more=more)
    monkeypatch.setattr("diffvl.conversion.run.tell_outlook", lambda *_: None)  # which takes seconds
    planned = succeed("convert", "--from", run.align, "--recipe", after, *words).out
    assert f"compare {tmp_path}/out/control and {tmp_path}/out/more -> " in " ".join(planned.split())
    own = write_recipe(tmp_path / "own.yaml", tower, control=more)
    refused("convert", "--from", run.align, "--recipe", own, *words, says=["a stage of the recipe is called so"])


def test_a_control_of_other_records_is_refused(run: tiny_runs.Run, tower: Path, shapes: dict[str, Path], tmp_path: Path):
    """The conversion is finished, its data has changed since, and the control is still to be trained."""
    (tmp_path / "data").mkdir()
    random_image().save(tmp_path / "data" / "good.png")
    records = [record(answer=f"Dot {number}.") for number in range(6)]
    file = write_data(tmp_path / "data", *records)
    recipe = write_recipe(tmp_path / "r.yaml", tower, diffuse=stage("diffuse", file, data={"holdout": 1}, steps=1))
    words = ("convert", "--from", run.align, "--stage", "diffuse", "--recipe", recipe, "--out", tmp_path / "out")
    succeed(*words)
    write_data(tmp_path / "data", *records[:-1], record(answer="Another."))
    for more in ((), ("--accept-changed-data",)):
        refused(*words, "--control", "--resume", *more, says=[f"was not trained with {file} as it is now"])
    assert not (tmp_path / "out" / "control").exists()
    write_data(tmp_path / "data", *records)
    succeed(*words, "--control", "--resume", "--dry-run")


def test_a_diffusion_language_model_has_no_control(
    dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    shown = stage("diffuse", shapes["train"], data={"holdout": 1})
    recipe = write_recipe(tmp_path / "r.yaml", tower, diffuse=shown)
    words = ("convert", dllm(standin_dllms.DLLMS[0]), "--recipe", recipe, "--out", tmp_path / "out", "--control")
    refused(*words, says=["--control has no meaning for", "a diffusion language model"])
