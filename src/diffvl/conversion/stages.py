"""Which stages of a recipe are run, in the recipe's order, and which finished run the first of them goes on from.

Recipes name their stages as they like. No name has a meaning here but `prepared`, which is no stage's.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffvl.config.recipe import StageName
from diffvl.config.resolve import read_yaml
from diffvl.errors import UsageError
from diffvl.store import checkpoint


def stage_names(tree: dict[str, Any]) -> list[StageName]:
    """Gives the stages of a recipe as read, in order."""
    stages = tree.get("stages")
    return list(stages) if isinstance(stages, dict) else []


def stages_to_run(asked: StageName | None, tree: dict[str, Any]) -> tuple[StageName, ...]:
    """Gives the stage that was asked for, or all. Raises UsageError if the recipe does not have it."""
    known = stage_names(tree)
    if asked is None:
        return tuple(known)
    if asked not in known:
        why = ""
        if asked == "align" and known:
            why = (
                ". (A vision-language model has an aligned connector and goes to diffuse directly; name a recipe with an align "
                "stage to train a part of it first)"
            )
        raise UsageError(f"--stage {asked}: the recipe has no such stage, only {', '.join(known) or 'none'}{why}")
    return (asked,)


def stages_after(kind: str, stages: tuple[StageName, ...]) -> tuple[StageName, ...]:
    """Gives the stages that follow a finished one; all, if it is none of them."""
    return stages[stages.index(kind) + 1 :] if kind in stages else stages


def stages_of_aligned(tree: dict[str, Any]) -> tuple[StageName, ...]:
    """Gives the stages for a source whose connector is aligned already: without those that train nothing else. Raises UsageError
    if none is left."""
    sections = {name: tree["stages"][name] for name in stage_names(tree)}
    rates = {name: section.get("trainable") if isinstance(section, dict) else None for name, section in sections.items()}
    others = tuple(name for name, given in rates.items() if not isinstance(given, dict) or set(given) != {"connector"})
    if not others:
        raise UsageError(
            "MODEL has an aligned connector, and the recipe trains nothing else: name another --recipe, or a --stage"
        )
    return others


def stage_before(stage: StageName, names: Sequence[StageName]) -> StageName | None:
    """Gives the stage before another one, None for the first."""
    place = names.index(stage) if stage in names else 0
    return names[place - 1] if place else None


def newest_before(stage: StageName, names: Sequence[StageName], roots: Iterable[Path]) -> Path | None:
    """Finds the finished stage directory that `stage` goes on from, of several the newest.

    Args:
        names: the stages of the recipe that was named, in order; empty where none was. The order of the recipe by which a
            directory was made counts as well. A recipe that begins with `stage` goes on from a run that knows no such stage.
        roots: the folders of runs.
    """
    for directory in reversed(checkpoint.finished_stages(roots)):
        own = stage_names(read_yaml(directory / checkpoint.RECIPE_FILE))
        before = [stage_before(stage, order) for order in (names, own)]
        if directory.name in before or (stage not in own and list(names[:1]) == [stage]):
            return directory
    return None
