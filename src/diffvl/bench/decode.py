"""`diffvl bench decode`: tokens per second of transformers' AR `generate`, the published block loop, and ours, in one process.

In order: the model and its prompts, a proof that the published loop and ours give the same tokens (no figure without it), every
decoder at every number of steps and batch size, and the bars that the project holds itself to.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.bandwidth import memory_bandwidth, streamed_bytes
from diffvl.bench.decode_bars import DecodeVerdict, decode_verdicts, row_of
from diffvl.bench.decode_request import DecodeBench, numbers, refuse_idle_words
from diffvl.bench.decoders import DECODERS, Decoded, OnFirst, Prompts, blocks_and_steps
from diffvl.bench.flops import synchronize
from diffvl.bench.forms import resized
from diffvl.bench.measure import schedule
from diffvl.bench.subject import Subject, random_subject, trained_subject
from diffvl.bench.train import QUICK_SCALE, SCALES, pick_device
from diffvl.errors import TrainingError, UsageError
from diffvl.terminal.bars import spinner_or_line, track

BATCHES = (1, 8, 32)
NEW_TOKENS = 64
CPU_LAYERS = 10  # of SmolLM2-135M's 30: what two cores do in the time
# Largest batch -> timed rounds, for random weights; a CPU has no time for more at large batches, and no bar is set there.
REPEATS = {"cpu": {1: 5, 8: 3}, "cuda": {1: 7, 32: 5}}
FEWEST, TRAINED = 1, 2  # rounds beyond these batches; rounds for a checkpoint, which has several prompts
QUESTIONS = 8  # of a file that are asked at every batch size, one after the other at batch 1
BLOCK_SIZE = 8


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
    compiled: bool = False

    @property
    def name(self) -> str:
        return f"{self.decoder} {self.steps}" + (" compiled" if self.compiled else "")

    def run(self, model: Any, prompts: Prompts, on_first: OnFirst | None = None) -> Decoded:
        return DECODERS[self.decoder](model, prompts, self.steps, on_first, self.compiled)


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
    compiled = device.type == "cuda" if request.compile is None else request.compile
    for batch in batches:
        text, chosen = f"batch {batch}", cases(steps, batch, compiled)
        timed = measure_cases(subject.model, groups[batch], chosen, repeats[batch], device, console, text)
        rows += [row(case, groups[batch], one, config) | equality(case, timed) for case, one in timed.items()]
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


def cases(steps: Sequence[int], batch: int, compiled: bool) -> list[Case]:
    """What runs at a batch size: the published loop takes one sample, and every batch size would be compiled anew."""
    blocks = ["published", "ours"] if batch == 1 else ["ours"]
    plain = [Case("ar_generate", 1), *(Case(decoder, count) for decoder in blocks for count in steps)]
    if not compiled or batch > 1:
        return plain
    return [*plain, Case("ar_generate", 1, compiled=True), *(Case("ours", count, compiled=True) for count in steps)]


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
            # Two blocks are every kind of forward there is; compiled ones need caches of the size that will be timed.
            limit = min(groups[0].limit, 2 * model.config.block_size)
            for prompts in groups if case.compiled else groups[:1]:
                whole = case.compiled or device.type == "cuda"
                time_whole(model, prompts if whole else prompts.shortened(limit), case, device)
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
    decoded = case.run(model, prompts)
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
        case.run(model, prompts.shortened(1), on_first)
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
        "compiled": case.compiled,
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


def equality(case: Case, timed: dict[Case, Timed]) -> dict[str, Any]:
    """For a compiled form, how many of its tokens are those of the plain one, place by place: its kernels round otherwise, and in
    bf16 that decides between tokens that are nearly as likely."""
    if not case.compiled:
        return {}
    pairs = [
        (one, other)
        for found, plain in zip(timed[case].decoded, timed[replace(case, compiled=False)].decoded, strict=True)
        for mine, theirs in zip(found.answers, plain.answers, strict=True)
        for one, other in zip_longest(mine, theirs)
    ]
    return {"equal_to_plain": sum(one == other for one, other in pairs) / len(pairs)}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Tokens per second over those of AR at the same batch, and of the published loop at batch 1 with as many steps."""
    for one in rows:
        ar = row_of(rows, "ar_generate", one["batch"], None)  # the first, which is not compiled
        other = None if one["decoder"] == "ar_generate" else row_of(rows, "published", 1, one["steps"])
        one["ratio_to_ar"] = None if ar is None else one["tokens_per_second"] / ar["tokens_per_second"]
        one["ratio_to_published"] = None if other is None else one["tokens_per_second"] / other["tokens_per_second"]
