"""`diffvl generate` and `diffvl chat`: flags -> one call, and no flag that would have no effect.

As in `main.py`, torch and transformers are imported inside commands only.
"""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffvl.cli.output import print_json
from diffvl.cli.settings import settings_of, typed, with_settings
from diffvl.errors import UsageError
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.terminal import console as terminal

if TYPE_CHECKING:
    from diffvl.decode.answer import Answer, Decoder, Message

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")]


@with_settings
def generate(
    context: typer.Context,
    directory: Directory,
    prompt: Annotated[str | None, typer.Option(help="What to ask.", metavar="TEXT")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image; repeatable.", metavar="FILE")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video, or a folder of its frames; repeatable.", metavar="FILE")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help='Ask every line of FILE, {"prompt": ..., "image": ...}; JSON lines.', metavar="FILE")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 8,
    *,
    stream: Annotated[bool, typer.Option("--stream", help="Print blocks as they become final.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="See the blocks settle, coloured by confidence.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and figures.")] = False,
    **flags: Any,
) -> None:
    """Answer a prompt about images, block by block.

    In a pipe or a file the answer is data and keeps its exact text; on a terminal its control characters are shown, not sent.
    """
    given = typed(context)
    _check_ways_out(given)
    settings = settings_of(context)
    if settings.mode not in (None, "blocks"):
        _exclude(given, f"--mode {settings.mode}: it settles no blocks", watch="--watch")
    screen = terminal.console()
    if watch and not screen.is_interactive:
        raise UsageError("--watch draws in a terminal, and this output is none (a file or a pipe): use --stream, or leave it out")
    from diffvl.decode.answer import ask, load_for_decoding
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    _announce(settings)
    if batch is not None:
        _answer_file(directory, batch, batch_size, settings)
        return
    assert prompt is not None
    message = ask(prompt, image or [], video or [])  # before the weights: an image that cannot be read is told at once
    decoder = load_for_decoding(directory)
    if stream:
        _stream(decoder, message, settings)
    elif watch:
        _watch(decoder, message, settings, screen)
    else:
        reply = _reply(decoder, message, settings)
        print_json(asdict(reply)) if as_json else terminal.put(reply.text)


@with_settings
def chat(
    context: typer.Context,
    directory: Directory,
    **flags: Any,
) -> None:
    """Talk to a checkpoint. A line is a message; /image PATH shows it an image, /video PATH a video, /help lists the other
    commands."""
    settings = settings_of(context)
    from diffvl.decode.answer import load_for_decoding
    from diffvl.decode.chat import Chat, converse
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    _announce(settings)
    talk = Chat(load_for_decoding(directory), settings, _write, terminal.put, terminal.complain)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        terminal.complain(f"{directory}: /help lists the commands, Ctrl-D ends")
    converse(talk, _line_typed if at_terminal else _line_read, at_terminal)
    if at_terminal:
        terminal.complain("")  # what comes next begins on a line of its own


# --- which flags fit together ----------------------------------------------------------------------------------------------


def _check_ways_out(given: dict[str, Any]) -> None:
    """Raises UsageError unless the flags of `generate` say one thing to ask and one way to answer."""
    if ("prompt" in given) == ("batch" in given):
        raise UsageError("give --prompt TEXT, or --batch FILE.jsonl with many" + (", not both" if "prompt" in given else ""))
    if "batch" in given:
        _exclude(given, "--batch, which prints a JSON line for each answer", stream="--stream", watch="--watch")
        _exclude(given, "--batch: name the images in its file", image="--image", video="--video")
    else:
        _exclude(given, "a single --prompt", batch_size="--batch-size")
    if "watch" in given:
        _exclude(given, "--watch, which draws the answer itself", stream="--stream", as_json="--json")
    if "stream" in given:
        _exclude(given, "--stream, which prints text as it comes", as_json="--json")


def _exclude(given: dict[str, Any], by: str, **flags: str) -> None:
    """Raises UsageError if one of `flags` (name -> flag) was typed."""
    for name, flag in flags.items():
        if name in given:
            raise UsageError(f"{flag} has no effect with {by}")


# --- ways to answer --------------------------------------------------------------------------------------------------------


def _reply(
    decoder: "Decoder", message: "Message", settings: DecodeSettings, streamer: Any = None, on_step: Any = None
) -> "Answer":
    from diffvl.decode.answer import Watcher, answer_chats

    return answer_chats(decoder, [[message]], settings, watcher=Watcher(streamer, on_step))[0]


def _stream(decoder: "Decoder", message: "Message", settings: DecodeSettings) -> None:
    from diffvl.decode.answer import TextPieces

    _reply(decoder, message, settings, TextPieces(decoder.processor.tokenizer, settings.stop_strings, _write))
    terminal.put("")


def _watch(decoder: "Decoder", message: "Message", settings: DecodeSettings, console: Any) -> None:
    from diffvl.decode.answer import check_settings
    from diffvl.decode.watch import BlockWatch

    config = decoder.model.config
    if (mode := check_settings(settings, config).mode) != "blocks":
        raise UsageError(f"--watch has no effect with this checkpoint, whose default is --mode {mode}: it settles no blocks")
    causal = int(config.context == "causal")  # the prompt then goes in by a forward of its own
    with BlockWatch(console, decoder.processor.tokenizer, settings.stop_strings, causal) as watch:
        watch.finish(_reply(decoder, message, settings, watch, watch.on_step))


def _answer_file(directory: Path, file: Path, size: int, settings: DecodeSettings) -> None:
    """A JSON line for every answer on stdout, how far it is on stderr."""
    from diffvl.data.questions import read_questions
    from diffvl.decode.answer import answer_questions, check_questions, load_for_decoding
    from diffvl.terminal.bars import track

    out = sys.stdout  # a bar puts something of its own in its place
    # On a terminal the answers themselves show how far it is, and a bar would stand in their way.
    console = terminal.console(stderr=True, force_interactive=False if out.isatty() else None)
    questions = read_questions(file)
    decoder = load_for_decoding(directory)
    check_questions(decoder, questions, settings)
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    for question, reply in answer_questions(decoder, track(console, batches, len(batches), "answering in batches"), settings):
        print(terminal.json_text({"id": question.id, **asdict(reply)}), file=out, flush=True)


def _announce(settings: DecodeSettings) -> None:
    if settings.is_static:
        terminal.complain("the trunk is compiled while the first answer is decoded: it comes about a minute late")


# --- terminal --------------------------------------------------------------------------------------------------------------


def _write(text: str) -> None:
    terminal.put(text, end="")


def _line_typed() -> str:
    with contextlib.suppress(ImportError):  # its import gives `input` a history and the arrow keys; not every Python has it
        import readline  # noqa: F401

    return input("you> ")


def _line_read() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
