"""Stages by other names than align and diffuse: their order is the recipe's, and each goes on from the one before."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
import yaml
from tiny_runs import refused, stage, succeed, write_recipe

from diffvl.conversion.stages import stage_before, stages_after, stages_of_aligned, stages_to_run
from diffvl.errors import UsageError
from diffvl.store import checkpoint

NAMES = ("see", "speak", "think_twice")


@pytest.fixture
def recipe(tower: Path, shapes: dict[str, Path], tmp_path: Path) -> Path:
    """Three stages, in an order that no alphabet has."""
    stages = {"see": stage("align", shapes["align"]), "speak": stage("diffuse", shapes["train"])}
    stages["think_twice"] = stage("diffuse", shapes["train"], steps=3)
    file = tmp_path / "recipe.yaml"
    tree = {"prepare": {"vision_tower": str(tower)}, "stages": stages}
    file.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return file


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def finished(run: tiny_runs.Run, recipe: Path, directory: Path, created: str = "2031-01-01T00:00:00+00:00") -> Path:
    """A finished stage of this recipe, with the name of its directory: the align run under another name."""
    shutil.copytree(run.align, directory)
    state = json.loads((directory / "diffvl.json").read_text(encoding="utf-8"))
    (directory / "diffvl.json").write_text(json.dumps({**state, "kind": directory.name, "created": created}), encoding="utf-8")
    old = yaml.safe_load((run.align / "run.yaml").read_text(encoding="utf-8"))
    new = {**old, "stages": yaml.safe_load(recipe.read_text(encoding="utf-8"))["stages"]}
    (directory / "run.yaml").write_text(yaml.safe_dump(new, sort_keys=False), encoding="utf-8")
    return directory


def planned(*words: object) -> list[str]:
    """The plan of a dry run, by the first word of each line, and where the first stage starts."""
    lines = [line for line in succeed("convert", *words, "--dry-run").out.splitlines() if "-> " in line or " from " in line]
    return [line.partition(" ")[0] for line in lines]


def test_all_stages_are_planned_in_the_order_of_the_recipe(recipe: Path, source: Callable[[str], Path], tmp_path: Path):
    assert planned(source("llama"), "--recipe", recipe, "--out", tmp_path / "out") == ["prepare", *NAMES]


def test_a_stage_of_any_name_trains(run: tiny_runs.Run, shapes: dict[str, Path], tower: Path, tmp_path: Path):
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, speak=stage("diffuse", shapes["train"], steps=1))
    succeed("convert", "--from", run.align, "--recipe", recipe, "--out", tmp_path / "out")
    assert checkpoint.read_state(tmp_path / "out" / "speak")["kind"] == "speak"
    refused("export", tmp_path / "out", "-o", tmp_path / "to", says=[f"diffvl export {tmp_path}/out/speak"])
    refused("convert", "--from", tmp_path / "out" / "speak", says=["is a finished speak run and the recipe has no later stage"])


def test_a_stage_goes_on_from_the_one_before(
    run: tiny_runs.Run, recipe: Path, source: Callable[[str], Path], elsewhere: None, tmp_path: Path
):
    """By MODEL and --out, by --from, and by the newest run; without a recipe by that of the run."""
    root = tmp_path / "runs" / "new"
    finished(run, recipe, tmp_path / "runs" / "old" / "see", "2030-01-01T00:00:00+00:00")
    see = finished(run, recipe, root / "see")
    start = "going on from the newest see run: runs/new/see\nstart from runs/new/see\nspeak "
    assert succeed("convert", "--stage", "speak", "--dry-run").out.startswith(start)
    assert planned("--from", see) == ["start", "speak", "think_twice"]
    assert planned("--from", see, "--stage", "think_twice") == ["start", "think_twice"], "--from may leave one out"
    assert planned(source("llama"), "--stage", "speak", "--out", root) == ["start", "speak"]
    assert planned(source("llama"), "--stage", "speak", "--out", root, "--recipe", recipe) == ["start", "speak"]
    says = ["--stage think_twice goes on from speak, and ", "speak is not there. Type: diffvl convert", "--stage speak"]
    refused("convert", source("llama"), "--stage", "think_twice", "--out", root, "--recipe", recipe, says=says)
    refused(
        "convert", "--stage", "think_twice", says=["goes on from the newest finished run of the stage before it, and there is"]
    )
    refused("convert", "--from", see, "--stage", "hear", says=["--stage hear: the recipe has no such stage, only see, speak"])


def test_lora_reaches_every_stage_that_trains_the_trunk(recipe: Path, source: Callable[[str], Path], tmp_path: Path):
    words = ("convert", source("llama"), "--recipe", recipe, "--out", tmp_path / "out", "--lora", "--dry-run")
    told = [line.partition(" ")[0] for line in succeed(*words).out.splitlines() if "with LoRA" in line]
    assert told == ["speak", "think_twice"]
    refused(*words, "--stage", "see", says=["--lora has no effect: no stage that is run trains the trunk"])


def test_the_order_of_stages():
    tree = {"stages": {"b": {"trainable": {"connector": 1}}, "a": {"trainable": {"connector": 1, "trunk": 1}}, "c": None}}
    assert stages_to_run(None, tree) == ("b", "a", "c") and stages_to_run("a", tree) == ("a",)
    assert [stages_after(kind, ("b", "a", "c")) for kind in ("prepared", "b", "c")] == [("b", "a", "c"), ("a", "c"), ()]
    assert [stage_before(name, ["b", "a", "c"]) for name in ("b", "c", "d")] == [None, "a", None]
    assert stages_of_aligned(tree) == ("a", "c"), "a stage that trains the connector alone has nothing to do there"
    with pytest.raises(UsageError, match="MODEL has an aligned connector, and the recipe trains nothing else"):
        stages_of_aligned({"stages": {"b": tree["stages"]["b"]}})
