"""The command's arguments -> `Plan`: which checkpoint is prepared, which stages follow, by which recipe, into which directories.

Nothing is opened here but small files: recipes, `diffvl.json` and the source's `config.json`.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PretrainedConfig

from diffvl.config.families import diffusion_source, family_of, family_of_trunk, named_checkpoint, recipe_of_name, require_known
from diffvl.config.recipe import STAGES, Data, Lora, Recipe, Stage, StageName
from diffvl.config.resolve import dump, find_recipe, read_yaml, resolve
from diffvl.config.supported import check_supported, is_vlm, is_vlm_type
from diffvl.conversion.diffusion import check_objectives, filled
from diffvl.conversion.lossless import refuse_gated, require_parents
from diffvl.conversion.resume import is_finished, one_spelling, require_same_source, require_same_stage
from diffvl.conversion.vlm import VLM_RECIPE, check_settings
from diffvl.data.problems import told
from diffvl.data.sources import own_settings
from diffvl.errors import ConfigError, UsageError
from diffvl.prepare.released import is_released, is_whole
from diffvl.prepare.source import Source
from diffvl.store import checkpoint
from diffvl.store.files import PARTIAL, read_json
from diffvl.store.published import load_config
from diffvl.terminal.console import say, shell_line
from diffvl.train.launch import precision

log = logging.getLogger(__name__)

PREPARED = "prepared"


@dataclass(frozen=True)
class ConvertRequest:
    """The arguments of the command. `start` is --from; `assignments` are the --set strings."""

    model: str | None = None
    stage: StageName | None = None
    recipe: str | None = None
    data: Path | None = None
    start: Path | None = None
    out: Path | None = None
    lora: bool = False
    assignments: tuple[str, ...] = ()
    resume: bool = False
    accept_changed_data: bool = False
    dry_run: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Plan:
    """What will happen. source: the AR checkpoint to prepare, or None when `start` is a DiffVL directory already.
    source_config: the configuration that was read from it."""

    start: Path
    root: Path
    stages: tuple[StageName, ...]
    recipe: Recipe
    source: Source | None = None
    source_config: PretrainedConfig | None = None


def make_plan(request: ConvertRequest, console: Console) -> Plan:
    """Resolves names, recipe and directories; touches no weights."""
    if request.model is not None and request.start is not None:
        raise UsageError(
            "MODEL and --from exclude each other: MODEL starts from an AR checkpoint, --from from a DiffVL directory"
        )
    if request.model is not None:
        plan = _plan_model(request, request.model)
    else:
        plan = _plan_start(request, request.start or _newest_align(request, console))
    require_parents(plan.recipe, plan.stages, plan.start if plan.source is None else None)
    return plan


def _plan_start(request: ConvertRequest, start: Path) -> Plan:
    """Plans to go on from a DiffVL directory, by its own recipe unless another one is named; or to start from a diffusion
    model that somebody released."""
    if is_released(start):
        return _plan_model(request, str(start))
    checkpoint.require_diffvl(start)
    refuse_gated(start)
    state = checkpoint.read_state(start)
    earlier = resolve(read_yaml(start / checkpoint.RECIPE_FILE), [], str(start / checkpoint.RECIPE_FILE))
    _refuse_prepare(request, str(start))
    tree = read_yaml(find_recipe(request.recipe)) if request.recipe else yaml.safe_load(dump(earlier))
    asked = tree.get("prepare")
    tree["prepare"] = earlier.prepare.model_dump(mode="json")
    tree["model"] = earlier.model
    stages: tuple[StageName, ...] = _stages_to_run(request, tree)
    if request.stage is None and state["kind"] in STAGES:
        stages = tuple(name for name in STAGES[STAGES.index(state["kind"]) + 1 :] if name in stages)
        if not stages:
            raise UsageError(
                f"{start} is a finished {state['kind']} run and the recipe has no later stage: name one with --stage"
            )
    root = request.out or (start.parent if start.name in (PREPARED, *STAGES) else Path("runs") / start.name)
    config = read_json(start / "config.json")
    source = diffusion_source(config.get("text_config") or {})
    recipe = _resolve(request, filled(tree, source) if source else tree, stages)
    if request.recipe:
        _tell_other_tiling(asked, config, recipe.stages[stages[0]], start)
    if source is not None:
        check_objectives(recipe, stages, source)
    return Plan(start, root, stages, recipe)


def _tell_other_tiling(asked: Any, config: dict[str, Any], stage: Stage, start: Path) -> None:
    """Warns of a recipe that was written for other images than those which the checkpoint was prepared for.

    Args:
        asked: the recipe's section `prepare`, of which nothing has an effect on a checkpoint. config: the checkpoint's.
    """
    tiling = asked.get("tiling") if isinstance(asked, dict) else None
    kind = "none" if config.get("tiling") is None else "anyres"
    if isinstance(tiling, dict) and tiling.get("kind") not in (None, kind) and stage.tiling is None:
        log.warning(
            "%s sees images with tiling %s, and goes on so; prepare.tiling of the recipe says %s, which a stage can do too: set "
            "tiling in that stage",
            start,
            kind,
            tiling["kind"],
        )


def _plan_model(request: ConvertRequest, model: str) -> Plan:
    """Plans to start from an AR checkpoint; with --stage diffuse from its finished align run."""
    named = named_checkpoint(model)
    path = Path(model)
    name = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    root = request.out or Path("runs") / name
    if request.stage == "diffuse" and is_finished(root / "align"):
        plan = _plan_start(request, root / "align")
        if one_spelling(plan.recipe.model or "") != one_spelling(model):
            raise UsageError(f"{plan.start} was made from {plan.recipe.model}, not from {model}: choose another --out")
        return plan
    tree = read_yaml(find_recipe(request.recipe or recipe_of_name(model) or _recipe_of_family(request, path)))
    tree["model"] = model
    whole = is_whole(model)
    if whole:
        _refuse_prepare(request, model)
    stages: tuple[StageName, ...] = ("diffuse",) if whole and request.stage is None else _stages_to_run(request, tree)
    recipe = _resolve(request, tree, stages)
    if request.stage == "diffuse" and "align" in recipe.stages and not whole:
        aligned, command = root / "align", shell_line("diffvl", "convert", path, "--stage", "align")
        raise UsageError(f"--stage diffuse needs an aligned model, and {aligned} is not there. Type: {command}")
    if path.exists() and (path / "config.json").is_file():
        _refuse_diffvl(path)
    repo, revision, tower = model, None, recipe.prepare.vision_tower
    if named is not None:
        repo, revision, tower = named[1].repo, named[1].revision, tower or named[1].vision_tower
    require_known(model)
    config = load_config(repo, request.trust_remote_code, revision)
    check_supported(config)
    if own := diffusion_source(config):
        recipe = _resolve(request, filled(tree, own), stages)
        check_objectives(recipe, stages, own)
    if is_vlm(config):
        check_settings(recipe, tree)
        tower = None
    elif whole:
        tower = None
    else:
        tower = tower or family_of_trunk(config).vision_tower
    source = Source(repo, revision, tower, request.trust_remote_code)
    return Plan(root / PREPARED, root, stages, recipe, source, config)


def _recipe_of_family(request: ConvertRequest, path: Path) -> str:
    """Gives the default recipe of a model without a name: that of the family which its config.json names, or of all
    vision-language models; of SDAR-VL that of its language model."""
    if is_whole(str(path)) or (not path.exists() and len(path.parts) == 2):  # or a hub id
        config = load_config(str(path), request.trust_remote_code)
        return VLM_RECIPE if is_vlm(config) else family_of_trunk(config).recipe
    file = path / "config.json"  # whatever is wrong with it is told when it is loaded
    settings = read_json(file) if file.is_file() else {}
    return VLM_RECIPE if is_vlm_type(settings) else family_of(str(settings.get("model_type") or None)).recipe


def _refuse_prepare(request: ConvertRequest, start: str) -> None:
    if any(text.partition("=")[0].partition(".")[0].strip() == "prepare" for text in request.assignments):
        raise ConfigError(f"--set prepare.* has no effect: {start} is prepared already")


def _refuse_diffvl(path: Path) -> None:
    if read_json(path / "config.json").get("model_type") == "diffvl":
        command = shell_line("diffvl", "convert", "--from", path, "--stage", "diffuse")
        raise UsageError(f"{path} is a DiffVL directory already; to go on from it: {command}")


def _newest_align(request: ConvertRequest, console: Console) -> Path:
    if request.stage != "diffuse":
        raise UsageError(
            "name a MODEL (see `diffvl models`), or a DiffVL directory with --from. Example: diffvl convert smollm2-135m"
        )
    runs = Path("runs")
    found = checkpoint.newest_finished(runs, "align")
    if found is None:
        raise UsageError(
            "--stage diffuse without MODEL goes on from the newest finished align run, and there is none under runs/. "
            "Type: diffvl convert MODEL --stage align"
        )
    say(console, "going on from the newest align run: ", (str(found), "bold"))
    return found


def _stages_to_run(request: ConvertRequest, tree: dict[str, Any]) -> tuple[StageName, ...]:
    known = tree.get("stages")
    known = known if isinstance(known, dict) else {}
    if request.stage is None:
        return tuple(name for name in STAGES if name in known)
    if request.stage == "align" and "align" not in known and tree.get("stages"):
        raise UsageError(
            f"--stage align: the recipe has no such stage, only {', '.join(known)}. (A vision-language model has an aligned "
            "connector and goes to diffuse directly; name a recipe with an align stage to train a part of it first)"
        )
    if request.stage not in known:
        raise UsageError(f"--stage {request.stage}: the recipe has no such stage, only {', '.join(known) or 'none'}")
    return (request.stage,)


def _resolve(request: ConvertRequest, tree: dict[str, Any], stages: tuple[StageName, ...]) -> Recipe:
    """Resolves the recipe with --data, --lora and --set on top, in this order."""
    if any(text.partition("=")[0].strip() == "model" for text in request.assignments):
        raise ConfigError("--set model=... has no effect: name the checkpoint as MODEL")
    assignments = []
    if request.data is not None:
        assignments += [f"stages.{name}.data.train={json.dumps(told(request.data), ensure_ascii=False)}" for name in stages]
    if request.lora:
        if "diffuse" not in stages:
            raise UsageError("--lora has no effect: the diffuse stage is not run")
        section = tree["stages"]["diffuse"]
        if not isinstance(section, dict) or section.get("lora") is None:
            assignments.append(f"stages.diffuse.lora={Lora().model_dump_json()}")
    where = f"recipe {request.recipe}" if request.recipe else "recipe"
    return resolve(tree, [*assignments, *request.assignments], where)


# --- directories -----------------------------------------------------------------------------------------------------------


def check_targets(plan: Plan, resume: bool) -> None:
    """Refuses to touch what is there: finished directories, foreign ones, interrupted runs with other settings."""
    _check_root(plan.root)
    if plan.source is not None:
        if resume and is_finished(plan.start):
            require_same_source(plan.source.model, plan.source.vision_tower, plan.recipe, plan.start)
        else:
            checkpoint.require_empty(plan.start)
    start = plan.start
    for name in plan.stages:
        directory = plan.root / name
        if is_finished(directory) and resume:
            require_same_stage(plan.recipe, name, start, directory)
        else:
            checkpoint.require_empty(directory)
            work = checkpoint.partial(directory)
            if work.exists() and not resume:
                raise UsageError(f"{work} holds an interrupted run: continue it with --resume, or remove it")
            require_same_stage(plan.recipe, name, start, work)
        start = directory


def _check_root(root: Path) -> None:
    """Raises UsageError unless the run's directory can be written and holds nothing but a run."""
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        kind = "not a directory" if not there.is_dir() else "not writable"
        raise UsageError(f"{root} cannot be made: {there} is {kind}. Choose another --out")
    if root.is_dir() and any(root.iterdir()) and not any(_is_run(path) for path in root.iterdir()):
        raise UsageError(f"{root} is not empty and holds no diffvl run; nothing was written. Choose another --out")


def _is_run(path: Path) -> bool:
    """Tells whether a directory has the name of one that a run writes, finished or not."""
    return path.name.removesuffix(PARTIAL) in (PREPARED, *STAGES)


# --- the plan in words -----------------------------------------------------------------------------------------------------


def describe(plan: Plan, console: Console) -> None:
    """Prints the plan in a few lines, before anything is done."""
    if plan.source is not None:
        parents = [plan.source.model] if plan.source.vision_tower is None else [plan.source.model, plan.source.vision_tower]
        say(console, ("prepare", "bold"), f" {' + '.join(parents)} -> {plan.start}")
    else:
        say(console, ("start", "bold"), f" from {plan.start}")
    for name in plan.stages:
        stage = plan.recipe.stages[name]
        length = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
        objective = stage.objective
        detail = objective.kind
        if objective.kind == "block_diffusion":
            detail += f" (block {objective.block_size}, {objective.context} context, {objective.noise.schedule} noise)"
        elif objective.kind == "draft":
            detail += f" (lossless: {objective.block_size} masks, {objective.drafts} drafts a sample)"
        elif objective.kind == "full_diffusion":
            detail += f" (whole answers, {objective.noise.schedule} noise)"
        trains = ", ".join(f"{part} {rate:g}" for part, rate in stage.trainable.items())
        say(
            console,
            (name, "bold"),
            f" {detail}; {_images_of(stage)}trains {trains}{' with LoRA' if stage.lora else ''}; {length} of "
            f"{stage.batch_size} x {stage.accumulation} samples per device, {precision(stage)}; data {data_of(stage.data)} "
            f"-> {plan.root / name}",
        )


def data_of(data: Data) -> str:
    """Tells in a few words what a stage is trained on."""
    sources = own_settings(data)
    named = [f"{one.path}{'' if one.weight is None else f' x {one.weight:g}'}" for one in sources]
    return (" + ".join(named) or "None") + (" (streamed)" if data.streaming else "")


def _images_of(stage: Stage) -> str:
    """Says how a stage cuts images, where that is its own choice."""
    if stage.tiling is None:
        return ""
    return "one square an image; " if stage.tiling.kind == "none" else f"images in tiles (at most {stage.tiling.max_tiles}); "
