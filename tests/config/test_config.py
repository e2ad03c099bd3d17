"""Configuration: what is refused and in which words, what `--set` changes, what is written out."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.config.recipe import Recipe
from diffvl.config.resolve import dump, read_yaml, resolve
from diffvl.errors import ConfigError

TREE: dict[str, Any] = {
    "seed": 3,
    "prepare": {"connector": {"kind": "pixel_shuffle", "factor": 2}},
    "stages": {
        "align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 5},
        "diffuse": {
            "objective": {"kind": "block_diffusion", "noise": {"schedule": "uniform", "t_min": 0.1}},
            "trainable": {"trunk": 1e-5, "mask_row": 1e-5},
            "epochs": 1,
        },
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """TREE with one value set, or removed where `value` is `...`."""
    tree = deepcopy(TREE)
    *sections, name = path.split(".")
    node = tree
    for section in sections:
        node = node[section]
    if value is ...:
        del node[name]
    else:
        node[name] = value
    return tree


def message(tree: dict[str, Any], *assignments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(tree, list(assignments), "my.yaml")
    return str(caught.value)


def test_a_recipe_resolves_to_its_values_and_the_defaults():
    recipe = resolve(TREE, [], "my.yaml")
    diffuse = recipe.stages["diffuse"].objective
    assert isinstance(diffuse, BlockDiffusionObjective)
    assert (recipe.seed, diffuse.block_size, diffuse.context, diffuse.weight) == (3, 8, "block", "1/t")
    assert (diffuse.noise.schedule, recipe.stages["align"].optim.warmup_ratio) == ("uniform", 0.03)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("lr", 1, "lr: unknown key"),
        ("stages.align.step", 1, "stages.align.step: unknown key"),
        ("prepare.connector.width", 1, "prepare.connector.width: unknown key"),
        ("stages.align.objective.block_size", 4, "stages.align.objective.block_size: unknown key"),
        ("stages.diffuse.objective.noise.mean_start", 0.5, "stages.diffuse.objective.noise.mean_start: unknown key"),
        ("stages.algn", {}, "stages.algn.objective: Field required"),
        ("stages.prepared", {}, "stages.prepared: a stage has the name of its directory: small letters, digits, - and _"),
        ("stages.Second one", {}, "stages.Second one: a stage has the name of its directory"),
        ("stages.diffuse.trainable.towr", 1e-6, "stages.diffuse.trainable.towr: Input should be 'tower', 'connector'"),
        ("seed", -1, "seed: Input should be greater than or equal to 0 (got -1)"),
        (
            "stages.diffuse.objective.noise.t_min",
            2,
            "stages.diffuse.objective.noise.t_min: Input should be less than or equal to 1",
        ),
        ("stages.align.trainable.connector", 1, "stages.align.trainable.connector: Input should be less than 1 (got 1)"),
        (
            "prepare.connector.kind",
            "mlp",
            "prepare.connector.kind: expected one of 'mlp2x_gelu', 'linear', 'pixel_shuffle' (got 'mlp')",
        ),
        ("stages.align.objective.kind", ..., "stages.align.objective.kind: missing, it says which kind of objective this is"),
        ("stages.align.objective", ..., "stages.align.objective: Field required"),
        ("stages", {}, "a recipe needs at least one stage, as align or diffuse"),
        ("stages.align.epochs", 1, "stages.align: give exactly one of steps and epochs"),
        ("stages.align.trainable", {}, "stages.align: trainable is empty"),
        ("stages.align.lora", {"rank": 4}, "stages.align: lora has no effect unless trunk is in trainable"),
        ("stages.align.trainable", {"mask_row": 1e-3}, "stages.align: mask_row has no effect under the ar objective"),
        ("stages.align.eval_every", 5, "stages.align: eval_every has no effect without data.eval or data.holdout"),
        ("stages.align.eval_answers", 5, "stages.align: eval_answers has no effect without eval_every"),
        (
            "stages.align.data",
            {"eval": "e.json", "holdout": 3},
            "stages.align.data: holdout has no effect when eval names a file",
        ),
        (
            "stages.diffuse.objective.noise.t_max",
            0.05,
            "stages.diffuse.objective.noise: t_min (0.1) must not be above t_max (0.05)",
        ),
        ("stages.diffuse.objective.ar_weight", 0.1, "stages.diffuse.objective: ar_weight needs context: causal"),
        (
            "stages.diffuse.objective",
            {"kind": "block_diffusion", "context": "causal", "ar_weight": 0.1, "normaliser": "samples"},
            "stages.diffuse.objective: ar_weight needs normaliser: tokens",
        ),
        ("prepare.tiling", {"kind": "none", "max_tiles": 4}, "prepare.tiling.max_tiles: unknown key"),
        ("prepare.tiling", {"max_tiles": 4}, "prepare.tiling.kind: missing, it says which kind of tiling this is"),
        ("prepare.tiling", {"kind": "pad"}, "prepare.tiling.kind: expected one of 'none', 'anyres' (got 'pad')"),
        (
            "stages.diffuse.tiling",
            {"kind": "anyres", "grids": ["2*3"]},
            "stages.diffuse.tiling.grids: '2*3' is no grid: expected ROWSxCOLUMNS like 2x3, or a range of them like 1x1-6x6",
        ),
        (
            "stages.diffuse.tiling",
            {"kind": "anyres", "grids": ["1x1", "3x3-2x4"]},
            "stages.diffuse.tiling.grids: '3x3-2x4': a grid has 1 to 20 rows and columns, and a range goes from",
        ),
        ("stages.diffuse.tiling", {"kind": "anyres", "grids": ["0x2"]}, "stages.diffuse.tiling.grids: '0x2': a grid has 1 to 20"),
        (
            "stages.diffuse.tiling",
            {"kind": "anyres", "grids": []},
            "stages.diffuse.tiling.grids: List should have at least 1 item",
        ),
        (
            "stages.diffuse.tiling",
            {"kind": "anyres", "grids": ["1x1-2x2"], "max_tiles": 5},
            "stages.diffuse.tiling: max_tiles (5) has no effect: the largest of grids has 4 tiles",
        ),
    ],
)
def test_a_wrong_setting_is_named_by_the_path_that_set_takes(path: str, value: Any, words: str):
    said = message(changed(path, value))
    assert said.startswith("my.yaml: ") and words in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "gauss"}, "noise.schedule: expected one of 'uniform', 'clamp', 'ramp', 'beta', 'full' (got 'gauss')"),
        ({"schedule": "uniform", "t_min": 0}, "noise.t_min: Input should be greater than 0 (got 0)"),
        ({"schedule": "uniform", "t_max": 1.5}, "noise.t_max: Input should be less than or equal to 1 (got 1.5)"),
        ({"schedule": "uniform", "t_min": float("nan")}, "noise.t_min: Input should be"),
        ({"schedule": "uniform", "stratified": True}, "noise.stratified: unknown key"),
        ({"schedule": "uniform", "draws": "ramp"}, "noise.draws: Input should be 'independent', 'stratified' or 'synchronous'"),
        ({"schedule": "clamp", "t_min": 0.6, "t_max": 0.4}, "noise: t_min (0.6) must not be above t_max (0.4)"),
        ({"schedule": "ramp", "t_min": 0.6, "t_max": 0.4}, "noise: t_min (0.6) must not be above t_max (0.4)"),
        ({"schedule": "ramp", "draws": "independent"}, "noise.draws: unknown key"),
        ({"schedule": "full", "t_min": 0.5}, "noise.t_min: unknown key"),
        ({"schedule": "beta", "mean_start": 0}, "noise.mean_start: Input should be greater than 0 (got 0)"),
        ({"schedule": "beta", "mean_end": 1}, "noise.mean_end: Input should be less than 1 (got 1)"),
        ({"schedule": "beta", "concentration_end": 0}, "noise.concentration_end: Input should be greater than 0 (got 0)"),
        ({"schedule": "beta", "concentration_end": 1e5}, "noise.concentration_end: Input should be less than or equal to 10000"),
        ({"schedule": "beta", "until": 0}, "noise.until: Input should be greater than 0 (got 0)"),
        ({"schedule": "beta", "until": 1.01}, "noise.until: Input should be less than or equal to 1 (got 1.01)"),
        ({"schedule": "beta", "curve": "step"}, "noise.curve: Input should be 'linear' or 'cosine' (got 'step')"),
        (
            {"schedule": "beta", "mean_start": 0.7, "concentration_start": 25, "curve": "cosine"},
            "noise: curve and until have no effect when mean and concentration end where they start",
        ),
        (
            {"schedule": "beta", "mean_start": 0.7, "concentration_start": 25, "until": 0.5},
            "noise: curve and until have no effect when mean and concentration end where they start",
        ),
    ],
)
def test_a_wrong_noise_setting_is_one_clear_error(settings: dict[str, Any], words: str):
    said = message(changed("stages.diffuse.objective.noise", settings))
    assert said.startswith("my.yaml: 1 wrong setting\n  stages.diffuse.objective.noise")
    assert f"stages.diffuse.objective.{words}" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position_bias": 8.5}, ".position_bias: Input should be less than or equal to 8 (got 8.5)"),
        ({"position_bias": 1, "noise": {"schedule": "full"}}, ": position_bias has no effect with noise.schedule: full"),
        ({"position_bias": 1, "block_size": 1}, ": position_bias has no effect with block_size: 1"),
    ],
)
def test_a_position_bias_that_cannot_act_is_refused(settings: dict[str, Any], words: str):
    said = message(changed("stages.diffuse.objective", {"kind": "block_diffusion", **settings}))
    assert said.startswith(f"my.yaml: 1 wrong setting\n  stages.diffuse.objective{words}")


def test_curve_and_until_act_when_one_of_the_two_moves():
    for still in ({"mean_start": 0.7}, {"concentration_start": 25}):
        noise = {"schedule": "beta", "curve": "cosine", "until": 0.5, **still}
        objective = resolve(changed("stages.diffuse.objective.noise", noise), [], "my.yaml").stages["diffuse"].objective
        assert isinstance(objective, BlockDiffusionObjective) and objective.noise.schedule == "beta"


def test_all_problems_are_reported_at_once():
    tree = changed("stages.diffuse.objective.noise.t_min", 2)
    tree["lr"], tree["seed"] = 1, "x"
    lines = message(tree).splitlines()
    assert lines[0] == "my.yaml: 3 wrong settings"
    assert {line.split(":")[0].strip() for line in lines[1:]} == {"lr", "seed", "stages.diffuse.objective.noise.t_min"}


def test_set_changes_values_in_order_and_leaves_the_tree_alone():
    before = deepcopy(TREE)
    recipe = resolve(
        TREE,
        [
            "stages.align.steps=7",
            "stages.align.steps=9",
            "stages.diffuse.data.train=a b.json",
            "stages.diffuse.objective.noise={schedule: beta, mean_end: 0.8}",
            "stages.align.trainable.connector=5e-4",
        ],
        "my.yaml",
    )
    diffuse = recipe.stages["diffuse"]
    assert recipe.stages["align"].steps == 9
    assert recipe.stages["align"].trainable == {"connector": 5e-4}
    assert diffuse.data.train == "a b.json"
    assert isinstance(diffuse.objective, BlockDiffusionObjective)
    assert diffuse.objective.noise.model_dump()["mean_end"] == 0.8
    assert before == TREE


def test_set_can_exchange_epochs_for_steps():
    stage = resolve(TREE, ["stages.diffuse.epochs=null", "stages.diffuse.steps=2"], "my.yaml").stages["diffuse"]
    assert (stage.epochs, stage.steps) == (None, 2)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stages.align.steps", "expected KEY=VALUE with a dotted key, e.g. --set stages.diffuse.steps=100"),
        ("stages..steps=1", "expected KEY=VALUE"),
        ("seed.deep=1", "seed is a value, not a section"),
        ("seed=[1", "the value is not valid YAML"),
        ("stages.align.stepz=1", "stages.align.stepz: unknown key"),
        ("seed=many", "seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_set_is_explained(assignment: str, words: str):
    assert words in message(TREE, assignment)


def test_grids_are_listed_in_the_published_order():
    """Also after a recipe is written and read again; a grid that is named twice stands once."""
    recipe = resolve(changed("prepare.tiling", {"kind": "anyres", "grids": ["1x1-2x3", "2x2", "1x8"]}), [], "my.yaml")
    recipe = resolve(yaml.safe_load(dump(recipe)), [], "run.yaml")
    pairs = [[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3], [1, 8]]
    assert recipe.prepare.tiling.settings == {"grids": pairs, "max_tiles": 9}
    assert recipe.stages["diffuse"].tiling is None


def test_dump_reads_back_as_the_same_recipe():
    recipe = resolve(TREE, ["stages.diffuse.objective.noise={schedule: beta}", "stages.diffuse.lora={rank: 4}"], "my.yaml")
    assert resolve(yaml.safe_load(dump(recipe)), [], "run.yaml") == recipe


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        resolve(TREE, [], "my.yaml").seed = 4
    assert Recipe.model_config.get("extra") == "forbid"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of settings at the top, got list"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path: Path, text: str | None, words: str):
    file = tmp_path / "recipe.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(str(file)) and words in str(caught.value)


@pytest.mark.parametrize(
    ("noise", "bounded"),
    [
        ({"schedule": "uniform"}, False),
        ({"schedule": "clamp", "t_max": 0.9}, True),
        ({"schedule": "uniform", "t_max": 0.999}, True),
        ({"schedule": "beta"}, True),
        ({"schedule": "beta", "mean_start": 0.8, "concentration_start": 2}, False),
    ],
)
def test_complementary_weights_must_have_a_variance(noise: dict[str, Any], bounded: bool):
    """The second copy weighs 1/(1 - t), which grows without bound where t comes near 1."""
    for weight in ("1/t", "effective"):
        settings = {"complementary": True, "weight": weight, "noise": noise}
        if bounded or weight == "effective":
            assert BlockDiffusionObjective.model_validate(settings).complementary
        else:
            with pytest.raises(ValueError, match="complementary with weight 1/t needs noise that stays below t = 1"):
                BlockDiffusionObjective.model_validate(settings)


def test_a_setting_of_a_stage_that_is_not_there_names_those_that_are():
    with pytest.raises(ConfigError, match=r"^--set stages\.difuse: my\.yaml has no stage 'difuse', only align, diffuse$"):
        resolve(TREE, ["stages.difuse.steps=3"], "my.yaml")


def test_what_yaml_names_once_and_uses_twice_is_two_sections(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    text = "stages: {one: &s {objective: {kind: ar}, trainable: {connector: 0.1}, steps: 1}, two: *s, three: {<<: *s, steps: 2}}"
    file.write_text(text, encoding="utf-8")
    stages = resolve(read_yaml(file), ["stages.two.trainable.connector=0.2"], "x").stages
    assert list(stages) == ["one", "two", "three"]
    assert [stage.trainable["connector"] for stage in stages.values()] == [0.1, 0.2, 0.1]
    file.write_text("stages: &s {one: *s}", encoding="utf-8")
    with pytest.raises(ConfigError, match="a section of the recipe stands in itself"):
        resolve(read_yaml(file), [], "x")
