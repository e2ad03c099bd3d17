"""The plan in figures: what each stage of a dry run will take, of which machine."""

import gc

import torch
from rich.console import Console

from diffvl.conversion.inputs import Inputs, steps_to_come
from diffvl.conversion.plan import Plan, Step
from diffvl.errors import UsageError
from diffvl.estimate.describe import described, described_by_sizes
from diffvl.estimate.machine import machine_of
from diffvl.estimate.outlook import Start, look_ahead
from diffvl.estimate.words import tell_prepared, tell_stage, tell_trial
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store import checkpoint
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import say
from diffvl.train.launch import agreed
from diffvl.train.stage import keeps_dtype, load_to_train, require_machine
from diffvl.train.trial import take_steps


def tell_outlook(plan: Plan, inputs: Inputs, machine_text: str | None, console: Console) -> None:
    """Prints what each stage to come will take.

    Raises:
        UsageError, ConfigError, CheckpointError: for a machine, a stage or a tower of which no plan can be made.
    """
    machine = machine_of(machine_text)
    steps = steps_to_come(plan)
    if not steps:
        return
    start = _start_of_first(plan, inputs, steps[0])
    say(console, ("for", "bold"), f" {machine.told}")
    if plan.source is not None:
        tell_prepared(start, plan.start, console)
    for step in steps:
        name, stage, data = step.name, step.recipe.stages[step.stage], inputs.data.get(step.name)
        processor = start.processor if data is None else data.train.processor
        start = Start(start.config, start.dtype, processor, start.seed)
        with spinner_or_line(console, f"planning {name}: a step without numbers, a few times over"):
            outlook = look_ahead(start, stage, data, machine)
        tell_stage(name, outlook, machine, console)
        if stage.tiling is not None:
            start.config.set_tiling(stage.tiling.settings)


def measure_steps(plan: Plan, inputs: Inputs, console: Console) -> None:
    """Takes a few real steps of each stage to come, from the weights that the first of them starts from: how fast a step is does
    not depend on what weights hold. All processes call it; nothing is written.

    Raises:
        UsageError: the weights or the data of a stage are not here.
        DiffvlError: as training would.
    """
    steps = steps_to_come(plan)
    missing = [step.name for step in steps if step.name not in inputs.data]
    if missing:
        raise UsageError(
            f"--measure takes real steps, and the weights or the data of {missing[0]} are not here: fetch them first"
        )
    for step in steps:
        name, stage, data = step.name, step.recipe.stages[step.stage], inputs.data[step.name]
        sharded = agreed(lambda stage=stage: require_machine(stage))
        if inputs.parts is None:
            model, dtype = load_to_train(steps[0].start, stage, plan.recipe.seed, sharded)
        else:
            with spinner_or_line(console, f"loading {' and '.join(inputs.parts.parents)}"):
                model = inputs.parts.load(plan.recipe)[0]
            dtype = _dtype(inputs.parts.config)
            if not sharded and not keeps_dtype(stage, dtype):
                model.float()
            if stage.tiling is not None:
                model.set_tiling(stage.tiling.settings)
        trial = take_steps(model, dtype, name, stage, plan.recipe.seed, data, data.train.processor, console)
        del model
        gc.collect()
        tell_trial(name, trial, console)


def _start_of_first(plan: Plan, inputs: Inputs, first: Step) -> Start:
    seed = plan.recipe.seed
    if plan.is_remembered:
        assert plan.source is not None and plan.source.vision_tower is not None and plan.source_config is not None
        config = described_by_sizes(plan.source_config, plan.source.vision_tower, plan.recipe)
        return Start(config, torch.bfloat16, None, seed)
    if inputs.parts is not None:
        return Start(described(inputs.parts, plan.recipe), _dtype(inputs.parts.config), inputs.parts.processor, seed)
    directory = first.start
    loaded: tuple[DiffVLConfig, DiffVLProcessor] = checkpoint.load_description(directory)
    return Start(loaded[0], checkpoint.saved_dtype(directory), loaded[1], seed)


def _dtype(config: object) -> torch.dtype:
    """The dtype of a source's weights, as its configuration says."""
    told = getattr(config, "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32
