"""What is compared: finished stage directories, and AR checkpoints as they are published.

Nothing is loaded here but descriptions. A checkpoint of others is put into a DiffVL model in memory, as `prepare` does it, so
that all are asked in the same way; its weights stay as they are. A language model gets the tower and the fresh connector of the
first run that has them, and without such a run its family's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffvl.config.recipe import Data
from diffvl.conversion.plan import ConvertRequest, make_plan
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.errors import UsageError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.machine import has_bf16
from diffvl.prepare.run import read_parts
from diffvl.store import checkpoint
from diffvl.store.files import read_json
from diffvl.store.metrics import METRICS_FILE, Measure, measures_of, read_json_lines
from diffvl.terminal import console as terminal

_QUIET = terminal.console(quiet=True)


@dataclass(frozen=True)
class Entrant:
    """One of those that are compared. directory: of a finished stage, None for a checkpoint of others. data: what its stage was
    trained on, None where it was not trained. measures: its curves. load: gives it in memory, anew each time."""

    name: str
    place: str
    load: Callable[[], Decoder]
    directory: Path | None = None
    data: Data | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def open_entrants(names: Sequence[str], trust_remote_code: bool) -> list[Entrant]:
    """Finds what the names mean: directories first, then whatever `diffvl convert` takes as MODEL.

    Raises:
        UsageError: for fewer than two, or one named twice.
        CheckpointError, ConfigError, UnsupportedModelError: for what is neither.
    """
    places = [str(Path(name).resolve()) if Path(name).exists() else name for name in names]
    if len(places) < 2:
        raise UsageError("a comparison needs two runs at least. Example: diffvl compare runs/demo/control runs/demo/diffuse")
    if twice := [name for number, name in enumerate(names) if places[number] in places[:number]]:
        raise UsageError(f"{twice[0]} is named twice: name two runs, the one that the others are held against first")
    shown = distinct_names(names)
    ours = {name: is_ours(Path(name)) for name in names}
    eyes = next((Path(name) for name in names if ours[name] and has_own_tower(Path(name))), None)
    return [
        _of_directory(label, Path(name)) if ours[name] else _of_others(label, name, eyes, trust_remote_code)
        for label, name in zip(shown, names, strict=True)
    ]


def distinct_names(names: Sequence[str]) -> list[str]:
    """Shortens paths to as many of their last parts as tell them apart. A place named by way of another (`.`, `..`) has its own
    name."""
    paths = [Path(name) for name in names]
    parts = [(path.resolve() if not path.name or ".." in path.parts else path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(one[-count:]) for one in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def is_ours(directory: Path) -> bool:
    """Tells whether a directory is one that `diffvl convert` wrote; a released diffusion model without its state file is too."""
    file = directory / "config.json"
    return file.is_file() and read_json(file).get("model_type") == DiffVLConfig.model_type


def has_own_tower(directory: Path) -> bool:
    """Tells whether a DiffVL directory sees by a tower and a connector that a recipe describes."""
    return read_json(directory / "config.json").get("source_config") is None and (directory / checkpoint.RECIPE_FILE).is_file()


def _of_directory(name: str, directory: Path) -> Entrant:
    """Raises CheckpointError unless the directory is whole."""
    checkpoint.load_description(directory)
    facts = read_json(directory / checkpoint.STATE_FILE) if (directory / checkpoint.STATE_FILE).is_file() else {}
    metrics, kind = directory / METRICS_FILE, facts.get("kind")
    stage = checkpoint.recipe_of(directory).stages.get(str(kind)) if (directory / checkpoint.RECIPE_FILE).is_file() else None
    data = None if stage is None else stage.data
    measures = measures_of(read_json_lines(metrics)) if metrics.is_file() else {}
    return Entrant(name, str(directory), lambda: load_for_decoding(directory), directory, data, measures, facts)


def _of_others(name: str, model: str, eyes: Path | None, trust_remote_code: bool) -> Entrant:
    """Raises what `diffvl convert` raises for a model that it does not take."""
    request = ConvertRequest(model=model, trust_remote_code=trust_remote_code)
    plan = make_plan(request, _QUIET)
    if plan.source is not None and plan.source.vision_tower is not None and eyes is not None:
        recipe = str(eyes / checkpoint.RECIPE_FILE)
        plan = make_plan(ConvertRequest(model=model, recipe=recipe, trust_remote_code=trust_remote_code), _QUIET)
    assert plan.source is not None
    parts = read_parts(plan.source, plan.recipe, plan.source_config)

    def load() -> Decoder:
        model, _ = parts.load(plan.recipe)
        if not has_bf16() and next(model.parameters()).dtype == torch.bfloat16:
            checkpoint.cast_weights(model, torch.float32)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Decoder(torch.nn.Module.to(model.eval(), device), parts.processor)

    return Entrant(name, model, load, facts={"parents": parts.parents, "kind": "as published"})
