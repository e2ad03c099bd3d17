"""`diffvl bench decode`: tokens per second of transformers' AR `generate`, the published block loop, and ours, in one process.

In order: the model and its prompts, a proof that the published loop and ours give the same tokens (no figure without it), every
decoder at every number of steps and batch size, and the bars that the project holds itself to.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.bandwidth import memory_bandwidth, streamed_bytes
from diffvl.bench.decode_bars import DecodeVerdict, decode_verdicts, row_of
from diffvl.bench.decoders import DECODERS, Decoded, Prompts, blocks_and_steps
from diffvl.bench.flops import synchronize
from diffvl.bench.forms import resized
from diffvl.bench.measure import schedule
from diffvl.bench.subject import Subject, random_subject, trained_subject
from diffvl.bench.sweep import SweepBench
from diffvl.bench.train import QUICK_SCALE, SCALES, pick_device
from diffvl.errors import TrainingError, UsageError
from diffvl.progress import spinner_or_line, track

BATCHES = (1, 8, 32)
NEW_TOKENS = 64
CPU_LAYERS = 10  # of SmolLM2-135M's 30: what two cores do in the time
# Largest batch -> timed rounds, for random weights; a CPU has no time for more at large batches, and no bar is set there.
REPEATS = {"cpu": {1: 5, 8: 3}, "cuda": {1: 7, 32: 5}}
FEWEST, TRAINED = 1, 2  # rounds beyond these batches; rounds for a checkpoint, which has several prompts
QUESTIONS = 8  # of a file that are asked at every batch size, one after the other at batch 1
BLOCK_SIZE = 8


@dataclass(frozen=True)
class DecodeBench:
    """What the command line asks for; None takes the default.

    directory: a checkpoint instead of random weights. data: its questions. quick: tiny sizes, to see that it runs.
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


@dataclass(frozen=True)
class DecodeReport:
    """machine, rows: what `--json` prints. verdicts: every bar of the device against the rows."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    verdicts: list[DecodeVerdict]

    @property
    def json(self) -> dict[str, Any]:
        return {"machine": self.machine, "rows": self.rows}


@dataclass(frozen=True)
class Case:
    """One decoder at one number of steps. AR is a block of 1 in 1 step."""

    decoder: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.decoder} {self.steps}"


class FirstTokenError(Exception):
    """Ends a call when its first token has settled."""


@dataclass(frozen=True)
class Timed:
    """What a case decoded, group by group; for each round the seconds of all groups, and the mean of those until their first
    tokens had settled."""

    decoded: list[Decoded]
    seconds: list[float]
    first_seconds: list[float]


def compare_decoders(request: DecodeBench, console: Console) -> DecodeReport:
    """Runs the whole comparison; progress goes to `console`.

    Raises:
        UsageError, CheckpointError, DataError: on words that do not fit together, or a checkpoint or file that is wrong.
        TrainingError: if the published loop and ours do not give the same tokens.
    """
    refuse_idle_words(request)
    device = pick_device(request.device)
    batches = numbers("--batch", request.batch, BATCHES if not request.quick else (1, 2))
    load_before = round(machine.load(), 2)
    with spinner_or_line(console, "building the model and its prompts"):
        subject = make_subject(request, device, max(batches))
    config = subject.model.config
    default = tuple(dict.fromkeys(max(config.block_size // part, 1) for part in (1, 2, 4)))
    steps = numbers("--steps", request.steps, default)
    if max(steps) > config.block_size:
        raise UsageError(f"--steps {max(steps)}: expected at most the block size, {config.block_size}")

    groups = {batch: subject.groups(batch) for batch in batches}
    with spinner_or_line(console, "checking that ours and the published loop give the same tokens"):
        proof = prove_same_tokens(subject.model, subject.groups(1), steps)
        bandwidth = memory_bandwidth(device)
    weights = streamed_bytes(subject.model.language_model)
    repeats = {batch: repeats_of(request, device, batch) for batch in batches}
    described = describe(request, subject, device) | {
        "load_before": load_before,
        "steps": list(steps),
        "repeats": repeats,
        "prompts": {batch: len(found) * batch for batch, found in groups.items()},
        **proof,
        "weight_bytes": weights,
        "bytes_per_second": bandwidth,
        "floor_seconds": weights / bandwidth,
    }
    rows: list[dict[str, Any]] = []
    for batch in batches:
        text = f"batch {batch}"
        timed = measure_cases(subject.model, groups[batch], cases(steps, batch), repeats[batch], device, console, text)
        rows += [row(case, groups[batch], one, config) for case, one in timed.items()]
    add_ratios(rows)
    return DecodeReport(described, rows, decode_verdicts(rows, device.type, weights / bandwidth))


def describe(request: DecodeBench, subject: Subject, device: torch.device) -> dict[str, Any]:
    """The machine, the model and what it was asked."""
    config = subject.model.config
    return machine.describe() | {
        "device": device.type,
        "dtype": str(subject.model.language_model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model": subject.name,
        "context": config.context,
        "grid": config.grid,
        "prompt_tokens": [length for prompts in subject.groups(1) for length in prompts.lengths],
        "new_tokens": subject.prompts.limit,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()},
    }


# --- what is asked -----------------------------------------------------------------------------------------------------------


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


def sweep_request(request: DecodeBench, asked: bool, limit: int | None) -> SweepBench:
    """What `--sweep` is asked to do. Raises UsageError if something is missing, or would have no effect."""
    if not asked:
        raise UsageError(f"--limit {limit} has no effect without --sweep")
    if request.directory is None or request.data is None:
        raise UsageError("--sweep measures answers against true ones: give DIR and --data FILE")
    refuse_idle_words(request)
    idle = {"--steps": request.steps, "--batch": request.batch, "--repeats": request.repeats, "--seed": request.seed or None}
    for flag, value in idle.items():
        if value is not None:
            raise UsageError(f"{flag} has no effect with --sweep, which answers every question once at each threshold")
    return SweepBench(request.directory, request.data, limit, request.max_new_tokens, request.device)


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


def make_subject(request: DecodeBench, device: torch.device, batch: int) -> Subject:
    """The model and as many prompts as the largest batch."""
    wanted = NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
    if request.directory is not None:
        return trained_subject(request.directory, request.data, batch, QUESTIONS, wanted, device)
    scale = QUICK_SCALE if request.quick else SCALES[device.type]
    layers = request.layers
    if layers is None and not request.quick and device.type == "cpu":
        layers = CPU_LAYERS
    size = resized(scale.trunk, layers, request.hidden)
    block_size = BLOCK_SIZE if request.block_size is None else request.block_size
    if request.max_new_tokens is None:
        wanted = -(-(wanted if not request.quick else 16) // block_size) * block_size
    context = request.context or "block"
    return random_subject(size, block_size, context, batch, wanted, device, scale.dtype, request.seed)


def repeats_of(request: DecodeBench, device: torch.device, batch: int) -> int:
    """Timed rounds at a batch size."""
    if request.repeats is not None:
        return request.repeats
    if request.quick or request.directory is not None:
        return 1 if request.quick else TRAINED
    return next((rounds for largest, rounds in REPEATS[device.type].items() if batch <= largest), FEWEST)


def cases(steps: Sequence[int], batch: int) -> list[Case]:
    """What runs at a batch size: the published loop takes one sample."""
    blocks = ["published", "ours"] if batch == 1 else ["ours"]
    return [Case("ar_generate", 1), *(Case(decoder, count) for decoder in blocks for count in steps)]


# --- the proof ---------------------------------------------------------------------------------------------------------------


def prove_same_tokens(model: Any, alone: Sequence[Prompts], steps: Sequence[int]) -> dict[str, int]:
    """Decodes single prompts with the published loop and with ours at each number of steps, in fp32, where rounding does not
    decide which token is likelier; says how many tokens were compared, and how many different ones there were.

    Raises:
        TrainingError: if the answers differ.
    """
    compared, seen = 0, set()
    with in_fp32(model):
        for prompts, count in itertools.product(alone, steps):
            theirs = DECODERS["published"](model, prompts, count, None).answers[0]
            own = DECODERS["ours"](model, prompts, count, None).answers[0]
            if own != theirs:
                place = next((at for at, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), len(own))
                raise TrainingError(
                    f"ours and the published loop do not give the same tokens here ({count} steps, greedy, fp32): from token "
                    f"{place} on, ours {own[place : place + 8]}, published {theirs[place : place + 8]}. Figures of their speed "
                    "would compare different work and are not printed. With another --seed (or other data) it may have been a "
                    "tie between two tokens; if it is not, it is a fault of diffvl: run tests/test_published_decoder.py and "
                    "report it"
                )
            compared += len(own)
            seen |= set(own)
    return {"equal_tokens": compared, "different_tokens": len(seen)}


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """In the block the weights are fp32; after it what they were, bit by bit. Buffers stay as they are."""
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)


# --- the measurement -----------------------------------------------------------------------------------------------------------


def measure_cases(
    model: Any,
    groups: Sequence[Prompts],
    chosen: Sequence[Case],
    rounds: int,
    device: torch.device,
    console: Console,
    text: str,
) -> dict[Case, Timed]:
    """Every case once in a first round that is not timed, then once in every round, each beginning with another case."""
    by_name = {case.name: case for case in chosen}
    timed = {case: Timed([], [], []) for case in chosen}
    plan = [(-1, name) for name in by_name] + list(schedule(list(by_name), rounds))
    for number, name in track(console, plan, len(plan), text):
        case = by_name[name]
        if number < 0:
            # Two blocks are every kind of forward there is; on CUDA there may be graphs that are captured on the way.
            limit = min(groups[0].limit, 2 * model.config.block_size)
            time_whole(model, groups[0] if device.type == "cuda" else groups[0].shortened(limit), case, device)
            continue
        first = [time_first(model, prompts, case, device) for prompts in groups]
        whole = [time_whole(model, prompts, case, device) for prompts in groups]
        timed[case].first_seconds.append(statistics.fmean(first))
        timed[case].seconds.append(sum(seconds for seconds, _ in whole))
        timed[case].decoded[:] = [decoded for _, decoded in whole]
    return timed


def time_whole(model: Any, prompts: Prompts, case: Case, device: torch.device) -> tuple[float, Decoded]:
    """One call, from prompt to answer."""
    synchronize(device)
    began = time.perf_counter()
    decoded = DECODERS[case.decoder](model, prompts, case.steps, None)
    synchronize(device)
    return time.perf_counter() - began, decoded


def time_first(model: Any, prompts: Prompts, case: Case, device: torch.device) -> float:
    """Seconds until the first token has settled, in a call of its own that ends there: what notices it would slow the timed calls
    down."""
    noticed: list[float] = []

    def on_first() -> None:
        synchronize(device)
        noticed.append(time.perf_counter())
        raise FirstTokenError

    synchronize(device)
    began = time.perf_counter()
    with suppress(FirstTokenError):
        DECODERS[case.decoder](model, prompts.shortened(1), case.steps, on_first)
    return noticed[0] - began


def row(case: Case, groups: Sequence[Prompts], timed: Timed, config: Any) -> dict[str, Any]:
    """A row of the report. forwards_per_token counts one sample's tokens, without a prefill that predicts nothing."""
    seconds, first = statistics.median(timed.seconds), statistics.median(timed.first_seconds)
    tokens, forwards, prefills = (sum(getattr(one, name) for one in timed.decoded) for name in ("tokens", "forwards", "prefills"))
    after_first = forwards - prefills - len(groups)
    batch = len(groups[0].ids)
    found = {
        "decoder": case.decoder,
        "steps": case.steps,
        "block_size": 1 if case.decoder == "ar_generate" else config.block_size,
        "batch": batch,
        "forwards_per_token": (forwards - prefills) * batch / tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_seconds": first,
        "tokens": tokens,
        "forwards": forwards,
        "prefill_forwards": prefills,
        "forward_seconds": (seconds - first * len(groups)) / after_first if after_first > 0 else None,
        "seconds": timed.seconds,
        "spread": (max(timed.seconds) - min(timed.seconds)) / seconds,
    }
    if case.decoder != "ar_generate":
        counts = [
            blocks_and_steps(config, prompts.lengths, list(map(len, one.answers)), case.steps)
            for prompts, one in zip(groups, timed.decoded, strict=True)
        ]
        found |= {"blocks": sum(blocks for blocks, _ in counts), "steps_due": sum(due for _, due in counts)}
    return found


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Tokens per second over those of AR at the same batch, and of the published loop at batch 1 with as many steps."""
    for one in rows:
        ar = row_of(rows, "ar_generate", one["batch"], None)
        other = None if one["decoder"] == "ar_generate" else row_of(rows, "published", 1, one["steps"])
        one["ratio_to_ar"] = None if ar is None else one["tokens_per_second"] / ar["tokens_per_second"]
        one["ratio_to_published"] = None if other is None else one["tokens_per_second"] / other["tokens_per_second"]
