"""What a plan takes over from a trunk that was a diffusion language model already: target and block size, and what it refuses.

For AR trunks both are a choice of the recipe. Here they are facts of the checkpoint, so they fill what a recipe leaves open; what
it says counts, and a contradiction is told.
"""

import copy
import logging
from typing import Any

from diffvl.config.families import DiffusionSource
from diffvl.config.objectives import ArObjective, DraftObjective
from diffvl.config.recipe import Recipe, StageName
from diffvl.errors import ConfigError

log = logging.getLogger(__name__)

DIFFUSION = ("block_diffusion", "full_diffusion")


def filled(tree: dict[str, Any], source: DiffusionSource) -> dict[str, Any]:
    """Gives a recipe as read with the source's target and block size where its diffusion objectives name none."""
    tree = copy.deepcopy(tree)
    stages = tree.get("stages")
    for stage in stages.values() if isinstance(stages, dict) else ():
        objective = stage.get("objective") if isinstance(stage, dict) else None
        if isinstance(objective, dict) and objective.get("kind") in DIFFUSION:
            objective.setdefault("target", source.target)
            if source.block_size is not None and "block_curriculum" not in objective:
                objective.setdefault("block_size", source.block_size)
    return tree


def check_objectives(recipe: Recipe, stages: tuple[StageName, ...], source: DiffusionSource) -> None:
    """Raises ConfigError for a stage that would train a diffusion language model on the next token; warns of another target."""
    for name in stages:
        objective = recipe.stages[name].objective
        if isinstance(objective, ArObjective | DraftObjective):
            raise ConfigError(
                f"stages.{name}.objective: {objective.kind} has no meaning for {source.model_type}, a diffusion language model: "
                f"it predicts masked tokens {_sight(source)}, and has not learnt to go on from a text left to right. Take "
                "full_diffusion (the whole answer at once) or block_diffusion, as the recipes dllm and sdar do"
            )
        if objective.target != source.target:
            log.warning(
                "stages.%s.objective.target is %s, but %s was trained with %s: it has to learn anew what a position predicts",
                name,
                objective.target,
                source.model_type,
                source.target,
            )


def _sight(source: DiffusionSource) -> str:
    return "from both sides" if source.block_size is None else "block by block"
