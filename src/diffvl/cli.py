"""The words of the command line: argv -> one call into the package -> text, or one message and an exit code.

Invariant: torch and transformers are imported inside commands only, so that `--help` answers at once. Flags name things (paths,
seed, how to decode); a hyperparameter has no flag of its own, it is set with `--set`.
"""

import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffvl.config import VERSION, StageName
from diffvl.errors import EXIT_CODE, DiffvlError, UsageError

if TYPE_CHECKING:
    from diffvl.doctor import Verdict

INTERRUPTED = 130  # 128 + SIGINT, what Typer exits with on Ctrl-C
UNLIMITED = 10_000  # columns

app = typer.Typer(
    help="Turn an autoregressive language model into a block-diffusion vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

bench = typer.Typer(help="Measure the core of this package on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

STATIC, DYNAMIC = "low_confidence_static", "low_confidence_dynamic"
Strategy = Literal["low_confidence_static", "low_confidence_dynamic"]  # as `hub/sampling_diffvl.py`; a test compares them

Device = Literal["auto", "cpu", "cuda"]
Context = Literal["block", "causal"]

MODEL_HELP = "A name from `diffvl models`, a hub id, a directory or a .gguf file; --stage diffuse can do without."
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random draw.")]
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
    stage: Annotated[StageName | None, typer.Option(help="Only this stage. Default: all stages of the recipe in order.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A name from `diffvl recipes` or a file.", metavar="NAME|FILE")] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA-format .json or .jsonl to train on.", metavar="FILE")] = None,
    start: Annotated[Path | None, typer.Option("--from", help="The run that the stage starts from.", metavar="DIR")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: under runs/.", metavar="DIR")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters on the trunk, merged at the end.")] = False,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Change a setting; repeatable.", metavar="A.B=C")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be done.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert MODEL: connect a vision tower, align it, train block diffusion, write a checkpoint."""
    from diffvl.convert import ConvertRequest
    from diffvl.convert import convert as run_convert

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
        dry_run=dry_run,
        trust_remote_code=trust_remote_code,
    )
    run_convert(request)


@app.command(epilog='Example:  diffvl generate runs/qwen2.5-7b/diffuse --image cat.jpg --prompt "What is on the mat?"')
def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")],
    prompt: Annotated[str, typer.Option(help="What to ask.", metavar="TEXT")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeatable.", metavar="FILE")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps per block. Default: one token per step.")] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Confidence above which a token is filled in.")] = None,
    strategy: Annotated[Strategy, typer.Option(help="Fill a fixed number of tokens per step, or all the sure ones.")] = STATIC,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer a prompt about pictures, block by block."""
    if threshold is not None and strategy == STATIC:
        raise UsageError(
            f"--threshold {threshold} has no effect with --strategy {STATIC}, which fills in a fixed number of tokens per "
            f"step: add --strategy {DYNAMIC}, or leave --threshold out"
        )
    from diffvl.decode import DecodeSettings, answer, load_for_decoding
    from diffvl.progress import quiet_libraries

    quiet_libraries()
    settings = DecodeSettings(
        max_new_tokens=max_new_tokens,
        steps=steps,
        threshold=threshold,
        strategy=strategy,
        temperature=temperature,
        seed=seed,
    )
    reply = answer(load_for_decoding(directory), image or [], prompt, settings)
    if as_json:
        _print_json(asdict(reply))
    else:
        print(reply.text)


@app.command(epilog="Example:  diffvl evaluate runs/qwen2.5-7b/diffuse --data held_out.json --limit 200")
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")],
    data: Annotated[Path, typer.Option(help="Held-out records in LLaVA format.", metavar="FILE")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N records.", metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a checkpoint on held-out answers: masked-token loss and accuracy, and the answers it generates."""
    from diffvl.decode import DecodeSettings
    from diffvl.evaluate import evaluate_directory
    from diffvl.progress import quiet_libraries

    quiet_libraries()
    figures = evaluate_directory(directory, data, limit, DecodeSettings())
    if as_json:
        _print_json(figures)
    else:
        rows = [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in figures.items()]
        _print_table(["figure", "value"], rows)


@app.command(epilog="Example:  diffvl doctor qwen2.5-7b, or  diffvl doctor ./my-checkpoint --json")
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A name from `diffvl models`, a hub id, a directory or a .gguf file.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every causal language model that the installed transformers knows.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --all: write the page here.", metavar="FILE")] = None,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say whether block diffusion can be put on MODEL, and why not. Reads its configuration only. Exit code 0: yes, 1: no."""
    if every == (model is not None) or (out is not None and not every):
        words = "--out has no effect without --all" if out is not None and not every else "name one MODEL, or --all of them"
        raise UsageError(f"{words}. Example: diffvl doctor qwen2.5-0.5b, or diffvl doctor --all --out architectures.md")
    from diffvl.progress import quiet_libraries

    quiet_libraries()
    if model is None:
        _survey(out, as_json)
        return
    from diffvl.doctor import examine

    verdict = examine(model, trust_remote_code)
    if as_json:
        _print_json(verdict.as_json())
    else:
        _print_verdict(verdict)
    raise typer.Exit(0 if verdict.answer == "supported" else 1)


def _survey(out: Path | None, as_json: bool) -> None:
    """`diffvl doctor --all`."""
    from rich.console import Console

    from diffvl.architectures import model_types, survey, write_page

    verdicts = survey(model_types(), Console(stderr=True))
    if out is not None:
        write_page(verdicts, out)
    if as_json:
        _print_json({"verdicts": [verdict.as_json() for verdict in verdicts]})
    elif out is not None:
        print(out)
    else:
        rows = [(verdict.model_type, verdict.answer, _scientific(verdict.worst_error), verdict.kind) for verdict in verdicts]
        _print_table(["model type", "verdict", "worst error", "why"], rows)


def _print_verdict(verdict: "Verdict") -> None:
    """The checks as a table, then the answer in words."""
    if any(check.error is not None for check in verdict.checks):
        rows = [
            (check.name, _scientific(check.error), check.wanted, "passes" if check.passed else check.fault or "fails")
            for check in verdict.checks
        ]
        _print_table(["check", "std of the logits", "wanted", "result"], rows)
        print(f"probed: {verdict.copy}; random weights, fp32; {verdict.seconds:.1f} s")
    subject = verdict.model if verdict.model_type in ("", verdict.model) else f"{verdict.model} ({verdict.model_type})"
    _print_line(f"{subject}: {verdict.answer}", "bold green" if verdict.answer == "supported" else "bold red")
    if verdict.reason:
        _print_line(verdict.reason)


def _scientific(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


@app.command(epilog="Example:  diffvl models, then  diffvl convert qwen2.5-0.5b")
def models() -> None:
    """List the checkpoints that have a name, and the families they belong to."""
    from diffvl.families import all_families

    families = all_families()
    named = [(name, entry, family) for family in families for name, entry in family.checkpoints.items()]
    _print_table(
        ["name", "hub repo", "family", "vision tower", "recipe"],
        [(name, entry.repo, family.model_type, entry.vision_tower, entry.recipe) for name, entry, family in named],
    )
    _print_table(["family", "traits"], [(f.model_type, f.note) for f in families])


@app.command(epilog="Example:  diffvl recipes, then  diffvl convert qwen2.5-0.5b --recipe lora")
def recipes() -> None:
    """List the recipes."""
    from diffvl.families import find_recipe, recipe_names

    summaries = [(name, find_recipe(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")) for name in recipe_names()]
    _print_table(["name", "what it does"], summaries)


@app.command(epilog="Example:  diffvl shapes runs/demo/data --align 1000 --train 2000 --test 200")
def shapes(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write pictures and records into.")],
    align: Annotated[int, typer.Option(min=1, help="Captioned pictures for the align stage.")] = 1000,
    train: Annotated[int, typer.Option(min=1, help="Scenes with questions for the diffuse stage.")] = 2000,
    test: Annotated[int, typer.Option(min=1, help="Scenes whose content is in neither of them.")] = 200,
    seed: Seed = 0,
) -> None:
    """Draw the built-in picture set: scenes of coloured shapes with captions, questions and exact answers."""
    from diffvl.data.shapes import write_shapes

    for file in write_shapes(out, align=align, train=train, test=test, seed=seed).values():
        print(file)


@bench.command("train", epilog="Example:  diffvl bench train --json > bench.json")
def bench_train(
    shapes: Annotated[
        str | None, typer.Option(help="All tokens (L) and answer tokens (R) of a sample, with commas.", metavar="L3000-R300,...")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed rounds. Default: 3, on CUDA 10.", metavar="N")] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA where there is one.")] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of the trunk. Default: by device.", metavar="N")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of the trunk. Default: by device.", metavar="N")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block.", metavar="N")] = 8,
    context: Annotated[Context, typer.Option(help="Attention among clean tokens.")] = "block",
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs; the figures mean nothing.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Name the kernels that a step of ours goes to.")] = False,
    scaling: Annotated[bool, typer.Option(help="Fit how time grows with sample and answer.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compare a training step of this package with AR finetuning and with block diffusion as published."""
    from rich.console import Console

    from diffvl.bench.tables import bar_lines, tables
    from diffvl.bench.train import TrainBench, compare
    from diffvl.progress import quiet_libraries

    quiet_libraries()
    request = TrainBench(
        shapes=shapes,
        repeats=repeats,
        device=device,
        layers=layers,
        hidden=hidden,
        block_size=block_size,
        context=context,
        seed=seed,
        quick=quick,
        profile=profile,
        scaling=scaling,
    )
    report = compare(request, Console(stderr=True))
    if as_json:
        for line in bar_lines(report.verdicts):
            print(line, file=sys.stderr)
        _print_json(report.json)
    else:
        for headings, rows in tables(report.machine, report.rows, report.fits, report.verdicts):
            _print_table(headings, rows)


@bench.command("objective", epilog="Example:  diffvl bench objective --json > variance.json")
def bench_objective(
    samples: Annotated[int, typer.Option(min=128, help="Gradients drawn for each sampled figure.", metavar="N")] = 384,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure variance and bias of the gradient under each way to draw noise and weigh tokens."""
    from rich.console import Console

    from diffvl.bench.objective import measure_objective, tables
    from diffvl.progress import quiet_libraries

    quiet_libraries()
    report = measure_objective(samples, seed, Console(stderr=True))
    if as_json:
        _print_json(report)
    else:
        for headings, rows in tables(report):
            _print_table(headings, rows)


def _print_json(figures: dict) -> None:
    import json

    print(json.dumps(figures, ensure_ascii=False))


def _print_table(headings: list[str], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout; in a file or a pipe, which have no width, every row stands on one line."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*headings)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum
    console.print(table)


def _print_line(text: str, style: str | None = None) -> None:
    """One line on stdout, taken as it is and not broken."""
    from rich.console import Console

    Console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _say(label: str, style: str, message: str) -> None:
    """One message on stderr, as it is: nothing in it is taken for markup and no path is broken over lines."""
    from rich.console import Console

    console = Console(stderr=True)
    console.print(label, style=style, end=" ")
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point. A user's mistake ends in its message and code 2; any other exception is ours and keeps its traceback."""
    try:
        app()
    except DiffvlError as error:
        _say("error:", "bold red", str(error))
        raise SystemExit(EXIT_CODE) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            _say("interrupted.", "bold yellow", _how_to_go_on(sys.argv[1:]))
        raise


def _how_to_go_on(words: list[str]) -> str:
    """What to type after Ctrl-C; only `convert` leaves something to go on from."""
    if words[:1] != ["convert"]:
        return ""
    again = words if "--resume" in words else [*words, "--resume"]
    return f"To continue: diffvl {shlex.join(again)}"


if __name__ == "__main__":
    main()
