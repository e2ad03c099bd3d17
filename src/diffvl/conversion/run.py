"""`diffvl convert`: prepare, then the stages asked for, then a report. Plans first, opens what will be read, then works.

Directories under the run's root: `prepared`, `align`, `diffuse`; each appears under its name only when it is complete.

Held-out questions are answered before and after each stage, by the model that is in memory (`samples.jsonl`): no model is loaded
to answer. Before, it has the dtypes that training loads: fp32, or its own where training is in bf16. Afterwards it has those of
the checkpoint that is written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.config.recipe import Stage
from diffvl.conversion.control import CONTROL
from diffvl.conversion.inputs import open_inputs
from diffvl.conversion.outlook import measure_steps, tell_outlook
from diffvl.conversion.plan import ConvertRequest, Plan, Step, check_targets, describe, make_plan
from diffvl.conversion.resume import BEFORE_FILE
from diffvl.conversion.stages import stages_after
from diffvl.data.fingerprint import DATA_FILE, DIGESTS_FILE
from diffvl.data.loader import StageData
from diffvl.data.mixture import Mixture
from diffvl.data.sample_dataset import SampleDataset
from diffvl.decode.answer import Decoder
from diffvl.errors import UsageError
from diffvl.evaluation.evaluate import NUM_SAMPLES, held_out_answers, held_out_scores
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.prepare.run import prepare
from diffvl.report.page import write_report
from diffvl.report.stage_run import SAMPLES_FILE, print_summary
from diffvl.store import checkpoint
from diffvl.store.files import read_json, replace_text
from diffvl.store.metrics import read_json_lines
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import quiet_libraries
from diffvl.terminal.console import say, shell_line
from diffvl.train import checkpoints
from diffvl.train.launch import agreed, is_emulated, main_first, main_only, process_state, require_trackers, with_the_others
from diffvl.train.stage import Onlooker, require_machine, train

SAMPLE_SETTINGS = DecodeSettings(max_new_tokens=48)


def answering(start: Path, work: Path, stage: Stage, console: Console) -> Onlooker:
    """Makes the onlooker that answers before training and again after it, and then writes the samples; and in evaluations, where
    the stage wants it. The first answers are kept in the unfinished directory `work`, for a resume."""
    before = work / BEFORE_FILE

    def answer(
        model: Any, processor: Any, held_out: SampleDataset | Mixture | None, count: int = NUM_SAMPLES
    ) -> list[dict[str, Any]]:
        if held_out is None:
            return []
        device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = Decoder(torch.nn.Module.to(model.eval(), device), processor)
        return held_out_answers(decoder, held_out, stage.data, SAMPLE_SETTINGS, console, count)

    def answer_before(*loaded: Any) -> None:
        if not before.is_file():
            facts = {"start": str(start), "answers": answer(*loaded)}
            replace_text(before, json.dumps(facts, ensure_ascii=False))

    def answer_after(*loaded: Any) -> None:
        _write(work / SAMPLES_FILE, read_json(before)["answers"], answer(*loaded))

    def answer_during(*loaded: Any) -> dict[str, float]:
        answered = answer(*loaded, count=stage.eval_answers)
        return held_out_scores(answered) if answered else {}

    return Onlooker(answer_before, answer_after, answer_during)


def _write(file: Path, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    lines = []
    for old, new in zip(before, after, strict=True):
        asked = {key: new[key] for key in ("image", "video", "question", "truth") if key in new}
        lines.append(json.dumps({**asked, "before": old["answer"], "after": new["answer"]}, ensure_ascii=False) + "\n")
    replace_text(file, "".join(lines))


def convert(request: ConvertRequest) -> Path:
    """Runs the whole conversion; returns the last directory written.

    Raises:
        DiffvlError: on any mistake of the user; what was finished stays.
    """
    quiet_libraries()
    console = terminal.console(quiet=not process_state().is_main_process)
    with with_the_others():
        return _convert(request, console)


def _convert(request: ConvertRequest, console: Console) -> Path:
    process = process_state()
    _check_flags(request)
    plan = agreed(lambda: make_plan(request, console))
    describe(plan, console)
    _warn_of_emulation(request, plan, console)
    agreed(lambda: check_targets(plan, request.resume))
    agreed(lambda: require_trackers(plan.recipe.trackers))
    inputs = main_first(lambda: open_inputs(plan, request.accept_changed_data, console, only_to_plan=request.dry_run))
    if request.dry_run:
        main_only(lambda: tell_outlook(plan, inputs, request.machine, console))
        if request.measure:
            measure_steps(plan, inputs, console)
        say(console, "dry run: nothing was written")
        return plan.root
    steps = plan.steps
    for step in steps:
        if step.name in inputs.data:
            agreed(lambda stage=step.recipe.stages[step.stage]: require_machine(stage))
    source, parts = plan.source, inputs.parts
    if source is not None and parts is not None:
        main_only(lambda: prepare(source, plan.recipe, plan.start, console, parts))
    for step in steps:
        if step.name in inputs.data:
            _run_step(step, request.resume, inputs.data[step.name], console)
        else:
            say(console, (step.name, "bold"), f": finished already, kept: {step.directory}")
            if process.is_main_process:
                _tidy(step.directory)
    last = plan.root / plan.stages[-1] if plan.stages else plan.start
    if process.is_main_process:
        _say_next(last, plan, console)
    return last


def _warn_of_emulation(request: ConvertRequest, plan: Plan, console: Console) -> None:
    """Says before hours of work that they will be days: a recipe for GPUs names bf16 (docs/lossless.md has what that costs)."""
    for step in plan.steps if request.machine is None else ():
        if is_emulated(step.recipe.stages[step.stage]):
            told = f" stages.{step.stage}.precision is bf16, which this machine only emulates, many times slower than fp32; "
            say(console, ("warning:", "bold yellow"), told + f"--set stages.{step.stage}.precision=auto takes fp32 here")


def _check_flags(request: ConvertRequest) -> None:
    """Raises UsageError for a flag without effect."""
    if request.accept_changed_data and not request.resume:
        raise UsageError("--accept-changed-data has no effect without --resume")
    if not request.speed and not request.control:
        raise UsageError("--no-speed has no effect without --control: only the comparison with the control times anything")
    for flag, given in (("--for", request.machine is not None), ("--measure", request.measure)):
        if given and not request.dry_run:
            raise UsageError(f"{flag} has no effect without --dry-run")
    if request.machine is not None and request.measure:
        raise UsageError("--measure takes steps on this machine, and --for plans for another one: leave one of them out")


def _run_step(step: Step, resume: bool, data: StageData, console: Console) -> None:
    """Runs one training from start to report; the directory gets its name when everything in it is written."""
    if step.name == CONTROL:
        say(console, ("\ncontrol", "bold"), ": next-token training from the same start, on the same samples, for as many steps")
    onlooker = answering(step.start, checkpoint.partial(step.directory), step.recipe.stages[step.stage], console)
    train(step.start, step.recipe, step.stage, step.directory, resume, console, onlooker, data)
    main_only(lambda: _finish(step.directory, console))


def _finish(directory: Path, console: Console) -> None:
    write_report(checkpoint.partial(directory))
    checkpoint.finish(directory)
    _tidy(directory)
    print_summary(directory, console)


def _tidy(directory: Path) -> None:
    """Removes from a finished directory what only an unfinished one needs; a kill may have come between its name and this."""
    checkpoints.drop(directory)
    for name in (BEFORE_FILE, DATA_FILE, DIGESTS_FILE):
        (directory / name).unlink(missing_ok=True)


def _say_next(directory: Path, plan: Plan, console: Console) -> None:
    """Prints what was written, and commands to go on with."""
    base = checkpoint.weights_place(directory) if (directory / "config.json").is_file() else directory
    whole = "a checkpoint" if base == directory else f"adapters over {base}, a checkpoint"
    say(console, "\nwrote ", (str(directory), "bold"), f" ({whole} that loads without diffvl, and report.html)")
    for name in stages_after(plan.stages[-1], tuple(plan.recipe.stages))[:1]:
        say(console, "next: ", shell_line("diffvl", "convert", "--from", directory, "--stage", name, "--data", "FILE"))
    samples = read_json_lines(directory / "samples.jsonl")
    shown = [(kind, line[kind], line["question"]) for line in samples for kind in ("image", "video") if line.get(kind)]
    files = (one for one in shown if isinstance(one[1], str) and Path(one[1]).exists())  # an image in a table has no path
    kind, file, question = next(files, ("image", "FILE", "What does the image show?"))
    say(console, "next: ", shell_line("diffvl", "generate", directory, f"--{kind}", Path(file), "--prompt", question))
    say(console, "next: ", shell_line("diffvl", "evaluate", directory, "--data", "FILE"))
