"""Which of a plan's stages start from weights that answer token by token."""

from pathlib import Path

from diffvl.config.objectives import ArObjective, BlockDiffusionObjective, Objective
from diffvl.config.recipe import Recipe, StageName
from diffvl.store.files import read_json


def sees_blocks(recipe: Recipe, stages: tuple[StageName, ...], place: int, start: Path | None) -> str | None:
    """Names what the stage at `place` starts from, if that has learnt to see whole blocks (`context: block`), and no longer
    answers left to right; None where it does.

    Args:
        start: the DiffVL directory that the first stage goes on from, if it is there already.
    """
    if place:
        return None if _is_causal(recipe.stages[stages[place - 1]].objective) else f"the stage {stages[place - 1]}"
    config = {} if start is None else read_json(start / "config.json")
    is_block = config.get("decoding") == "blocks" and config.get("context") == "block"
    return str(start) if is_block else None


def _is_causal(objective: Objective) -> bool:
    return isinstance(objective, ArObjective) or (
        isinstance(objective, BlockDiffusionObjective) and objective.context == "causal"
    )
