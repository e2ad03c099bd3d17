"""The recipes that claim published values have them; those that differ from others say in what."""

import re
from pathlib import Path
from typing import Any

import pytest

from diffvl.config.recipe import Recipe
from diffvl.config.resolve import find_recipe, read_yaml, resolve

GPUS = 8  # of the machine that a recipe's batch sizes are written for, unless it says one

SCRIPTS = "DiffusionVL's launch scripts (llava_pretrain.sh, diffusionvl_qwen_finetune.sh)"
DEFAULTS = "what these scripts leave to transformers' training arguments"
PAPER = "DiffusionVL, arXiv 2512.15713, Eq. 4"
LLAVA = [  # stage, setting, value, source
    ("align", "objective.kind", "ar", SCRIPTS),
    ("align", "trainable", {"connector": 1e-3}, SCRIPTS),
    ("align", "samples of a step", 128, SCRIPTS),
    ("align", "tiling", None, "their argument's default: a square of 384 pixels"),
    ("diffuse", "objective.kind", "block_diffusion", SCRIPTS),
    ("diffuse", "objective.block_size", 8, SCRIPTS),
    ("diffuse", "objective.context", "block", "their attention mask: clean tokens see their whole block"),
    ("diffuse", "objective.grid", "absolute", "their blocks count from token 0"),
    ("diffuse", "objective.target", "same", "their loss: position i predicts token i"),
    ("diffuse", "objective.weight", "1/t", "their loss scale under the linear schedule"),
    ("diffuse", "objective.pad_weight", 1.0, "their end-of-text padding is labelled as answers are"),
    ("diffuse", "objective.noise", {"schedule": "uniform", "t_min": 1e-3, "t_max": 1.0, "draws": "independent"}, PAPER),
    ("diffuse", "trainable", {"trunk": 1e-5, "connector": 1e-5, "mask_row": 1e-5, "tower": 2e-6}, SCRIPTS),
    ("diffuse", "tiling", {"kind": "anyres", "grids": ["1x1-6x6"], "max_tiles": 4}, SCRIPTS),
    ("diffuse", "samples of a step", 256, SCRIPTS),
    ("diffuse", "save_every", 800, SCRIPTS),
    ("diffuse", "data.max_length", 8192, SCRIPTS),
    # There 8,192 too. A square and a caption are about 800 tokens, and 16 rows of 8,192 would not fit a GPU of 80 GB.
    ("align", "data.max_length", 2048, "ours: no record comes near"),
    *(
        (stage, setting, value, source)
        for stage in ("align", "diffuse")
        for setting, value, source in (
            ("epochs", 1, SCRIPTS),
            ("precision", "bf16", SCRIPTS),
            ("gradient_checkpointing", True, SCRIPTS),
            ("optim.schedule", "cosine", SCRIPTS),
            ("optim.warmup_ratio", 0.03, SCRIPTS),
            ("optim.weight_decay", 0.0, SCRIPTS),
            ("optim.beta1", 0.9, DEFAULTS),
            ("optim.beta2", 0.999, DEFAULTS),
            ("optim.max_grad_norm", 1.0, DEFAULTS),
        )
    ),
]

YAML = "SDAR-VL's training files (stages 1 to 4, 4B)"
PLAN = "SDAR-VL, arXiv 2512.14068, Eq. 3 to 7 and its curriculum, as they are quoted"
TRAINED = {"trunk": 1e-5, "connector": 1e-5, "mask_row": 1e-5, "tower": 2e-6}
CURRICULUM = {"mean_start": 0.5, "mean_end": 0.7, "concentration_start": 4, "concentration_end": 25}
SDAR_VL = [
    ("align", "trainable", {"connector": 1e-3}, YAML),
    ("align", "data.row_length", 8192, YAML),
    ("align", "samples of a step", 32, "32 rows: one on each of their 32 GPUs"),
    ("align", "epochs", 2, YAML),
    ("think", "epochs", 5, YAML),
    ("think", "optim.schedule", "constant", YAML),
    ("think", "objective.noise.schedule", "uniform", YAML),
    *((stage, "epochs", 1, YAML) for stage in ("image", "vision", "web", "mix")),
    *((stage, "optim.schedule", "cosine", YAML) for stage in ("align", "image", "vision", "web", "mix")),
    *((stage, "samples of a step", 64, "64 rows: two on each of 32 GPUs") for stage in ("image", "vision", "web", "mix")),
    *((stage, f"objective.noise.{key}", value, PLAN) for stage in ("image", "mix") for key, value in CURRICULUM.items()),
    *(
        (stage, setting, value, source)
        for stage in ("image", "vision", "web", "mix", "think")
        for setting, value, source in (
            ("trainable", TRAINED, YAML),
            ("data.row_length", 16384, YAML),
            ("objective.block_size", 4, YAML),
            ("objective.weight", "effective", PLAN),
            ("objective.target", "same", "its released code"),
            ("objective.context", "block", "its released code"),
            ("data.too_long", "drop", YAML),
            ("optim.warmup_ratio", 0.03, YAML),
            ("precision", "bf16", YAML),
        )
    ),
]

FAST_DVLM, LATER = "Fast-dVLM, arXiv 2604.06832", "Fast-dLLM v2, LLaDA2.0, Dimple"
FAST = [
    ("diffuse", "objective.context", "causal", FAST_DVLM),
    ("diffuse", "objective.ar_weight", 1.0, f"{FAST_DVLM}: half of each loss"),
    ("diffuse", "objective.block_curriculum", {0.0: 2, 0.2: 4, 0.4: 8, 0.6: 16, 0.8: 32}, f"{FAST_DVLM}: from 2 to 32"),
    ("diffuse", "objective.complementary", True, LATER),
    ("diffuse", "objective.target", "shift", "Fast-dLLM v2, I-DLM"),
    ("diffuse", "trainable", {"trunk": 5e-6, "mask_row": 5e-6}, FAST_DVLM),
]


def recipe(name: str) -> Recipe:
    return resolve(read_yaml(find_recipe(name)), [], name)


def value_of(recipe: Recipe, stage: str, setting: str) -> Any:
    if setting == "samples of a step":
        return recipe.stages[stage].batch_size * recipe.stages[stage].accumulation * GPUS
    node: Any = recipe.stages[stage].model_dump()
    for key in setting.split("."):
        node = node[key]
    return node


@pytest.mark.parametrize(("name", "table"), [("llava", LLAVA), ("sdar-vl", SDAR_VL), ("fast", FAST)])
def test_published_values(name: str, table: list[tuple[str, str, Any, str]]):
    resolved = recipe(name)
    wrong = [
        f"stages.{stage}.{setting}: {found!r}, published: {value!r} ({source})"
        for stage, setting, value, source in table
        if (found := value_of(resolved, stage, setting)) != value
    ]
    assert not wrong, "\n".join(wrong)
    assert {stage for stage, *_ in table} == set(resolved.stages)


def test_the_tower_gives_the_layer_and_the_connector_is_the_published_one():
    """The last layer of their tower is removed and the next one's output taken, which is the penultimate one's."""
    for name in ("llava", "llava-parity"):
        prepare = recipe(name).prepare
        assert (prepare.vision_layer, prepare.connector.kind, prepare.connector.gain, prepare.tiling.kind) == (
            -2,
            "mlp2x_gelu",
            1.0,
            "none",
        )


def flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {key: value for name, child in node.items() for key, value in flat(child, f"{path}.{name}".lstrip(".")).items()}


def test_parity_differs_from_llava_in_what_its_header_lists():
    ours, theirs = (flat(recipe(name).model_dump()) for name in ("llava", "llava-parity"))
    stage = "stages.diffuse.objective."
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing == {f"{stage}normaliser", f"{stage}noise.schedule", f"{stage}noise.draws"}, "ramp has no draws"
    header = [line for line in find_recipe("llava-parity").read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    listed = [found for line in header if (found := re.match(r"#   (\w+): (\w+) ", line))]
    assert {(found[1], found[2]) for found in listed} == {("noise", "ramp"), ("normaliser", "samples")}
    assert (theirs[f"{stage}noise.schedule"], theirs[f"{stage}normaliser"]) == ("ramp", "samples")
    assert sum(line.startswith("#   ") and line[4].islower() and line[4:8] != "them" for line in header) >= 6


def test_lora_is_llava_with_adapters_in_4_bits_and_causal_context():
    ours, theirs = recipe("lora"), recipe("llava")
    stage = ours.stages["diffuse"]
    assert stage.lora is not None and stage.lora.bits == 4 and {"mask_row", "connector"} <= set(stage.trainable)
    assert stage.objective == theirs.stages["diffuse"].objective.model_copy(update={"context": "causal"})
    rows = {name: one.batch_size * one.accumulation for name, one in ours.stages.items()}
    assert rows == {name: one.batch_size * one.accumulation * GPUS for name, one in theirs.stages.items()}, "on one GPU"


def test_a_stage_of_an_alias_is_a_stage_of_its_own(tmp_path: Path):
    """Two stages that YAML writes once; what is set in one of them stays there."""
    settings = ["stages.vision.steps=3", "stages.vision.epochs=null", "stages.mix.objective.noise.mean_end=0.6"]
    stages = resolve(read_yaml(find_recipe("sdar-vl")), settings, "sdar-vl").stages
    assert [stages[name].steps for name in ("image", "vision", "web", "mix", "think")] == [None, 3, None, None, None]
    assert [stages[name].objective.noise.mean_end for name in ("image", "mix")] == [0.7, 0.6]  # type: ignore[union-attr]
