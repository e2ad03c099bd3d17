"""The AR control of a conversion: what next-token finetuning makes of the same start, with the same samples in the same order and
as many steps, in the last stage that is run. Only the objective is another one, and the mask row, which it has no use for, stays
where it is.
"""

from pathlib import Path
from typing import Any

import yaml

from diffvl.config.recipe import Recipe, StageName
from diffvl.config.resolve import dump, resolve
from diffvl.conversion.causal import sees_blocks
from diffvl.errors import ConfigError, UsageError

CONTROL = "control"  # the directory beside those of the stages


def control_recipe(recipe: Recipe, stages: tuple[StageName, ...], diffusion_type: str | None, start: Path | None) -> Recipe:
    """Gives the recipe that the control is trained by.

    Args:
        diffusion_type: the model type, where the source is a diffusion language model already.
        start: the DiffVL directory that the first stage goes on from, if it is there already.
    Raises:
        UsageError, ConfigError: there is nothing to hold the conversion against, or on which.
    """
    if not stages:
        raise UsageError("--control has no effect: there is no stage to run")
    name = stages[-1]
    stage = recipe.stages[name]
    if stage.objective.kind == "ar":
        raise UsageError(f"--control has no effect: stages.{name}.objective is ar, so this run is a control itself")
    if diffusion_type is not None:
        raise UsageError(
            f"--control has no meaning for {diffusion_type}, a diffusion language model: it has not learnt to go on from a text "
            "left to right. Leave it out"
        )
    if (before := sees_blocks(recipe, stages, len(stages) - 1, start)) is not None:
        raise UsageError(
            f"--control trains next-token finetuning from where stages.{name} starts, which is {before}; that has learnt to see "
            "whole blocks (context: block), so its control would be no AR model's finetuning. Leave --control out, train an ar "
            "stage from the checkpoint before the first diffusion stage, and hold both against each other with `diffvl compare`"
        )
    if CONTROL in stages:
        raise UsageError(
            f"--control writes into a directory {CONTROL}, and a stage of the recipe is called so: rename that stage"
        )
    if stage.data.eval is None and not stage.data.holdout:
        raise ConfigError(
            f"--control ends with a comparison on held-out records, and stages.{name} has none: name some with --set "
            f"stages.{name}.data.eval=FILE, or set some apart with --set stages.{name}.data.holdout=200"
        )
    tree: dict[str, Any] = yaml.safe_load(dump(recipe))
    section = tree["stages"][name]
    section["objective"] = {"kind": "ar"}
    section["trainable"] = {part: rate for part, rate in section["trainable"].items() if part != "mask_row"}
    tree["stages"] = {name: section}
    return resolve(tree, [], "--control")
