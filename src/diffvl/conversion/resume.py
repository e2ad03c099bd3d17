"""Whether what lies on disk is the beginning of what is asked for: an interrupted run goes on only as the run it was.

The result of a resumed run is that of one uninterrupted run; so model, tower, settings, seed and start must be the same.
"""

from pathlib import Path
from typing import Any

from diffvl.config.recipe import Recipe, StageName
from diffvl.config.sources import DataSource
from diffvl.data.fingerprint import DATA_FILE
from diffvl.data.sources import find_source
from diffvl.data.table import content_digest
from diffvl.errors import ConfigError
from diffvl.store import checkpoint
from diffvl.store.checkpoint import recipe_of
from diffvl.store.files import read_json
from diffvl.train import checkpoints
from diffvl.train.launch import process_state

BEFORE_FILE = "before.json"  # of an unfinished stage: where it started from, and that checkpoint's answers
# Settings that change no step which was taken: with them a run looks for mistakes, or goes on where it would have stopped.
_WITHOUT_INFLUENCE = tuple(
    f"data.{name}" for name in ("workers", "check_images", "check_lengths", "on_error", "max_skipped", "too_long")
)
_ROWS = "batch_size x accumulation x processes"
_DATA_PATHS = ("data.train", "data.eval", "data.image_folder")  # settings that may change as long as the records are the same


def is_finished(directory: Path) -> bool:
    """Tells whether a directory is complete: only those have the file."""
    return (directory / checkpoint.STATE_FILE).is_file()


def require_same_source(model: str, vision_tower: str | None, recipe: Recipe, prepared: Path) -> None:
    """Raises ConfigError unless `prepared` was made from this checkpoint and tower with these settings."""
    first_model, *first_tower = checkpoint.read_state(prepared)["parents"]
    first = _source_facts(first_model, first_tower[0] if first_tower else None, recipe_of(prepared))
    _refuse_changes(first, _source_facts(model, vision_tower, recipe), prepared)


def require_same_stage(recipe: Recipe, stage: StageName, start: Path, directory: Path) -> None:
    """Raises ConfigError unless the run in `directory`, finished or not, began with these settings and from `start`. Any settings
    are right for a directory in which no run has begun."""
    if not (directory / checkpoint.RECIPE_FILE).is_file():
        return
    first_recipe = recipe_of(directory)
    first, now = (_flat(one.stages[stage].model_dump()) for one in (first_recipe, recipe))
    for key in (*_WITHOUT_INFLUENCE, *_paths_of_same_content(recipe, stage, directory)):
        first.pop(key, None)
        now.pop(key, None)
    _compare_steps(first, now, directory)
    first |= {"seed": first_recipe.seed, "start": one_spelling(_first_start(directory))}
    now |= {"seed": recipe.seed, "start": one_spelling(str(start))}
    if not Path(first["start"]).exists():  # the run was moved since
        del first["start"], now["start"]
    _refuse_changes(first, now, directory)


def _compare_steps(first: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    """Makes the settings of how a step is cut and where a model lies comparable, in place: what counts is the number of rows that
    all processes take together, and whether weights are gathered in bf16."""
    for settings in (first, now):
        if settings["sharding"] != "full_bf16":
            del settings["sharding"]
    rows = _rows_per_step(directory)
    own = now["batch_size"] * now["accumulation"] * process_state().num_processes
    if rows == own:
        for settings in (first, now):
            del settings["batch_size"], settings["accumulation"]
    elif rows is not None:
        first[_ROWS], now[_ROWS] = rows, own


def _rows_per_step(directory: Path) -> int | None:
    """Gives the rows of a step that was taken; None where none was saved."""
    if is_finished(directory):
        return checkpoint.read_state(directory)["state"]["rows_per_step"]
    last = checkpoints.newest(directory)
    return None if last is None else read_json(last / checkpoints.STATE_FILE).get(checkpoints.ROWS)


def one_spelling(name: str) -> str:
    """Gives the name of a checkpoint; where it is a path, its absolute one."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _source_facts(model: str, vision_tower: str | None, recipe: Recipe) -> dict[str, Any]:
    tower = None if vision_tower is None else one_spelling(vision_tower)
    facts = {"model": one_spelling(model), "prepare.vision_tower": tower, "seed": recipe.seed}
    return _flat(recipe.prepare.model_dump(), "prepare.") | facts


def _first_start(directory: Path) -> str:
    """Reads which checkpoint the run in `directory` began from."""
    if is_finished(directory):
        return checkpoint.read_state(directory)["parents"][0]
    return read_json(directory / BEFORE_FILE)["start"]


def _refuse_changes(first: dict[str, Any], now: dict[str, Any], directory: Path) -> None:
    changed = sorted(key for key in first.keys() | now.keys() if first.get(key) != now.get(key))
    if changed:
        lines = "\n".join(f"  {key}: began with {first.get(key)!r}, asked for {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{directory} has other settings, so --resume cannot continue it:\n{lines}\nuse the same, or another --out"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested sections into one level, by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _paths_of_same_content(recipe: Recipe, stage: StageName, directory: Path) -> list[str]:
    """Lists the path settings that need not be the same, because what they lead to is compared: by `require_same_data` where the
    stage is unfinished, here by the files' bytes where it is finished and its data is not read again."""
    if not is_finished(directory):
        return list(_DATA_PATHS) if (directory / DATA_FILE).is_file() else []
    first = checkpoint.read_state(directory).get("data", {})
    data = recipe.stages[stage].data
    same = []
    for name in ("train", "eval"):
        path = getattr(data, name)
        if name in first and isinstance(path, str) and Path(path).is_file() and not data.streaming:
            digest = content_digest(find_source(DataSource(path=path, columns=data.columns)))
            same += [f"data.{name}"] if digest == first[name]["blake2b"] else []
    return [*same, "data.image_folder"] if same else []
