"""What a lossless conversion asks of the checkpoint that it starts from: that it answers token by token, and can be kept."""

from pathlib import Path

from diffvl.config.recipe import Recipe, StageName
from diffvl.conversion.causal import sees_blocks
from diffvl.errors import ConfigError, UsageError
from diffvl.store import checkpoint
from diffvl.store.files import read_json


def refuse_gated(start: Path) -> None:
    """Raises UsageError for a lossless conversion, over which no stage can go on."""
    if read_json(start / "config.json").get("gated_adapter") is not None:
        raise UsageError(
            f"{start} is a lossless conversion, whose adapters stand on {checkpoint.weights_place(start)} and cannot be merged "
            "into it: start from there, with more steps if it is to draft better"
        )


def require_parents(recipe: Recipe, stages: tuple[StageName, ...], start: Path | None) -> None:
    """Raises ConfigError for a stage of drafts over weights that have learnt to see whole blocks.

    Args:
        start: the DiffVL directory that the first stage goes on from, if it is there already.
    """
    for place, name in enumerate(stages):
        if recipe.stages[name].objective.kind != "draft":
            continue
        if (before := sees_blocks(recipe, stages, place, start)) is not None:
            raise ConfigError(
                f"stages.{name}.objective: draft needs a parent that answers token by token, to check drafts; {before} has "
                "context: block. Start from an AR checkpoint, from an align stage, or from one with context: causal"
            )
