"""The command's arguments -> `Plan`: which checkpoint is prepared, which stages follow, by which recipe, into which directories.

Nothing is opened here but small files: recipes, `diffvl.json` and the source's `config.json`.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PretrainedConfig

from diffvl.config.families import (
    NamedCheckpoint,
    diffusion_source,
    family_of,
    family_of_trunk,
    named_checkpoint,
    recipe_of_name,
    require_known,
)
from diffvl.config.recipe import PREPARED, Data, Lora, Recipe, Stage, StageName
from diffvl.config.resolve import dump, find_recipe, read_yaml, resolve
from diffvl.config.supported import check_supported, is_vlm, is_vlm_type
from diffvl.conversion.control import CONTROL, control_recipe
from diffvl.conversion.diffusion import check_objectives, filled
from diffvl.conversion.lossless import refuse_gated, require_parents
from diffvl.conversion.resume import is_finished, one_spelling, require_same_source, require_same_stage
from diffvl.conversion.stages import newest_before, stage_before, stage_names, stages_after, stages_of_aligned, stages_to_run
from diffvl.conversion.vlm import VLM_RECIPE, check_settings
from diffvl.data.problems import told
from diffvl.data.sources import own_settings
from diffvl.errors import ConfigError, UnreachableError, UsageError
from diffvl.estimate.describe import config_by_sizes
from diffvl.prepare.released import is_released, is_whole
from diffvl.prepare.source import Source
from diffvl.store import checkpoint
from diffvl.store.files import PARTIAL, read_json
from diffvl.store.published import load_config
from diffvl.terminal.console import say, shell_line
from diffvl.train.launch import precision

log = logging.getLogger(__name__)

COMPARED = "compare.html"  # of a conversion with its control


@dataclass(frozen=True)
class ConvertRequest:
    """The arguments of the command. `start` is --from; `assignments` are the --set strings; `machine` is --for; `speed` is False
    with --no-speed."""

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
    machine: str | None = None
    measure: bool = False
    trust_remote_code: bool = False
    control: bool = False
    speed: bool = True


@dataclass(frozen=True)
class Step:
    """One training run of a plan, and the section of its recipe that it is trained by. name: of its directory."""

    name: str
    stage: StageName
    recipe: Recipe
    start: Path
    directory: Path


@dataclass(frozen=True)
class Plan:
    """What will happen. source: the AR checkpoint to prepare, or None when `start` is a DiffVL directory already.
    source_config: the configuration that was read from it; or made of the sizes in its family's file, where the checkpoint could
    not be fetched (`is_remembered`). control: the recipe of the AR control, if one is asked for."""

    start: Path
    root: Path
    stages: tuple[StageName, ...]
    recipe: Recipe
    source: Source | None = None
    source_config: PretrainedConfig | None = None
    is_remembered: bool = False
    control: Recipe | None = None

    @property
    def steps(self) -> list[Step]:
        """The stages in their order, each from the one before it; then the control, from where the last of them starts."""
        starts = [self.start, *(self.root / name for name in self.stages)]
        found = [Step(name, name, self.recipe, start, self.root / name) for name, start in zip(self.stages, starts, strict=False)]
        if self.control is not None:
            found.append(Step(CONTROL, found[-1].stage, self.control, found[-1].start, self.root / CONTROL))
        return found


def make_plan(request: ConvertRequest, console: Console) -> Plan:
    """Resolves names, recipe and directories; touches no weights."""
    plan = _plan_stages(request, console)
    if not request.control:
        return plan
    config = plan.source_config or read_json(plan.start / "config.json").get("text_config") or {}
    source = diffusion_source(config)
    start = plan.start if plan.source is None else None
    return replace(plan, control=control_recipe(plan.recipe, plan.stages, source and source.model_type, start))


def _plan_stages(request: ConvertRequest, console: Console) -> Plan:
    if request.model is not None and request.start is not None:
        raise UsageError(
            "MODEL and --from exclude each other: MODEL starts from an AR checkpoint, --from from a DiffVL directory"
        )
    if request.model is not None:
        plan = _plan_model(request, request.model)
    else:
        plan = _plan_start(request, request.start or _newest_start(request, console))
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
    stages = stages_to_run(request.stage, tree)
    if request.stage is None:
        stages = stages_after(state["kind"], stages)
        if not stages and state["kind"] != PREPARED:
            raise UsageError(
                f"{start} is a finished {state['kind']} run and the recipe has no later stage: name one with --stage"
            )
    root = request.out or (start.parent if start.name == state["kind"] else Path("runs") / start.name)
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
    """Plans to start from an AR checkpoint; with a later stage from the finished run of the one before it."""
    named = named_checkpoint(model)
    path = Path(model)
    name = path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else path.name
    root = request.out or Path("runs") / name
    if start := _start_before(request, [root]):
        plan = _plan_start(request, start)
        if one_spelling(plan.recipe.model or "") != one_spelling(model):
            raise UsageError(f"{plan.start} was made from {plan.recipe.model}, not from {model}: choose another --out")
        return plan
    tree = read_yaml(find_recipe(request.recipe or recipe_of_name(model) or _recipe_of_family(request, path)))
    tree["model"] = model
    whole = is_whole(model)
    if whole:
        _refuse_prepare(request, model)
    stages = stages_of_aligned(tree) if whole and request.stage is None else stages_to_run(request.stage, tree)
    recipe = _resolve(request, tree, stages)
    before = None if whole or request.stage is None else stage_before(request.stage, list(recipe.stages))
    if before is not None:
        command = shell_line("diffvl", "convert", path, "--stage", before)
        raise UsageError(f"--stage {request.stage} goes on from {before}, and {root / before} is not there. Type: {command}")
    if path.exists() and (path / "config.json").is_file():
        _refuse_diffvl(path)
    repo, revision, tower = model, None, recipe.prepare.vision_tower
    if named is not None:
        repo, revision, tower = named[1].repo, named[1].revision, tower or named[1].vision_tower
    require_known(model)
    config, is_remembered = _config_of(request, repo, revision, named)
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
    return Plan(root / PREPARED, root, stages, recipe, source, config, is_remembered)


def _config_of(
    request: ConvertRequest, repo: str, revision: str | None, named: tuple[str, NamedCheckpoint] | None
) -> tuple[PretrainedConfig, bool]:
    """Reads the source's configuration; in a dry run without a connection that of a named checkpoint is made of known sizes."""
    try:
        return load_config(repo, request.trust_remote_code, revision), False
    except UnreachableError as error:
        if not request.dry_run or named is None or not named[1].sizes:
            raise
        log.warning("%s; planning by the sizes that diffvl knows of it", error)
        return config_by_sizes(*named), True


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


def _start_before(request: ConvertRequest, roots: Iterable[Path]) -> Path | None:
    """Finds the finished directory that --stage goes on from."""
    if request.stage is None:
        return None
    names = stage_names(read_yaml(find_recipe(request.recipe))) if request.recipe else []
    return newest_before(request.stage, names, roots)


def _newest_start(request: ConvertRequest, console: Console) -> Path:
    if request.stage is None:
        raise UsageError(
            "name a MODEL (see `diffvl models`), or a DiffVL directory with --from. Example: diffvl convert smollm2-135m"
        )
    found = _start_before(request, Path("runs").glob("*/"))
    if found is None:
        raise UsageError(
            f"--stage {request.stage} without MODEL goes on from the newest finished run of the stage before it, and there is "
            "none under runs/. Type: diffvl convert MODEL --stage align"
        )
    say(console, f"going on from the newest {found.name} run: ", (str(found), "bold"))
    return found


def _resolve(request: ConvertRequest, tree: dict[str, Any], stages: tuple[StageName, ...]) -> Recipe:
    """Resolves the recipe with --data, --lora and --set on top, in this order."""
    if any(text.partition("=")[0].strip() == "model" for text in request.assignments):
        raise ConfigError("--set model=... has no effect: name the checkpoint as MODEL")
    assignments = []
    if request.data is not None:
        for name in stages:
            assignments.append(f"stages.{name}.data.train={json.dumps(told(request.data), ensure_ascii=False)}")
            assignments.append(f"stages.{name}.data.records=null")  # those of other data
    where = f"recipe {request.recipe}" if request.recipe else "recipe"
    recipe = resolve(tree, [*assignments, *request.assignments], where)
    if not request.lora:
        return recipe
    adapted = [name for name in stages if "trunk" in recipe.stages[name].trainable]
    if not adapted:
        raise UsageError("--lora has no effect: no stage that is run trains the trunk")
    fresh = [f"stages.{name}.lora={Lora().model_dump_json()}" for name in adapted if recipe.stages[name].lora is None]
    return resolve(tree, [*assignments, *request.assignments, *fresh], where)


# --- directories -----------------------------------------------------------------------------------------------------------


def check_targets(plan: Plan, resume: bool) -> None:
    """Refuses to touch what is there: finished directories, foreign ones, interrupted runs with other settings."""
    _check_root(plan)
    if plan.source is not None:
        if resume and is_finished(plan.start):
            require_same_source(plan.source.model, plan.source.vision_tower, plan.recipe, plan.start)
        else:
            checkpoint.require_empty(plan.start)
    for step in plan.steps:
        if is_finished(step.directory) and resume:
            require_same_stage(step.recipe, step.stage, step.start, step.directory)
        else:
            checkpoint.require_empty(step.directory)
            work = checkpoint.partial(step.directory)
            if work.exists() and not resume:
                raise UsageError(f"{work} holds an interrupted run: continue it with --resume, or remove it")
            require_same_stage(step.recipe, step.stage, step.start, work)


def _check_root(plan: Plan) -> None:
    """Raises UsageError unless the run's directory can be written and holds nothing but a run."""
    root = plan.root
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        kind = "not a directory" if not there.is_dir() else "not writable"
        raise UsageError(f"{root} cannot be made: {there} is {kind}. Choose another --out")
    names = {PREPARED, CONTROL, *plan.recipe.stages}
    if root.is_dir() and any(root.iterdir()) and not any(_is_run(path, names) for path in root.iterdir()):
        raise UsageError(f"{root} is not empty and holds no diffvl run; nothing was written. Choose another --out")


def _is_run(path: Path, names: set[str]) -> bool:
    """Tells whether a directory is one that a run writes: finished by its file, unfinished by its name."""
    return is_finished(path) or path.name.removesuffix(PARTIAL) in names


# --- the plan in words -----------------------------------------------------------------------------------------------------


def describe(plan: Plan, console: Console) -> None:
    """Prints the plan in a few lines, before anything is done."""
    if plan.source is not None:
        parents = [plan.source.model] if plan.source.vision_tower is None else [plan.source.model, plan.source.vision_tower]
        say(console, ("prepare", "bold"), f" {' + '.join(parents)} -> {plan.start}")
    else:
        say(console, ("start", "bold"), f" from {plan.start}")
    for step in plan.steps:
        stage = step.recipe.stages[step.stage]
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
            (step.name, "bold"),
            f" {detail}; {_images_of(stage)}trains {trains}{' with LoRA' if stage.lora else ''}; {length} of "
            f"{stage.batch_size} x {stage.accumulation} samples per device, {precision(stage)}; data {data_of(stage.data)} "
            f"-> {step.directory}",
        )
    if plan.control is not None:
        say(console, ("compare", "bold"), f" {plan.root / CONTROL} and {plan.root / plan.stages[-1]} -> {plan.root / COMPARED}")


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
