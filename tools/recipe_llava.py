"""`make recipe-llava`: DiffusionVL's two stages from the data to the figures. Read `main` from top to bottom.

    data fetched and checked -> the plan -> a question -> training -> evaluation -> the AR control and its evaluation

Everything but the data is done by commands, shown as they can be typed: this program knows which words, and in which order.
SCALE=smoke runs the same recipe files on random stand-ins, with sizes and steps that a CPU does in seconds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffvl.cli.output import print_line, print_table
from diffvl.config.recipe import Recipe, Stage
from diffvl.config.resolve import find_recipe, presets, read_yaml, resolve
from diffvl.demo import standins
from diffvl.errors import ConfigError, DiffvlError, UsageError
from diffvl.terminal.bars import quiet_libraries
from diffvl.terminal.console import shell_line
from tools import llava_data

ROWS = {"align": 128, "diffuse": 256}  # samples of a step, as published
MODEL, TRUNK, TOWER = "qwen2.5-7b", "qwen2", "siglip"
SMOKE = Path("runs") / "smoke"  # everything of a smoke run, which each one begins anew
INTERRUPTED = 130  # 128 + SIGINT
NUM_HELD_OUT = 200  # records that are answered
FIGURES = ("exact_match", "edit_similarity", "answers")


@dataclass(frozen=True)
class Choice:
    """What the words of the command say. processes: that train, one for each GPU. machine: that the plan is for."""

    recipe: str
    model: str
    data: Path
    out: Path
    processes: int
    machine: str | None
    smoke: bool
    launch: tuple[str, ...]


# --- the words of `diffvl convert` -------------------------------------------------------------------------------------------


def settings_of(choice: Choice) -> list[str]:
    """Gives what the run sets beside its recipe: data, and how the samples of a step are dealt out to the processes."""
    recipe = resolve(read_yaml(find_recipe(choice.recipe)), [], f"recipe {choice.recipe}")
    if list(recipe.stages) != list(ROWS):
        raise UsageError(
            f"RECIPE={choice.recipe}: has the stages {', '.join(recipe.stages)}, and this run trains align and diffuse, on their "
            "data; for another recipe name the data: diffvl convert MODEL --recipe NAME --data FILE"
        )
    sources = {"align": llava_data.pretraining(choice.data), "diffuse": llava_data.instructions(choice.data)[0]}
    settings = []
    for name, stage in recipe.stages.items():
        sizes = small(stage, choice.processes) if choice.smoke else dealt(name, stage, choice.processes)
        there = choice.smoke or llava_data.is_fetched(
            llava_data.PRETRAIN if name == "align" else llava_data.INSTRUCT, choice.data
        )
        counted = {"data.records": "null"} if there else {}  # what is here is counted, not believed
        given = {"data.train": json.dumps(sources[name]), **counted, **sizes}
        settings += [f"stages.{name}.{key}={value}" for key, value in given.items()]
    return settings


def dealt(name: str, stage: Stage, processes: int) -> dict[str, int]:
    """Deals the samples of a step out: as many of a micro-step as in the recipe, or fewer, and the rest by accumulation."""
    rows, left = divmod(ROWS[name], processes)
    size = min(stage.batch_size, rows)
    if left or rows % max(size, 1):
        raise UsageError(
            f"GPUS={processes}: a step of {name} has {ROWS[name]} samples, which {processes} processes cannot share evenly in "
            f"parts of up to {stage.batch_size}: take 1, 2, 4, 8, ... of them"
        )
    given = {"batch_size": size, "accumulation": rows // size}
    return {key: value for key, value in given.items() if value != getattr(stage, key)}


def small(stage: Stage, processes: int) -> dict[str, Any]:
    """Gives sizes and steps that a CPU does in seconds. Two processes have parts of the model, as GPUs would."""
    given: dict[str, Any] = {
        "epochs": "null",
        "steps": 2,
        "batch_size": 2,
        "accumulation": 2,
        "precision": "fp32",
        "log_every": 1,
    }
    given |= {"data.max_length": 512, "data.workers": 0}
    if processes > 1:
        given["sharding"] = "full"
    if stage.lora is not None and stage.lora.bits is not None:
        given["lora.bits"] = "null"  # these need a GPU
    return given


def control_settings(choice: Choice) -> list[str]:
    """Gives what the AR control sets besides: the same stage with next-token loss, under which no mask row trains."""
    recipe: Recipe = resolve(read_yaml(find_recipe(choice.recipe)), [], f"recipe {choice.recipe}")
    rates = {part: rate for part, rate in recipe.stages["diffuse"].trainable.items() if part != "mask_row"}
    return [f"stages.diffuse.objective={json.dumps({'kind': 'ar'})}", f"stages.diffuse.trainable={json.dumps(rates)}"]


def convert_words(choice: Choice) -> list[str]:
    tower = [f"prepare.vision_tower={choice.data.parent / 'models' / f'tower-{TOWER}'}"] if choice.smoke else []
    return _convert([choice.model], choice, choice.out, [*tower, *settings_of(choice)])


def control_words(choice: Choice) -> list[str]:
    start = ["--from", str(choice.out / "align"), "--stage", "diffuse"]
    settings = [text for text in settings_of(choice) if text.startswith("stages.diffuse.")]
    return _convert(start, choice, _control_of(choice), [*settings, *control_settings(choice)])


def _control_of(choice: Choice) -> Path:
    return choice.out.with_name(f"{choice.out.name}-ar")


def _convert(start: list[str], choice: Choice, out: Path, settings: list[str]) -> list[str]:
    words = ["convert", *start, "--recipe", choice.recipe, "--out", str(out)]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


# --- running it --------------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A command has said what is wrong and ended with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def run(program: list[str], words: list[str], quiet: bool = False, offline: bool = False) -> str:
    """Runs a command, shown as it can be typed; returns what it printed, if it is to be quiet. Raises Failed.

    Args:
        offline: the hub is not asked; what has been fetched from it is found.
    """
    print_line(f"\n$ {shell_line(*_typed(program), *words)}", "bold")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else None
    done = subprocess.run([*program, *words], check=False, text=True, stdout=subprocess.PIPE if quiet else None, env=variables)
    if done.returncode:
        raise Failed(done.returncode)
    return done.stdout or ""


def _typed(program: list[str]) -> list[str]:
    return ["diffvl"] if program == DIFFVL else ["accelerate", "launch", *program[3:]]


DIFFVL = [sys.executable, "-m", "diffvl.cli"]


def launcher(choice: Choice) -> list[str]:
    """Gives the program that trains: the command itself, or that under accelerate in several processes."""
    if choice.processes == 1 and not choice.launch:
        return DIFFVL
    file = presets("recipes") / "accelerate" / f"gpus-{choice.processes}.yaml"
    how = ["--config_file", str(file)] if file.is_file() else ["--multi_gpu", "--num_processes", str(choice.processes)]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, *choice.launch, "-m", "diffvl.cli"]


def agrees() -> bool:
    """Asks whether to go on."""
    sys.stdout.flush()
    try:
        return input("\nTrain this now? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def evaluated(choice: Choice, directory: Path) -> dict[str, Any]:
    """Gives the figures of a checkpoint on the held-out file."""
    held_out = llava_data.instructions(choice.data)[1]
    if held_out is None:
        raise ConfigError(f"{choice.data}: no file is held out of the instruction data, of which there must be two or more")
    limit = "2" if choice.smoke else str(NUM_HELD_OUT)
    return json.loads(run(DIFFVL, ["evaluate", str(directory), "--data", str(held_out), "--limit", limit, "--json"], quiet=True))


def show(figures: dict[str, dict[str, Any]]) -> None:
    """Prints the figures of each checkpoint on a line."""
    rows = [(name, *(_number(one[key]) for key in FIGURES)) for name, one in figures.items()]
    print_line("")
    print_table(["on held-out records", *FIGURES], rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


# --- the words of this program -----------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(description="DiffusionVL's two stages: data, plan, question, training, evaluation.")
    words.add_argument("--recipe", default="llava", help="with the stages align and diffuse; a step gets the published samples")
    words.add_argument("--model", help=f"the language model; default: {MODEL}")
    words.add_argument("--data", type=Path, help="folder of the data, about 120 GB; default: data")
    words.add_argument("--out", type=Path, help="where the run is written")
    words.add_argument("--gpus", type=int, help="GPUs of this machine that train; default: all")
    words.add_argument(
        "--for", dest="machine", metavar="8x80GB", help="with --dry-run: GPUs and memory of the machine to plan for"
    )
    words.add_argument("--launch", default="", help="more words for accelerate launch")
    words.add_argument("--scale", choices=("full", "smoke"), default="full", help="smoke: stand-ins that a CPU does in seconds")
    words.add_argument("--dry-run", action="store_true", help="print the plan, fetch nothing")
    words.add_argument("--yes", action="store_true", help="do not ask")
    words.add_argument("--control", action="store_true", help="train and evaluate the AR control too")
    return words


def chosen(given: argparse.Namespace) -> Choice:
    """Raises UsageError for words that do not fit."""
    machine = None
    if given.machine is not None:
        machine = re.fullmatch(r"(\d+)x\d+(?:\.\d+)?GB", given.machine)
        if machine is None or int(machine[1]) < 1:
            raise UsageError(f"FOR={given.machine}: expected GPUS x MEMORY, as in FOR=8x80GB")
        if not given.dry_run:
            raise UsageError("FOR has an effect on a plan alone: add DRY_RUN=1, or say with GPUS=N how many train")
        if given.gpus is not None:
            raise UsageError("FOR says how many GPUS there are: leave one of them out")
    if given.gpus is not None and given.gpus < 1:
        raise UsageError(f"GPUS={given.gpus}: expected 1 or more")
    smoke = given.scale == "smoke"
    for name in ("model", "data"):
        if smoke and getattr(given, name) is not None:
            raise UsageError(f"{name.upper()} has no effect with SCALE=smoke, which makes stand-ins: leave one of them out")
    processes = int(machine[1]) if machine else given.gpus or (1 if smoke else max(1, torch.cuda.device_count()))
    root, model = SMOKE, given.model or MODEL
    return Choice(
        recipe=given.recipe,
        model=str(root / "models" / f"trunk-{TRUNK}") if smoke else model,
        data=root / "data" if smoke else given.data or Path("data"),
        out=given.out
        or (root / Path(given.recipe).stem if smoke else Path("runs") / f"{Path(model).name}-{Path(given.recipe).stem}"),
        processes=processes,
        machine=given.machine,
        smoke=smoke,
        launch=tuple(given.launch.split()),
    )


def provide(choice: Choice) -> None:
    """Makes data (and in a smoke run models) be there."""
    if not choice.smoke:
        for hub_set in (llava_data.PRETRAIN, llava_data.INSTRUCT):
            llava_data.fetch(hub_set, choice.data)
        return
    quiet_libraries()
    standins.make_trunk(Path(choice.model), TRUNK)
    standins.make_tower(Path(choice.model).with_name(f"tower-{TOWER}"), TOWER)
    llava_data.draw(choice.data)


def follow(choice: Choice, given: argparse.Namespace) -> None:
    """Does it, step by step. Raises DiffvlError, Failed."""
    if not (given.dry_run or given.yes or sys.stdin.isatty()):
        raise UsageError("no terminal is there to ask on: say YES=1 to train without a question, or DRY_RUN=1 for the plan alone")
    if choice.smoke or not given.dry_run:
        provide(choice)
    plan = [] if choice.machine is None else ["--for", choice.machine]
    run(DIFFVL, [*convert_words(choice), "--dry-run", "--resume", *plan], offline=given.dry_run)
    if given.dry_run:
        return
    if not (given.yes or agrees()):
        print_line("nothing was trained")
        return
    for old in (choice.out, _control_of(choice)):
        if SMOKE in old.parents:  # what somebody named with --out is theirs
            shutil.rmtree(old, ignore_errors=True)
    run(launcher(choice), [*convert_words(choice), "--resume"])
    figures = {"block diffusion": evaluated(choice, choice.out / "diffuse")}
    if given.control:
        run(launcher(choice), [*control_words(choice), "--resume"])
        figures["AR control"] = evaluated(choice, _control_of(choice) / "diffuse")
    show(figures)


def main() -> None:
    """A mistake ends in its message and code 2; a command that failed in the code that it had."""
    given = parser().parse_args()
    try:
        follow(chosen(given), given)
    except DiffvlError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Failed as error:
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("interrupted. To continue, type the same again", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
