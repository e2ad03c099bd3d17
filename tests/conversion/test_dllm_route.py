"""A diffusion language model -> dVLM, with the command: the default recipe, both stages, an answer; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import metrics, weights_of
from tiny_runs import Run, refused, stage, succeed, write_recipe

from diffvl.config.families import DiffusionSource
from diffvl.config.objectives import BlockDiffusionObjective, FullDiffusionObjective
from diffvl.config.recipe import Recipe
from diffvl.config.resolve import find_recipe, read_yaml, resolve
from diffvl.conversion.diffusion import filled
from diffvl.demo.standin_dllms import DLLMS
from diffvl.store.checkpoint import load_checkpoint, recipe_of

SMALL = {"epochs": "null", "steps": 2, "batch_size": 2, "accumulation": 1, "precision": "fp32", "gradient_checkpointing": "false"}
SMALL |= {"data.max_length": 400, "data.workers": 0, "data.holdout": 1, "eval_every": 2, "eval_limit": 1}


def small(tower: Path, *stages: str) -> list[str]:
    """Settings with which a published recipe runs in seconds on a stand-in."""
    settings = [f"prepare.vision_tower={tower}"]
    settings += [f"stages.{name}.{key}={value}" for name in stages or ("align", "diffuse") for key, value in SMALL.items()]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def runs(
    dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """Model type -> a run of both stages by the recipe that its family has."""
    made: dict[str, Run] = {}

    def make(model_type: str) -> Run:
        if model_type not in made:
            root = tmp_path_factory.mktemp("route") / model_type
            printed = succeed("convert", dllm(model_type), "--out", root, "--data", shapes["train"], *small(tower)).out
            made[model_type] = Run(root, root / "prepared" / "run.yaml", printed)
        return made[model_type]

    return make


ROUTES = ["Dream", "sdar", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llada", "sdar_moe"))]


@pytest.mark.parametrize("model_type", ROUTES)
def test_prepare_align_diffuse_generate(model_type: str, runs: Callable[[str], Run], shapes: dict[str, Path]):
    run = runs(model_type)
    blocks = model_type.startswith("sdar")
    assert f"{'block' if blocks else 'bidirectional'} parity: largest difference 0.0e+00" in run.output and "AR" not in run.output
    align, diffuse = (recipe_of(run.diffuse).stages[name].objective for name in ("align", "diffuse"))
    assert isinstance(align, BlockDiffusionObjective if blocks else FullDiffusionObjective)
    target = "shift" if model_type == "Dream" else "same"
    assert isinstance(diffuse, BlockDiffusionObjective) and diffuse.target == align.target == target
    for directory in (run.align, run.diffuse):
        model, _ = load_checkpoint(directory)
        assert (model.config.decoding, model.config.target) == ("blocks", target)
        assert model.config.text_config.diffusion_source["model_type"] == model_type
        assert all(line.get("loss", 1.0) > 0 for line in metrics(directory))
    image = shapes["test"].parent / json.loads(shapes["test"].read_text(encoding="utf-8"))[0]["image"]
    asked = ("--image", image, "--prompt", "What is it?", "--max-new-tokens", 8)
    for directory in (run.root / "prepared", run.align, run.diffuse):
        assert succeed("generate", directory, *asked).code == 0


def test_align_trains_the_connector_alone(runs: Callable[[str], Run]):
    run = runs("Dream")
    before, after = weights_of(run.root / "prepared"), weights_of(run.align)
    moved = {name.partition(".")[0] for name, tensor in after.items() if not tensor.equal(before[name])}
    assert moved == {"connector"}


# --- what the source fills in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dllm", "sdar", "llava"])
def test_target_and_block_size_fill_what_the_recipe_leaves_open(name: str):
    """A recipe of AR trunks names a target; the recipes of diffusion models do not."""
    tree = read_yaml(find_recipe(name))
    before = yaml.safe_dump(tree)
    source = DiffusionSource("x", 3, "shift", 16)
    recipe: Recipe = resolve(filled(tree, source), [], name)
    assert yaml.safe_dump(tree) == before
    align, diffuse = (recipe.stages[stage].objective for stage in ("align", "diffuse"))
    assert isinstance(diffuse, BlockDiffusionObjective)
    assert diffuse.target == ("same" if name == "llava" else "shift")
    assert diffuse.block_size == (16 if name == "sdar" else 8)
    if name == "dllm":
        assert isinstance(align, FullDiffusionObjective) and (align.target, align.block_size) == ("shift", 32)


@pytest.mark.parametrize("model_type", DLLMS)
def test_a_directory_without_a_name_gets_the_recipe_of_its_family(
    model_type: str, dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    words = ("convert", dllm(model_type), "--out", tmp_path / "out", "--data", shapes["train"], "--dry-run")
    printed = " ".join(succeed(*words, *small(tower)).out.split())
    if model_type.startswith("sdar"):
        assert "align block_diffusion (block 4, block context, uniform noise)" in printed
        assert "diffuse block_diffusion (block 4, block context, beta noise)" in printed
    else:
        assert "align full_diffusion (whole answers, uniform noise)" in printed
        assert "diffuse block_diffusion (block 8, block context, uniform noise)" in printed
    printed = " ".join(succeed(*words, *small(tower), "--set", "stages.diffuse.objective.block_size=2").out.split())
    assert "diffuse block_diffusion (block 2," in printed


def test_another_target_is_told(
    dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    words = ("convert", dllm("Dream"), "--out", tmp_path / "out", "--data", shapes["train"], "--dry-run", *small(tower))
    succeed(*words, "--set", "stages.diffuse.objective.target=same")
    told = [message for message in caplog.messages if "target" in message]
    assert len(told) == 1 and told[0].startswith("stages.diffuse.objective.target is same, but Dream was trained with shift")


# --- what is refused -----------------------------------------------------------------------------------------------------------

NO_MEANING = "ar has no meaning for llada, a diffusion language model: it predicts masked tokens from both sides"


@pytest.mark.parametrize("where", ["align", "diffuse"])
def test_the_next_token_loss_is_refused(
    where: str, dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    kinds: dict[str, Any] = {name: stage("diffuse", shapes["train"]) for name in ("align", "diffuse")}
    kinds[where] = stage("align", shapes["train"])
    recipe = write_recipe(tmp_path / "recipe.yaml", tower, **kinds)
    says = [f"stages.{where}.objective: {NO_MEANING}", "as the recipes dllm and sdar do"]
    refused("convert", dllm("llada"), "--recipe", recipe, "--out", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists()


def test_it_is_refused_later_too(runs: Callable[[str], Run], shapes: dict[str, Path], tmp_path: Path):
    words = ("convert", "--from", runs("Dream").align, "--stage", "diffuse", "--recipe", "ar-control", "--data", shapes["train"])
    refused(*words, "--out", tmp_path / "out", says=[NO_MEANING.replace("llada", "Dream")])


def test_another_recipe_later_is_filled_too(runs: Callable[[str], Run], shapes: dict[str, Path], tmp_path: Path):
    """The directory remembers what its trunk was."""
    words = ("convert", "--from", runs("Dream").align, "--stage", "diffuse", "--recipe", "dllm", "--data", shapes["train"])
    out = tmp_path / "out"
    succeed(*words, "--out", out, "--lora", *small(Path(), "diffuse")[2:])
    objective = recipe_of(out / "diffuse").stages["diffuse"].objective
    assert isinstance(objective, BlockDiffusionObjective) and objective.target == "shift"


def test_a_model_that_is_no_stock_one(dllm: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((dllm("llada") / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"alibi": True}), encoding="utf-8")
    words = ("convert", model, "--out", tmp_path / "out", "--data", shapes["train"], *small(tower))
    refused(*words, says=["alibi True (expected False)", "A llada model is read as a stock llama"])


def test_models_lists_them():
    rows = [line.replace("│", " ").split() for line in succeed("models").out.splitlines()]
    for name, repo, recipe in (("llada-8b", "GSAI-ML/LLaDA-8B-Instruct", "dllm"), ("sdar-8b", "JetLM/SDAR-8B-Chat", "sdar")):
        assert any(row[:6] == [name, repo, "diffusion", "language", "model", recipe] for row in rows)
