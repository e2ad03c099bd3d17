"""`diffvl bench decode`: tokens per second of transformers' AR `generate`, the published block loop, and ours, in one process.

In order: the model and its prompts, a proof that the published loop and ours give the same tokens (no figure without it), and
every decoder at every number of steps and batch size.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.bench.comparison import Comparison, DecodeRow
from diffvl.bench.decoders import Case, Prompts, blocks_and_steps
from diffvl.bench.equality import prove_same_tokens
from diffvl.bench.machine import describe_run, load_average, memory_bandwidth, pick_device
from diffvl.bench.random_model import QUICK_SCALE, SCALES, resize
from diffvl.bench.timing import DecodeTiming, spread, time_cases
from diffvl.bench.workload import Workload, checkpoint_workload, random_workload
from diffvl.errors import UsageError
from diffvl.hub.images_diffvl import vision_parameters
from diffvl.terminal.bars import spinner_or_line

BATCHES, QUICK_BATCHES = (1, 8, 32), (1, 2)
COMPILED_BATCHES = (1,)
NEW_TOKENS, QUICK_TOKENS = 64, 16
CPU_LAYERS = 10  # of SmolLM2-135M's 30: what two cores do in the time
# Largest batch -> timed rounds, for random weights; a CPU has no time for more at large batches.
REPEATS = {"cpu": {1: 5, 8: 3}, "cuda": {1: 7, 32: 5}}
FEWEST, TRAINED = 1, 2  # rounds beyond these batches; rounds for a checkpoint, which has several prompts
QUESTIONS = 8  # of a file that are decoded at every batch size, one after the other at batch 1
BLOCK_SIZE = 8


@dataclass(frozen=True)
class DecodeBench:
    """What the command line asks for; None takes the default.

    directory: a checkpoint instead of random weights. data: its questions. quick: tiny sizes, to see that it runs.
    compile: also the compiled forms of ours and of AR; default: on CUDA. compile_batch: at which batch sizes; default: 1, because
        every batch size is compiled anew.
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
    compile_batch: str | None = None


def compare_decoders(request: DecodeBench, console: Console) -> Comparison[DecodeRow]:
    """Runs the whole comparison; progress goes to `console`.

    Raises:
        UsageError, CheckpointError, DataError: on arguments that do not fit together, or a checkpoint or file that is wrong.
        TrainingError: if the published loop and ours do not give the same tokens.
    """
    refuse_idle_arguments(request)
    device = pick_device(request.device)
    batches = parse_numbers("--batch", request.batch, QUICK_BATCHES if request.quick else BATCHES)
    compiled = compiled_batches(request, batches, device)
    load_before = load_average()
    with spinner_or_line(console, "building the model and its prompts"):
        workload = make_workload(request, device, max(batches))
    model, config = workload.model, workload.model.config
    default = tuple(dict.fromkeys(max(config.block_size // part, 1) for part in (1, 2, 4)))
    steps = parse_numbers("--steps", request.steps, default)
    if max(steps) > config.block_size:
        raise UsageError(f"--steps {max(steps)}: expected at most the block size, {config.block_size}")

    groups = {batch: workload.groups(batch) for batch in batches}
    with spinner_or_line(console, "checking that ours and the published loop give the same tokens"):
        proof = prove_same_tokens(model, workload.groups(1), steps)
        bandwidth = memory_bandwidth(device)
    weights = streamed_bytes(model.trunk, model.is_native)
    repeats = {batch: num_rounds(request, device, batch) for batch in batches}
    run = describe_run(device, model.trunk.dtype, load_before) | {
        "model": workload.name,
        "context": config.context,
        "grid": config.grid,
        "prompt_tokens": [length for prompts in workload.groups(1) for length in prompts.lengths],
        "new_tokens": workload.prompts.limit,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(request).items()},
        "steps": list(steps),
        "repeats": repeats,
        "prompts": {batch: len(found) * batch for batch, found in groups.items()},
        **proof,
        "weight_bytes": weights,
        "bytes_per_second": bandwidth,
        "floor_seconds": weights / bandwidth,
    }
    rows: list[DecodeRow] = []
    for batch in batches:
        cases = decode_cases(steps, batch, batch in compiled)
        timings = time_cases(model, groups[batch], cases, repeats[batch], device, console)
        rows += [make_row(case, groups[batch], timings, config) for case in timings]
    return Comparison(run, with_ratios(rows))


# --- the request -----------------------------------------------------------------------------------------------------------


def refuse_idle_arguments(request: DecodeBench) -> None:
    """Raises UsageError for an argument that would have no effect."""
    if request.directory is None:
        if request.data is not None:
            raise UsageError("--data has no effect without DIR: random weights read no questions. Name a checkpoint")
        return
    values = {"--layers": request.layers, "--hidden": request.hidden, "--block-size": request.block_size}
    values |= {"--context": request.context, "--seed": request.seed or None, "--quick": request.quick or None}
    idle = [name for name, value in values.items() if value is not None]
    if idle:
        raise UsageError(f"{', '.join(idle)} with DIR: the checkpoint has its own sizes. Leave it out, or leave out DIR")


def parse_numbers(flag: str, text: str | None, default: Sequence[int]) -> tuple[int, ...]:
    """Reads `8,4,2`. Raises UsageError on other text, and on a number named twice."""
    if text is None:
        return tuple(default)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{flag} {text!r}: expected whole numbers from 1 on with commas between them, as in 8,4,2")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{flag} {text!r}: a number is named twice")
    return numbers


def make_workload(request: DecodeBench, device: torch.device, batch: int) -> Workload:
    """Makes the model, and as many prompts as the largest batch needs."""
    tokens = NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
    if request.directory is not None:
        return checkpoint_workload(request.directory, request.data, batch, QUESTIONS, tokens, device)
    scale = QUICK_SCALE if request.quick else SCALES[device.type]
    layers = request.layers
    if layers is None and not request.quick and device.type == "cpu":
        layers = CPU_LAYERS
    size = resize(scale.trunk, layers, request.hidden)
    block_size = BLOCK_SIZE if request.block_size is None else request.block_size
    if request.max_new_tokens is None:  # whole blocks
        tokens = -(-(QUICK_TOKENS if request.quick else NEW_TOKENS) // block_size) * block_size
    return random_workload(size, block_size, request.context or "block", batch, tokens, device, scale.dtype, request.seed)


def num_rounds(request: DecodeBench, device: torch.device, batch: int) -> int:
    """Counts the timed rounds at a batch size."""
    if request.repeats is not None:
        return request.repeats
    if request.quick or request.directory is not None:
        return 1 if request.quick else TRAINED
    return next((rounds for largest, rounds in REPEATS[device.type].items() if batch <= largest), FEWEST)


def compiled_batches(request: DecodeBench, batches: Sequence[int], device: torch.device) -> tuple[int, ...]:
    """Lists the batch sizes at which the compiled forms run too. Raises UsageError for one that is not measured at all."""
    if request.compile_batch is None:
        wanted = device.type == "cuda" if request.compile is None else request.compile
        return COMPILED_BATCHES if wanted else ()
    if request.compile is False:
        raise UsageError("--compile-batch has no effect with --no-compile: leave one of them out")
    chosen = parse_numbers("--compile-batch", request.compile_batch, ())
    if absent := [batch for batch in chosen if batch not in batches]:
        raise UsageError(f"--compile-batch {absent[0]} is not among the batch sizes {', '.join(map(str, batches))}: see --batch")
    return chosen


def decode_cases(steps: Sequence[int], batch: int, compiled: bool) -> list[Case]:
    """Lists what runs at a batch size: the published loop takes one sample."""
    decoders = ["published", "ours"] if batch == 1 else ["ours"]
    plain = [Case("ar_generate", 1), *(Case(decoder, count) for decoder in decoders for count in steps)]
    if not compiled:
        return plain
    return [*plain, Case("ar_generate", 1, compiled=True), *(Case("ours", count, compiled=True) for count in steps)]


# --- the figures -----------------------------------------------------------------------------------------------------------


def streamed_bytes(trunk: Any, is_native: bool = False) -> int:
    """Counts the bytes of weights that one forward with a head reads: over the memory's bandwidth, the least time of a forward at
    batch 1. An input embedding that the head does not share does not count: only the rows of the tokens are read. Nor does the
    vision part of a whole vision-language model, which runs once."""
    head, embedding = trunk.get_output_embeddings().weight, trunk.get_input_embeddings().weight
    seen = vision_parameters(trunk).keys() if is_native else ()
    read = [parameter for name, parameter in trunk.named_parameters() if name not in seen]
    total = sum(parameter.numel() * parameter.element_size() for parameter in read)
    return total if head is embedding else total - embedding.numel() * embedding.element_size()


def make_row(case: Case, groups: Sequence[Prompts], timings: dict[Case, DecodeTiming], config: Any) -> DecodeRow:
    """Makes the row of a case, without its ratios."""
    timing = timings[case]
    seconds, first = statistics.median(timing.seconds), statistics.median(timing.first_seconds)
    tokens, forwards = sum(one.tokens for one in timing.decoded), sum(one.forwards for one in timing.decoded)
    prefills = sum(one.prefills for one in timing.decoded)
    after_first = forwards - prefills - len(groups)
    batch, in_blocks = len(groups[0].ids), case.decoder != "ar_generate"
    counts = [
        blocks_and_steps(config, prompts.lengths, list(map(len, one.answers)), case.steps)
        for prompts, one in zip(groups, timing.decoded, strict=True)
    ]
    return DecodeRow(
        decoder=case.decoder,
        steps=case.steps,
        compiled=case.compiled,
        block_size=config.block_size if in_blocks else 1,
        batch=batch,
        forwards_per_token=(forwards - prefills) * batch / tokens,
        tokens_per_second=tokens / seconds,
        first_token_seconds=first,
        tokens=tokens,
        forwards=forwards,
        prefill_forwards=prefills,
        forward_seconds=(seconds - first * len(groups)) / after_first if after_first > 0 else None,
        seconds=timing.seconds,
        spread=spread(timing.seconds),
        blocks=sum(blocks for blocks, _ in counts) if in_blocks else None,
        steps_due=sum(due for _, due in counts) if in_blocks else None,
        equal_to_plain=equal_share(timing, timings[replace(case, compiled=False)]) if case.compiled else None,
        ratio_to_ar=None,
        ratio_to_published=None,
    )


def equal_share(compiled: DecodeTiming, plain: DecodeTiming) -> float:
    """Compares the tokens of a compiled form with those of the plain one, place by place: its kernels round differently, and in
    bf16 that decides between tokens that are nearly as likely."""
    pairs = [
        pair
        for one, other in zip(compiled.decoded, plain.decoded, strict=True)
        for answer, expected in zip(one.answers, other.answers, strict=True)
        for pair in zip_longest(answer, expected)
    ]
    return sum(one == other for one, other in pairs) / len(pairs)


def with_ratios(rows: Sequence[DecodeRow]) -> list[DecodeRow]:
    """Divides tokens per second by those of AR at the same batch, and of the published loop at batch 1 with as many steps."""
    plain = {(row.decoder, row.batch, row.steps): row.tokens_per_second for row in rows if not row.compiled}

    def ratio(row: DecodeRow, other: float | None) -> float | None:
        return None if other is None else row.tokens_per_second / other

    return [
        replace(
            row,
            ratio_to_ar=ratio(row, plain.get(("ar_generate", row.batch, 1))),
            ratio_to_published=ratio(row, plain.get(("published", 1, row.steps)) if row.decoder != "ar_generate" else None),
        )
        for row in rows
    ]
