"""What the stages of a plan read, opened once and checked before any work: the source's parts or a checkpoint's description,
and the data of every stage to come. A mistake in the last stage must not cost the first one's hours.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PretrainedConfig

from diffvl.attention.choose import choose
from diffvl.config.recipe import Data, Stage
from diffvl.config.sources import DataSource
from diffvl.config.supported import is_vlm
from diffvl.conversion.control import CONTROL
from diffvl.conversion.plan import Plan, Step
from diffvl.conversion.resume import is_finished
from diffvl.data.fingerprint import require_as_trained, require_same_data
from diffvl.data.loader import StageData, check_images, load_data
from diffvl.data.sources import own_settings
from diffvl.data.table import RecordTables
from diffvl.errors import ConfigError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.prepare.run import Parts, read_parts
from diffvl.prepare.tiling import processor_of_stage
from diffvl.store import checkpoint
from diffvl.terminal.bars import spinner_or_line
from diffvl.train.launch import process_state
from diffvl.train.parts import require_parts, with_adapters
from diffvl.train.stage import longest_trainable

_NOWHERE = DataSource(path="data that no recipe names")


@dataclass(frozen=True)
class Inputs:
    """parts: of the AR checkpoint, None where a DiffVL directory is there already. data: of each step to come, by its name."""

    parts: Parts | None
    data: dict[str, StageData]


def open_inputs(plan: Plan, accept_changed_data: bool, console: Console, only_to_plan: bool = False) -> Inputs:
    """Opens and checks all that the plan's work reads; what is finished needs nothing.

    Args:
        only_to_plan: data that is not here yet may be missing where the recipe says how many records it has.
    Raises:
        CheckpointError, UnsupportedModelError, ConfigError, DataError.
    """
    if plan.is_remembered:
        return Inputs(None, {})
    parts = None
    if plan.source is not None and not is_finished(plan.start):
        parts = read_parts(plan.source, plan.recipe, plan.source_config)
    to_come = steps_to_come(plan)
    if not to_come:
        return Inputs(parts, {})
    if parts is not None:
        stock, processor = parts.config, parts.processor
    else:
        config, processor = checkpoint.load_description(to_come[0].start)
        stock = config.source_config or config.text_config
    tables = RecordTables(console, look=process_state().is_local_main_process)
    data: dict[str, StageData] = {}
    for step in to_come:
        if only_to_plan and is_to_fetch(step.recipe.stages[step.stage].data):
            continue
        data[step.name] = _open_step(plan, step, stock, processor, tables, accept_changed_data, console)
        processor = data[step.name].train.processor  # a stage goes on with the tiling of the one before
    return Inputs(parts, data)


def steps_to_come(plan: Plan) -> list[Step]:
    """Gives the steps that are not finished."""
    return [step for step in plan.steps if not is_finished(step.directory)]


def is_to_fetch(data: Data) -> bool:
    """Tells whether a recipe says how many records its data has, and that is not on this machine."""
    return data.records is not None and not all(Path(one.path).exists() for one in own_settings(data) or [_NOWHERE])


def _open_step(
    plan: Plan,
    step: Step,
    config: PretrainedConfig,
    processor: DiffVLProcessor,
    tables: RecordTables,
    accept_changed_data: bool,
    console: Console,
) -> StageData:
    """Opens the data of one training run, checked together with what it wants of the trunk.

    Args:
        config: of the stock model that is the trunk. processor: of the checkpoint that the stage goes on from.
    """
    stage = step.recipe.stages[step.stage]
    try:
        with spinner_or_line(console, f"checking the data of {step.name}"):
            _check_trunk(config, stage, plan)
            longest = longest_trainable(config.get_text_config(decoder=True), stage.objective)
            data = load_data(stage.data, processor_of_stage(processor, stage), longest, console, tables)
    except ConfigError as error:
        raise ConfigError(f"{step.name}: {error}") from error
    if not accept_changed_data:
        require_same_data(checkpoint.partial(step.directory), data)
    conversion = plan.root / step.stage
    if step.name == CONTROL and is_finished(conversion):  # else its data is held against its own start, or opened here too
        require_as_trained(conversion, checkpoint.read_state(conversion).get("data", {}), data.parts())
    if process_state().is_main_process:
        check_images(data, stage.data, console)
    return data


def _check_trunk(config: PretrainedConfig, stage: Stage, plan: Plan) -> None:
    """Asks an empty copy of the trunk whether it takes what a stage names. Raises ConfigError if it does not."""
    targets = None if stage.lora is None else stage.lora.targets
    if stage.attention == "auto" and targets is None and not is_vlm(config):
        return
    with torch.device("meta"):
        if is_vlm(config):
            model = DiffVLForConditionalGeneration(DiffVLConfig(source_config=copy.deepcopy(config)))
            require_parts(model, stage)
            empty = model.trunk
        else:
            trusted = plan.source is not None and plan.source.trust_remote_code
            text_config = copy.deepcopy(config.get_text_config(decoder=True))
            empty = AutoModelForCausalLM.from_config(text_config, trust_remote_code=trusted)
    if stage.attention != "auto":
        choose(empty, stage.attention, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if stage.lora is not None and targets is not None and not is_vlm(config):
        with_adapters(empty, stage.lora, targets)
