"""What the fidelity study compares: one finetuning, its objective in several forms, everything else the same.

All start from one align checkpoint of their seed, see the same samples in the same order, and take as many steps; (a) to (g) with
the same learning rates (`recipes/demo.yaml`), (h) with those of `recipes/lossless.yaml`. From (b) to (e) one thing is added at a
time; (g) is (b) with another noise. (h) starts from the AR twin, which it leaves as it is, and takes as many steps again: its
answers are the twin's, what it can gain is speed.

In one thing all are alike that the papers do otherwise: a position predicts the token after it (`target: shift`), as the AR model
does. In place (`same`) a few hundred steps teach a model of this size hardly anything, and nothing could be told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffvl.config.resolve import find_recipe, read_yaml, recipe_names, resolve

TWIN = "a"
# What a variant of a recipe of its own does as the others do: it sees as much, and in the precision that the machine is fast in.
_AS_THE_OTHERS = ("data", "steps", "epochs", "batch_size", "accumulation", "precision")
LOSSLESS = "lossless"  # the recipe of (h)
_BLOCKS = {"kind": "block_diffusion", "block_size": 4, "grid": "response", "target": "shift", "pad_weight": 0.1}


@dataclass(frozen=True)
class Variant:
    """One form. about: in a few words. objective: its settings; recipe: a recipe whose diffuse stage is taken in their place.
    after_twin: it starts from the finished AR twin."""

    key: str
    about: str
    objective: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    after_twin: bool = False

    def skipped(self) -> str | None:
        """Says why it cannot be run, if it cannot."""
        if self.recipe is None or self.recipe in recipe_names():
            return None
        return f"there is no recipe `{self.recipe}` in recipes/"


def _noise(schedule: str, **more: Any) -> dict[str, Any]:
    return {"schedule": schedule, **more}


_ASYNCHRONOUS = _noise("uniform", draws="independent")
_VARIANTS = (
    Variant(TWIN, "AR twin: next-token finetuning", {"kind": "ar"}),
    Variant(
        "b",
        "block diffusion as BD3-LM: one t a sample, weight 1/t",
        {**_BLOCKS, "weight": "1/t", "noise": _noise("uniform", draws="synchronous")},
    ),
    Variant("c", "(b) with asynchronous noise: one t a block", {**_BLOCKS, "weight": "1/t", "noise": _ASYNCHRONOUS}),
    Variant(
        "d", "(c) with effective mask ratio scaling in place of 1/t", {**_BLOCKS, "weight": "effective", "noise": _ASYNCHRONOUS}
    ),
    Variant(
        "e",
        "(d) with the progressive Beta curriculum",
        {**_BLOCKS, "weight": "effective", "noise": _noise("beta", draws="independent")},
    ),
    Variant(
        "f",
        "(d) with causal context, an AR loss and complementary masks",
        {
            **_BLOCKS,
            "context": "causal",
            "ar_weight": 1.0,
            "complementary": True,
            "weight": "effective",
            "noise": _ASYNCHRONOUS,
        },
    ),
    Variant(
        "g", "the published ramp: t grows along the sample, weight 1/t", {**_BLOCKS, "weight": "1/t", "noise": _noise("ramp")}
    ),
    Variant("h", "lossless: adapters that draft for the AR twin", recipe=LOSSLESS, after_twin=True),
)
VARIANTS: dict[str, Variant] = {variant.key: variant for variant in _VARIANTS}


@dataclass(frozen=True)
class Size:
    """How much is trained and asked. steps: of each variant; answers: in an evaluation during training; test: at the end, under
    every way to decode; timed: questions that are timed; settings: more assignments, of all stages' recipes."""

    steps: int
    align_steps: int
    eval_every: int
    answers: int
    eval_limit: int
    test: int
    timed: int
    rounds: int
    new_tokens: int
    scenes: tuple[int, int, int]
    settings: tuple[str, ...] = ()


# 150 steps of 8, about those of `make demo`: with these, one night on two slow cores holds three seeds of all variants.
NIGHT = Size(150, 45, 30, 40, 32, 120, 8, 2, 64, (1000, 1200, 120))
PILOT = Size(3, 2, 3, 2, 2, 4, 4, 1, 64, (1000, 1200, 120))
_TINY = ("prepare.connector={kind: linear}", "prepare.vision_layer=-2", "prepare.image_size=null")
_TINY_STAGES = tuple(
    f"stages.{stage}.{setting}"
    for stage in ("align", "diffuse")
    for setting in ("batch_size=2", "precision=fp32", "data.max_length=400")
)
QUICK = Size(4, 1, 2, 2, 2, 4, 1, 1, 6, (8, 10, 4), (*_TINY, *_TINY_STAGES, "stages.diffuse.lora.rank=2"))


def write_recipe(variant: Variant, size: Size, data: Path, tower: Path, more: Sequence[str], file: Path) -> Path:
    """Writes the recipe of a variant, align stage included.

    Args:
        data: folder of the scenes. tower: the vision tower. more: assignments, as `--set` takes them.
    """
    tree = read_yaml(find_recipe("demo"))
    tree["prepare"]["vision_tower"] = str(tower)
    stage = tree["stages"]["diffuse"]
    if variant.recipe is not None:
        own = read_yaml(find_recipe(variant.recipe))["stages"]["diffuse"]
        stage = {key: stage[key] for key in ("data", "attention", "batch_size", "optim")} | {
            key: value for key, value in own.items() if key not in _AS_THE_OTHERS
        }
    else:
        stage["objective"] = variant.objective
        if variant.objective["kind"] == "ar":
            stage["trainable"] = {part: rate for part, rate in stage["trainable"].items() if part != "mask_row"}
    stage |= {"steps": size.steps, "eval_every": size.eval_every, "save_every": size.eval_every}
    stage["eval_limit"] = size.eval_limit
    if stage["objective"]["kind"] != "draft":  # whose answers are the twin's all along
        stage["eval_answers"] = size.answers
    stage["data"] = {**stage["data"], "train": str(data / "train.json"), "eval": str(data / "test.json")}
    align = tree["stages"]["align"]
    align |= {"steps": size.align_steps, "save_every": size.align_steps}
    align["data"] = {**align["data"], "train": str(data / "align.json")}
    tree["stages"] = {"align": align, "diffuse": stage}
    recipe = resolve(tree, [*size.settings, *more], f"variant {variant.key}")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False), encoding="utf-8")
    return file
