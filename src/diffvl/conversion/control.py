"""The AR control of a conversion: what next-token finetuning makes of the same start, with the same samples in the same order and
as many steps. Only the objective is another one, and the mask row, which it has no use for, stays where it is.
"""

from typing import Any

import yaml

from diffvl.config.recipe import Recipe, StageName
from diffvl.config.resolve import dump, resolve
from diffvl.errors import ConfigError, UsageError

CONTROL = "control"  # the directory beside those of the stages


def control_recipe(recipe: Recipe, stages: tuple[StageName, ...], diffusion_type: str | None) -> Recipe:
    """Gives the recipe that the control is trained by.

    Args:
        diffusion_type: the model type, where the source is a diffusion language model already.
    Raises:
        UsageError, ConfigError: there is nothing to hold the conversion against, or on which.
    """
    if "diffuse" not in stages:
        raise UsageError("--control has no effect: the diffuse stage is not run, and it is what the control is held against")
    stage = recipe.stages["diffuse"]
    if stage.objective.kind == "ar":
        raise UsageError("--control has no effect: stages.diffuse.objective is ar, so this run is a control itself")
    if diffusion_type is not None:
        raise UsageError(
            f"--control has no meaning for {diffusion_type}, a diffusion language model: it has not learnt to go on from a text "
            "left to right. Leave it out"
        )
    if stage.data.eval is None and not stage.data.holdout:
        raise ConfigError(
            "--control ends with a comparison on held-out records, and stages.diffuse has none: name some with --set "
            "stages.diffuse.data.eval=FILE, or set some apart with --set stages.diffuse.data.holdout=200"
        )
    tree: dict[str, Any] = yaml.safe_load(dump(recipe))
    section = tree["stages"]["diffuse"]
    section["objective"] = {"kind": "ar"}
    section["trainable"] = {part: rate for part, rate in section["trainable"].items() if part != "mask_row"}
    tree["stages"] = {"diffuse": section}
    return resolve(tree, [], "--control")
