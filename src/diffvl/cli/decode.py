"""The words of `diffvl generate` and `diffvl chat`: flags -> `DecodeSettings`, and no flag that would have no effect.

As in `cli.py`, torch and transformers are imported inside commands only. Which flags were given is asked of Typer, so that a
default shown in `--help` is not taken for something that was typed.
"""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffvl.cli.output import print_json
from diffvl.errors import UsageError
from diffvl.terminal import console as terminal

if TYPE_CHECKING:
    from diffvl.decode.answer import Answer, Decoder, DecodeSettings, Message

STATIC, DYNAMIC, ENTROPY = "low_confidence_static", "low_confidence_dynamic", "entropy"
Strategy = Literal["low_confidence_static", "low_confidence_dynamic", "sequential", "entropy"]  # a test compares them with
Mode = Literal["blocks", "speculative", "ar"]  # those of hub/

# The flags that both commands have; `DecodeSettings` has fields of these names.
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that `diffvl convert` wrote.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps per block. Default: one token per step.")]
ModeFlag = Annotated[
    Mode, typer.Option("--mode", help="Blocks; blocks checked by the weights' own AR logits; or token by token.")
]
StrategyFlag = Annotated[
    Strategy,
    typer.Option(
        "--strategy", help="Per step, fill in: so many of the surest; all sure ones; from the left; all within a budget."
    ),
]
Threshold = Annotated[
    float | None, typer.Option(min=0, max=1, help=f"Confidence above which {DYNAMIC} fills a token in. Default: 0.9.")
]
Budget = Annotated[
    float | None, typer.Option("--entropy-budget", min=0, help=f"Nats that {ENTROPY} may spend in a step. Default: 0.35.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample among so many likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Sample among the likeliest tokens of so much probability.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random draw.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer, and stays in it; repeatable.", metavar="TEXT")]
RepetitionStop = Annotated[
    int | None, typer.Option(min=2, help="End an answer that says the same so many times in a row.", metavar="N")
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the trunk first (CUDA graphs on a GPU): about a minute, then faster.")
]
SETTINGS = (
    *("max_new_tokens", "steps", "mode", "strategy", "threshold", "entropy_budget"),
    *("temperature", "top_k", "top_p", "seed", "stop", "repetition_stop", "compile"),
)


def generate(
    context: typer.Context,
    directory: Directory,
    prompt: Annotated[str | None, typer.Option(help="What to ask.", metavar="TEXT")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; repeatable.", metavar="FILE")] = None,
    batch: Annotated[
        Path | None, typer.Option(help='Ask every line of FILE, {"prompt": ..., "image": ...}; JSON lines.', metavar="FILE")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 8,
    max_new_tokens: MaxNewTokens = 128,
    steps: Steps = None,
    mode: ModeFlag = "blocks",
    strategy: StrategyFlag = STATIC,
    threshold: Threshold = None,
    entropy_budget: Budget = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    stop: Stop = None,
    repetition_stop: RepetitionStop = None,
    compile: Compile = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print blocks as they become final.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="See the blocks settle, coloured by confidence.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text and figures.")] = False,
) -> None:
    """Answer a prompt about pictures, block by block.

    In a pipe or a file the answer is data and keeps its exact text; on a terminal its control characters are shown, not sent.
    """
    given = _given(context)
    _check_ways_out(given)
    values = _settings(context.params, given)
    screen = terminal.console()
    if watch and not screen.is_interactive:
        raise UsageError("--watch draws in a terminal, and this output is none (a file or a pipe): use --stream, or leave it out")
    from diffvl.decode.answer import DecodeSettings, ask, load_for_decoding
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    settings = DecodeSettings(**values)
    _announce(settings)
    if batch is not None:
        _answer_file(directory, batch, batch_size, settings)
        return
    assert prompt is not None
    message = ask(prompt, image or [])  # before the weights: a picture that cannot be read is told at once
    decoder = load_for_decoding(directory)
    if stream:
        _stream(decoder, message, settings)
    elif watch:
        _watch(decoder, message, settings, screen)
    else:
        reply = _reply(decoder, message, settings)
        print_json(asdict(reply)) if as_json else terminal.put(reply.text)


def chat(
    context: typer.Context,
    directory: Directory,
    max_new_tokens: MaxNewTokens = 128,
    steps: Steps = None,
    mode: ModeFlag = "blocks",
    strategy: StrategyFlag = STATIC,
    threshold: Threshold = None,
    entropy_budget: Budget = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    stop: Stop = None,
    repetition_stop: RepetitionStop = None,
    compile: Compile = False,
) -> None:
    """Talk to a checkpoint. A line is a message; /image PATH shows it a picture, /help lists the other orders."""
    values = _settings(context.params, _given(context))
    from diffvl.decode.answer import DecodeSettings, load_for_decoding
    from diffvl.decode.chat import Chat, converse
    from diffvl.terminal.bars import quiet_libraries

    quiet_libraries()
    settings = DecodeSettings(**values)
    _announce(settings)
    talk = Chat(load_for_decoding(directory), settings, _write, terminal.put, terminal.complain)
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        terminal.complain(f"{directory}: /help lists the orders, Ctrl-D ends")
    converse(talk, _line_typed if at_terminal else _line_read, at_terminal)
    if at_terminal:
        terminal.complain("")  # what comes next begins on a line of its own


# --- which flags fit together ----------------------------------------------------------------------------------------------


def _given(context: typer.Context) -> dict[str, Any]:
    """The parameters that were typed, with their values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {name: value for name, value in context.params.items() if name in typed}


def _check_ways_out(given: dict[str, Any]) -> None:
    """Raises UsageError unless the flags of `generate` say one thing to ask and one way to answer."""
    if ("prompt" in given) == ("batch" in given):
        raise UsageError("give --prompt TEXT, or --batch FILE.jsonl with many" + (", not both" if "prompt" in given else ""))
    if "batch" in given:
        _exclude(given, "--batch, which prints a JSON line for each answer", stream="--stream", watch="--watch")
        _exclude(given, "--batch: name the pictures in its file", image="--image")
    else:
        _exclude(given, "a single --prompt", batch_size="--batch-size")
    if "watch" in given:
        _exclude(given, "--watch, which draws the answer itself", stream="--stream", as_json="--json")
    if "stream" in given:
        _exclude(given, "--stream, which prints text as it comes", as_json="--json")


def _settings(params: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `DecodeSettings`. Raises UsageError if one of them would have no effect."""
    mode, strategy, temperature = params["mode"], params["strategy"], params["temperature"]
    if mode == "ar":
        _exclude(given, "--mode ar, which decodes token by token", steps="--steps", strategy="--strategy")
    elif mode == "speculative":
        _exclude(given, "--mode speculative, which keeps what its AR logits agree with", strategy="--strategy")
        _exclude(given, "--mode speculative, whose forwards have many shapes", compile="--compile")
        if temperature:
            raise UsageError(f"--temperature {temperature} has no effect with --mode speculative, which is greedy: leave it out")
    if mode != "blocks":
        _exclude(given, f"--mode {mode}: it settles no blocks", watch="--watch")
    for name, flag, needed in (("threshold", "--threshold", DYNAMIC), ("entropy_budget", "--entropy-budget", ENTROPY)):
        if name in given and mode != "blocks":
            raise UsageError(f"{flag} {given[name]} has no effect with --mode {mode}: leave it out")
        if name in given and strategy != needed:
            raise UsageError(
                f"{flag} {given[name]} has no effect with --strategy {strategy}: add --strategy {needed}, or leave {flag} out"
            )
    if not temperature:
        advice = "temperature 0, which takes the likeliest token: add --temperature"
        _exclude(given, advice, top_k="--top-k", top_p="--top-p", seed="--seed")
    stops = tuple(params["stop"] or ())
    if "" in stops:
        raise UsageError("--stop '' is in every text: name a text that ends the answer")
    return {name: params[name] for name in SETTINGS} | {"stop": stops}


def _exclude(given: dict[str, Any], by: str, **flags: str) -> None:
    """Raises UsageError if one of `flags` (name -> flag) was typed."""
    for name, flag in flags.items():
        if name in given:
            raise UsageError(f"{flag} has no effect with {by}")


# --- ways to answer --------------------------------------------------------------------------------------------------------


def _reply(
    decoder: "Decoder", message: "Message", settings: "DecodeSettings", streamer: Any = None, on_step: Any = None
) -> "Answer":
    from diffvl.decode.answer import Watcher, answer_chats

    return answer_chats(decoder, [[message]], settings, watcher=Watcher(streamer, on_step))[0]


def _stream(decoder: "Decoder", message: "Message", settings: "DecodeSettings") -> None:
    from diffvl.decode.answer import TextPieces

    _reply(decoder, message, settings, TextPieces(decoder.processor.tokenizer, settings.stop, _write))
    terminal.put("")


def _watch(decoder: "Decoder", message: "Message", settings: "DecodeSettings", console: Any) -> None:
    from diffvl.decode.answer import check_settings
    from diffvl.decode.watch import BlockWatch

    config = decoder.model.config
    check_settings(settings, config)
    causal = int(config.context == "causal")  # the prompt then goes in by a forward of its own
    with BlockWatch(console, decoder.processor.tokenizer, settings.stop, causal) as watch:
        watch.finish(_reply(decoder, message, settings, watch, watch.on_step))


def _answer_file(directory: Path, file: Path, size: int, settings: "DecodeSettings") -> None:
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


def _announce(settings: "DecodeSettings") -> None:
    if settings.compile:
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
