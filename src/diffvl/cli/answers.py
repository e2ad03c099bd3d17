"""`diffvl answers`: a file of prompts and a model -> a file of records with the model's own answers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffvl.cli.settings import typed
from diffvl.decode.flags import flag
from diffvl.errors import UsageError
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.terminal import console as terminal

SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def answers(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Who answers: a language model or a vision-language model (a name from `diffvl models`, a hub id, a directory), "
            "or a checkpoint of `diffvl convert`.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Records to answer, .json or .jsonl; answers in them are given anew.", metavar="FILE")
    ],
    out: Annotated[Path, typer.Option(help="Where to write the records with their answers.", metavar="FILE.jsonl")],
    image_folder: Annotated[
        Path | None, typer.Option(help="Where relative paths of images start. Default: the folder of --data.", metavar="DIR")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records that are answered together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among this many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample among the likeliest tokens with this much probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random draw.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code that MODEL brings along.")
    ] = False,
) -> None:
    """Let a model answer a file of prompts token by token: data of its own words, as a lossless conversion wants them.

    Every question is answered in its place, after the model's own answers to those before it. Records keep their order and
    their other keys.
    """
    values: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    settings = DecodeSettings(**values, seed=seed, mode="ar")
    try:
        settings.check(given=typed(context).keys() & set(SAMPLING), spell=flag)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from diffvl.decode.own_answers import AnswersRequest, write_answers
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    request = AnswersRequest(model, data, out, settings, batch_size, image_folder, resume, trust_remote_code)
    written = write_answers(request, terminal.console(stderr=True))
    if written.empty:
        terminal.complain(f"{written.empty} answers are empty; training takes none: set data.on_error=skip to leave them out")
    if written.cut:
        terminal.complain(
            f"{written.cut} of {written.answers} answers end at --max-new-tokens {max_new_tokens}, or where the context does"
        )
    if data.absolute().parent != out.absolute().parent and image_folder is None:
        terminal.complain(f"relative paths of images in it start at {data.absolute().parent}: set data.image_folder to it")
    terminal.put(str(out))
