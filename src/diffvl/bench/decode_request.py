"""What `diffvl bench decode` is asked, and which of its words fit together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffvl.bench.answered import AnswersBench
from diffvl.errors import UsageError


@dataclass(frozen=True)
class DecodeBench:
    """What the command line asks for; None takes the default.

    directory: a checkpoint instead of random weights. data: its questions. quick: tiny sizes, to see that it runs.
    compile: also the compiled forms of ours and of AR, at batch 1; default: on CUDA.
    """

    directory: Path | None = None
    data: Path | None = None
    steps: str | None = None
    batch: str | None = None
    max_new_tokens: int | None = None
    repeats: int | None = None
    device: str = "auto"
    layers: int | None = None
    hidden: int | None = None
    block_size: int | None = None
    context: str | None = None
    seed: int = 0
    quick: bool = False
    compile: bool | None = None


def refuse_idle_words(request: DecodeBench) -> None:
    """Raises UsageError for a setting that would have no effect."""
    if request.directory is None:
        if request.data is not None:
            raise UsageError("--data has no effect without DIR: random weights read no questions. Name a checkpoint")
        return
    given = {"--layers": request.layers, "--hidden": request.hidden, "--block-size": request.block_size}
    given |= {"--context": request.context, "--seed": request.seed or None, "--quick": request.quick or None}
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise UsageError(f"{', '.join(idle)} with DIR: the checkpoint has its own sizes. Leave it out, or leave out DIR")


def sweep_request(request: DecodeBench, asked: bool, limit: int | None) -> AnswersBench:
    """What `--sweep` is asked to do. Raises UsageError if something is missing, or would have no effect."""
    if not asked:
        raise UsageError(f"--limit {limit} has no effect without --sweep")
    if request.directory is None or request.data is None:
        raise UsageError("--sweep measures answers against true ones: give DIR and --data FILE")
    refuse_idle_words(request)
    idle = {"--steps": request.steps, "--batch": request.batch, "--repeats": request.repeats, "--seed": request.seed or None}
    idle |= {"--compile": request.compile}
    for flag, value in idle.items():
        if value is not None:
            raise UsageError(f"{flag} has no effect with --sweep, which answers every question once at each threshold")
    return AnswersBench(request.directory, request.data, limit, request.max_new_tokens, request.device)


def numbers(flag: str, words: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """`8,4,2` -> (8, 4, 2). Raises UsageError on other words, and on a number named twice."""
    if words is None:
        return tuple(default)
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{flag} {words!r}: expected whole numbers from 1 on with commas between them, as in 8,4,2")
    found = tuple(map(int, parts))
    if len(set(found)) < len(found):
        raise UsageError(f"{flag} {words!r}: a number is named twice")
    return found
