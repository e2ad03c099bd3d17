"""The words of the command line: argv -> one call into the package -> text, or one message and an exit code.

Invariant: torch and transformers are imported inside commands only, so that `--help` answers at once. Flags name things (paths,
seed, how to decode); a hyperparameter has no flag of its own, it is set with `--set`.
"""

import contextlib
import errno
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffvl.cli.answers import answers
from diffvl.cli.bench import bench
from diffvl.cli.benchmarks import BatchSize, IncludePath, Tasks, evaluate_tasks, exclude_tasks_flags
from diffvl.cli.compare import compare, print_compared
from diffvl.cli.decode import chat, generate
from diffvl.cli.export import export, push
from diffvl.cli.output import print_json, print_line, print_table
from diffvl.cli.serve import serve
from diffvl.cli.settings import settings_of, with_settings
from diffvl.config.recipe import VERSION
from diffvl.errors import EXIT_CODE, MACHINE_CODE, DiffvlError, UsageError, first_line
from diffvl.store.files import Writing
from diffvl.terminal import console as terminal

if TYPE_CHECKING:
    from diffvl.doctor.verdict import Verdict

INTERRUPTED = 130  # 128 + SIGINT, what Typer exits with on Ctrl-C
CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell sees of a program that died of it

app = typer.Typer(
    help="Turn an autoregressive language model into a block-diffusion vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(bench, name="bench", epilog="Example:  diffvl bench decode runs/demo/diffuse --data test.json --sweep")

MODEL_HELP = "A name from `diffvl models`, a hub id, a directory or a .gguf file; --stage diffuse can do without."
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random draw.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the Python code that MODEL brings along.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"diffvl {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("diffvl").setLevel(logging.INFO)


@app.command(
    epilog="Example:  diffvl convert qwen2.5-7b --stage align --data a.json, then  diffvl convert --stage diffuse --data b.json"
)
def convert(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    stage: Annotated[
        str | None, typer.Option(help="Only this stage of the recipe. Default: all in order.", metavar="NAME")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="A name from `diffvl recipes` or a file.", metavar="NAME|FILE")] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA-format .json or .jsonl to train on.", metavar="FILE")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="The run that the stage starts from.", metavar="DIR")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: under runs/.", metavar="DIR")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters on the trunk, merged at the end.")] = False,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Change a setting; repeatable.", metavar="A.B=C")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    accept_changed_data: Annotated[
        bool, typer.Option("--accept-changed-data", help="With --resume: go on although the data has changed.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, and say what would be done and what it takes: steps, memory, disk."),
    ] = False,
    machine: Annotated[
        str | None, typer.Option("--for", help="With --dry-run: plan for other GPUs than there are here.", metavar="8x80GB")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="With --dry-run: time a few real steps of each stage.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    control: Annotated[
        bool, typer.Option("--control", help="Train next-token finetuning beside it, and compare both on one page.")
    ] = False,
    speed: Annotated[
        bool, typer.Option(" /--no-speed", help="With --control: time nothing, so that one model at a time is in memory.")
    ] = True,
) -> None:
    """Convert MODEL: connect a vision tower, align it, train block diffusion, write a checkpoint."""
    for flag, name in {
        "MODEL": model,
        "--stage": stage,
        "--recipe": recipe,
        "--data": data,
        "--from": start,
        "--out": out,
    }.items():
        _check_name(flag, str(name or ""))
    from diffvl.conversion.run import ConvertRequest
    from diffvl.conversion.run import convert as run_convert

    request = ConvertRequest(
        model=model,
        stage=stage,
        recipe=recipe,
        data=data,
        start=start,
        out=out,
        lora=lora,
        assignments=tuple(assignments or ()),
        resume=resume,
        accept_changed_data=accept_changed_data,
        dry_run=dry_run,
        machine=machine,
        measure=measure,
        trust_remote_code=trust_remote_code,
        control=control,
        speed=speed,
    )
    if not control:
        run_convert(request)
        return
    from diffvl.compare.control import convert_with_control
    from diffvl.conversion.plan import COMPARED

    directory, compared = convert_with_control(request)
    if compared is not None:
        print_compared(compared, directory.parent / COMPARED)


def _check_name(flag: str, name: str) -> None:
    """Raises UsageError for bytes that are no text: the run's own files, which are UTF-8, could not name them."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} {name!r} is not valid UTF-8, and the files of a run must name it: rename it") from error


app.command(epilog='Example:  diffvl generate runs/qwen2.5-7b/diffuse --image cat.jpg --prompt "What is on the mat?"')(generate)
app.command(epilog="Example:  diffvl chat runs/qwen2.5-7b/diffuse, then  /image cat.jpg  and  What is on the mat?")(chat)
app.command(epilog="Example:  diffvl serve runs/qwen2.5-7b/diffuse --port 8000, then open http://127.0.0.1:8000")(serve)


app.command(epilog="Example:  diffvl answers qwen2.5-vl-3b --data prompts.jsonl --out own.jsonl")(answers)


@app.command(
    epilog="Example:  diffvl evaluate runs/qwen2.5-7b/diffuse --data held_out.json --limit 200, or with --tasks mmmu_val,mmstar"
)
@with_settings
def evaluate(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")],
    data: Annotated[Path | None, typer.Option(help="Held-out records in LLaVA format.", metavar="FILE")] = None,
    tasks: Tasks = None,
    include_path: IncludePath = None,
    batch_size: BatchSize = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records, or of each task.", metavar="N")] = None,
    *,
    as_json: AsJson = False,
    **flags: Any,
) -> None:
    """Measure a checkpoint on held-out answers: masked-token loss and accuracy, and the answers it generates.

    With --tasks on benchmarks of lmms-eval, whose results land in evaluation.json beside it.
    """
    settings = settings_of(context)
    if tasks is not None or data is None:
        evaluate_tasks(context, directory, as_json)
        return
    exclude_tasks_flags(context)
    from diffvl.evaluation.evaluate import evaluate_directory
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    figures = evaluate_directory(directory, data, limit, settings)
    if as_json:
        print_json(figures)
    else:
        rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
        print_table(["figure", "value"], rows)


app.command(epilog="Example:  diffvl compare runs/demo/control runs/demo/diffuse --out compare.html")(compare)
app.command(epilog="Example:  diffvl export runs/qwen3-4b/diffuse --layout sdar_v -o exports/qwen3-4b-sdar-vl")(export)
app.command(epilog="Example:  diffvl push exports/qwen3-4b-sdar-vl OWNER/NAME, and the same with --yes")(push)


@app.command(epilog="Example:  diffvl doctor qwen2.5-7b, or  diffvl doctor ./my-checkpoint --json")
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name from `diffvl models`, a hub id, a directory or a .gguf file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every language model and vision-language model that the installed transformers knows.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --all: write the page here.", metavar="FILE")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether block diffusion can be put on MODEL, and why not. Reads no weights. Exit code 0: yes, 1: no."""
    if every == (model is not None) or (out is not None and not every):
        words = "--out has no effect without --all" if out is not None and not every else "name one MODEL, or --all of them"
        raise UsageError(f"{words}. Example: diffvl doctor qwen2.5-0.5b, or diffvl doctor --all --out architectures.md")
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    if model is None:
        _survey(out, as_json)
        return
    from diffvl.doctor.doctor import examine

    verdict = examine(model, trust_remote_code)
    if as_json:
        print_json(verdict.as_json())
    else:
        _print_verdict(verdict)
    raise typer.Exit(0 if verdict.answer == "supported" else 1)


def _survey(out: Path | None, as_json: bool) -> None:
    """`diffvl doctor --all`."""
    from diffvl.doctor.page import write_page
    from diffvl.doctor.survey import judge_vlm_type, model_types, survey, vlm_types

    console = terminal.console(stderr=True)
    of_text = survey(model_types(), console)
    of_images = survey(vlm_types(), console, judged_by=judge_vlm_type)
    if out is not None:
        write_page(of_text, of_images, out)
    verdicts = [*of_text, *of_images]
    if as_json:
        print_json({"verdicts": [verdict.as_json() for verdict in verdicts]})
    elif out is not None:
        terminal.put(str(out))
    else:
        rows = [(verdict.model_type, verdict.answer, _scientific(verdict.worst_error), verdict.kind) for verdict in verdicts]
        print_table(["model type", "verdict", "worst error", "why"], rows)


def _print_verdict(verdict: "Verdict") -> None:
    """The checks as a table, then the answer in words."""
    if any(check.error is not None for check in verdict.checks):
        rows = [
            (check.name, _scientific(check.error), check.wanted, "passes" if check.passed else check.fault or "fails")
            for check in verdict.checks
        ]
        print_table(["check", "std of the logits", "wanted", "result"], rows)
        print_line(f"probed: {verdict.copy}; random weights, fp32; {verdict.seconds:.1f} s")
        if verdict.image_attention:
            print_line(f"images: {', '.join(verdict.image_inputs)}; attention among image tokens: {verdict.image_attention}")
    subject = verdict.model if verdict.model_type in ("", verdict.model) else f"{verdict.model} ({verdict.model_type})"
    print_line(f"{subject}: {verdict.answer}", "bold green" if verdict.answer == "supported" else "bold red")
    for words in (verdict.reason, verdict.template):
        if words:
            print_line(words)


def _scientific(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


@app.command(epilog="Example:  diffvl models, then  diffvl convert qwen2.5-0.5b")
def models() -> None:
    """List the checkpoints that have a name, what converting one costs, and the families they belong to.

    GB are those of weights, gradients and optimiser, before activations: LoRA holds the weights in bf16, full training has them,
    the gradients and both of AdamW's moments in fp32.
    """
    from diffvl.config.families import NamedCheckpoint, all_families

    def costs(entry: NamedCheckpoint) -> tuple[str, str, str, str]:
        if entry.parameters is None:
            return "", "", "", ""
        billions = entry.parameters
        return f"{billions:g}B", f"{2 * billions:.1f}", f"{2.3 * billions:.1f}", f"{16 * billions:.0f}"

    families = all_families()
    named = [(name, entry, family) for family in families for name, entry in family.checkpoints.items()]
    print_table(
        ["name", "hub repo", "route", "recipe", "vision tower", "parameters", "weights GB", "LoRA GB", "full GB"],
        [
            (
                *(name, entry.repo, family.route, entry.recipe or family.recipe),
                "its own" if family.route == "vision-language model" else entry.vision_tower,
                *costs(entry),
            )
            for name, entry, family in named
        ],
    )
    print_table(["family", "route", "traits"], [(f.model_type, f.route, f.note) for f in families])


@app.command(epilog="Example:  diffvl recipes, then  diffvl convert qwen2.5-0.5b --recipe lora")
def recipes() -> None:
    """List the recipes."""
    from diffvl.config.resolve import find_recipe, recipe_names

    summaries = [(name, find_recipe(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for name in recipe_names()]
    print_table(["name", "what it does"], summaries)


@app.command(epilog="Example:  diffvl shapes runs/demo/data --align 1000 --train 2000 --test 200")
def shapes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write images and records into.")],
    align: Annotated[int, typer.Option(min=1, help="Captioned images for the align stage.")] = 1000,
    train: Annotated[int, typer.Option(min=1, help="Scenes with questions for the diffuse stage.")] = 2000,
    test: Annotated[int, typer.Option(min=1, help="Scenes whose content is in neither of them.")] = 200,
    seed: Seed = 0,
) -> None:
    """Draw the built-in image set: scenes of coloured shapes with captions, questions and exact answers."""
    from diffvl.demo.shapes import write_shapes

    for file in write_shapes(out, align=align, train=train, test=test, seed=seed).values():
        terminal.put(str(file))


def main() -> None:
    """Entry point. A user's mistake ends in its message and code 2; any other exception is ours and keeps its traceback."""
    try:
        with terminal.streams():
            _run()
    except terminal.OutputError as error:
        if error.is_closed:  # as `diffvl models | head -1`: nobody reads on, and nobody need be told
            raise SystemExit(CLOSED_PIPE) from None
        with contextlib.suppress(terminal.OutputError), terminal.streams():
            _complain("error:", "bold red", str(error))
        raise SystemExit(EXIT_CODE) from None


def _run() -> None:
    try:
        with Writing():
            app()
    except DiffvlError as error:
        if not error.told_elsewhere:
            _complain("error:", "bold red", str(error))
        raise SystemExit(error.exit_code) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _complain("interrupted.", "bold yellow", _how_to_go_on(sys.argv[1:]))
        raise
    except (MemoryError, OSError, RuntimeError) as error:  # torch's own errors of memory are RuntimeErrors
        if not _is_of_memory(error):
            raise
        _complain("error:", "bold red", f"memory ran out: {first_line(error)}. {_what_needs_less(sys.argv[1:])}")
        raise SystemExit(MACHINE_CODE) from None


def _is_of_memory(error: Exception) -> bool:
    """As `is_of_memory`, whose import may need more memory than there is: so what can be told without it comes first."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if isinstance(error, OSError):
        return False
    from diffvl.faults import is_of_memory

    return is_of_memory(error)


def _complain(label: str, style: str, message: str) -> None:
    """One message on stderr, as it is."""
    terminal.say(terminal.console(stderr=True), (label, style), f" {message}")


def _how_to_go_on(words: list[str]) -> str:
    """What to type after Ctrl-C; only `convert` and `answers` leave something to go on from."""
    if words[:1] not in (["convert"], ["answers"]):
        return ""
    again = words if "--resume" in words else [*words, "--resume"]
    return f"To continue: {terminal.shell_line('diffvl', *again)}"


def _what_needs_less(words: list[str]) -> str:
    """What to do where memory ran out; `convert` plans what its stages need."""
    if words[:1] != ["convert"]:
        return "Fewer samples at a time, shorter answers and smaller images need less"
    words = [word for word in words if word not in ("--resume", "--measure", "--dry-run")]
    return f"What each stage needs, and the smallest change that fits: {terminal.shell_line('diffvl', *words, '--dry-run')}"
