"""The commands of `diffvl bench`: flags -> one comparison -> tables, or one JSON object.

Torch and transformers are imported inside commands only.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diffvl.cli.output import print_json, print_line, print_table
from diffvl.terminal.console import console

Device = Literal["auto", "cpu", "cuda"]
Context = Literal["block", "causal"]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random draw.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, to see that it runs; the figures mean nothing.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

bench = typer.Typer(help="Measure speed on this machine: training, decoding, a converted model.", no_args_is_help=True)


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
    quick: Quick = False,
    profile: Annotated[bool, typer.Option("--profile", help="Name the kernels that take the time of a step of ours.")] = False,
    scaling: Annotated[bool, typer.Option(help="Fit how time grows with sample and answer.")] = True,
    as_json: AsJson = False,
) -> None:
    """Compare a training step of this package with AR finetuning and with block diffusion as published."""
    from diffvl.bench.tables import train_tables
    from diffvl.bench.train import TrainBench, compare_training
    from diffvl.terminal.bars import quiet_libraries

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
    comparison = compare_training(request, console(stderr=True))
    _print(comparison.json if as_json else train_tables(comparison))


@bench.command(
    "decode", epilog="Example:  diffvl bench decode, or  diffvl bench decode runs/demo/diffuse --data test.json --sweep"
)
def bench_decode(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote. Default: random weights.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA-format questions for DIR.", metavar="FILE")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Confidence thresholds of DIR on the file: speed and score.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="With --sweep: only the first N questions.", metavar="N")] = None,
    steps: Annotated[str | None, typer.Option(help="Denoising steps per block. Default: 8,4,2.", metavar="N,...")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes. Default: 1,8,32.", metavar="N,...")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: 64, with --sweep 128.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed rounds. Default: by device and batch.", metavar="N")] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA where there is one.")] = "auto",
    layers: Annotated[int | None, typer.Option(min=1, help="Layers of random weights. Default: by device.", metavar="N")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Width of random weights. Default: by device.", metavar="N")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Of random weights. Default: 8.", metavar="N")] = None,
    context: Annotated[Context | None, typer.Option(help="Attention among clean tokens, of random weights.")] = None,
    seed: Seed = 0,
    quick: Quick = False,
    compile: Annotated[
        bool | None, typer.Option(help="Also the compiled forms of ours and AR, at batch 1. Default: on CUDA.")
    ] = None,
    compile_batch: Annotated[str | None, typer.Option(help="Compiled forms at these batch sizes.", metavar="N,...")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare decoding with transformers' AR generate and with the block loop as published."""
    from diffvl.bench.answers import sweep_request, sweep_thresholds
    from diffvl.bench.decode import DecodeBench, compare_decoders
    from diffvl.bench.tables import decode_tables, sweep_tables
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    request = DecodeBench(
        directory=directory,
        data=data,
        steps=steps,
        batch=batch,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        device=device,
        layers=layers,
        hidden=hidden,
        block_size=block_size,
        context=context,
        seed=seed,
        quick=quick,
        compile=compile,
        compile_batch=compile_batch,
    )
    if sweep or limit is not None:
        swept = sweep_thresholds(sweep_request(request, sweep, limit), console(stderr=True))
        _print(swept.json if as_json else sweep_tables(swept))
    else:
        comparison = compare_decoders(request, console(stderr=True))
        _print(comparison.json if as_json else decode_tables(comparison))


@bench.command("modes", epilog="Example:  diffvl bench modes runs/demo/diffuse --data test.json --limit 12")
def bench_modes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")],
    data: Annotated[Path, typer.Option(help="Questions with true answers, in LLaVA format.", metavar="FILE")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions.", metavar="N")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: 128.")] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA where there is one.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare a converted model in blocks with its own token-by-token decoding, on the same questions."""
    from diffvl.bench.answers import AnswersBench, compare_modes, modes_line
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    comparison = compare_modes(AnswersBench(directory, data, limit, max_new_tokens, device), console(stderr=True))
    if as_json:
        print_json(comparison.json)
    else:
        print_line(modes_line(comparison))


@bench.command("drafts", epilog="Example:  diffvl bench drafts runs/lossless/diffuse --data test.json --limit 16")
def bench_drafts(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of a lossless conversion.")],
    data: Annotated[Path, typer.Option(help="Questions, in LLaVA format.", metavar="FILE")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions. Default: 16.", metavar="N")] = None,
    lengths: Annotated[str | None, typer.Option(help="Tokens of a draft. Default: 1,2 and the longest.", metavar="N,...")] = None,
    batch: Annotated[str | None, typer.Option(help="Batch sizes. Default: 1,8.", metavar="N,...")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer. Default: 128.")] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="As --draft-threshold of `diffvl generate`.")] = None,
    precision: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="In which it is computed. Default: the checkpoint's own.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes CUDA where there is one.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare the ways to draft of a lossless checkpoint with transformers' AR generate of its parent, and their answers."""
    from diffvl.bench.drafts import DraftsBench, compare_drafts, draft_tables
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    request = DraftsBench(directory, data, limit, lengths, batch, max_new_tokens, threshold, precision, device)
    comparison = compare_drafts(request, console(stderr=True))
    _print(comparison.json if as_json else draft_tables(comparison))


def _print(figures: dict[str, Any] | list[tuple[list[str], list[tuple[str, ...]]]]) -> None:
    """Prints one JSON object, or tables."""
    if isinstance(figures, dict):
        print_json(figures)
    else:
        for headings, rows in figures:
            print_table(headings, rows)
