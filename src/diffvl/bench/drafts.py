"""A lossless checkpoint's answers by every way to draft: `diffvl bench drafts DIR --data FILE`.

The answer is the parent's whatever is done; what differs is how many tokens a forward gives, and the time. So every question is
answered token by token by transformers' own `generate`, and by each way to draft; each question begins with another of them, so
that what else the machine does hits all alike. The answers are compared, and that is a figure too: in fp32 all are equal, in
bf16 those of the parent itself differ with the batch.

What a forward costs by its tokens is measured beside it (`costs_diffvl`). By that and by what was accepted it is said what a
length should gain, and the row `auto` is what decoding chooses by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from diffvl.bench.answers import load_questions
from diffvl.bench.comparison import Comparison, DraftRow
from diffvl.bench.decode import parse_numbers
from diffvl.bench.machine import describe_run, load_average
from diffvl.bench.timing import schedule
from diffvl.data.samples import chat_before
from diffvl.decode.answer import Decoder, Message, decode, encode
from diffvl.errors import UsageError
from diffvl.hub.answers_diffvl import DraftFigures
from diffvl.hub.costs_diffvl import Acceptance, Costs, measured
from diffvl.hub.settings_diffvl import DRAFTING, DecodeSettings
from diffvl.store.checkpoint import cast_weights
from diffvl.terminal.bars import spinner_or_line, track

NEW_TOKENS, QUESTIONS = 128, 16
BATCHES = (1, 8)
AR, AUTO = "ar", "auto"


@dataclass(frozen=True)
class DraftsBench:
    """What the command line asks for; None takes the default."""

    directory: Path
    data: Path
    limit: int | None = None
    lengths: str | None = None
    batch: str | None = None
    max_new_tokens: int | None = None
    threshold: float | None = None
    precision: Literal["fp32", "bf16"] | None = None
    device: str = "auto"

    def ways(self, longest: int, lengths: Sequence[int]) -> dict[str, DecodeSettings]:
        """What is compared, by name."""
        if max(lengths) > longest:
            raise UsageError(f"--lengths {max(lengths)}: expected at most {longest}, the longest draft of this checkpoint")
        plain = DecodeSettings(max_new_tokens=NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens)
        drafts = replace(plain, mode="speculative", draft_threshold=self.threshold)
        ways = {AR: replace(plain, mode="ar")}
        for drafting in DRAFTING:
            ways |= {f"{drafting} {length}": replace(drafts, drafting=drafting, draft_length=length) for length in lengths}
        return ways | {AUTO: drafts}


@dataclass
class Sums:
    """Of one way at one batch size, over all answers."""

    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0
    drafts: DraftFigures = field(default_factory=DraftFigures)
    answers: list[str] = field(default_factory=list)

    def add(self, decoder: Decoder, chats: list[list[Message]], settings: DecodeSettings) -> None:
        """Answers some questions together."""
        answers, output = decode(decoder, encode(decoder, chats), settings)
        assert output.tokens is not None and output.forwards is not None
        assert output.prefill_seconds is not None and output.decode_seconds is not None
        self.tokens += output.tokens
        self.forwards += output.forwards
        self.seconds += output.prefill_seconds + output.decode_seconds
        self.answers += [answer.text for answer in answers]
        if output.drafts is not None:
            self.drafts.add(output.drafts)


def compare_drafts(request: DraftsBench, console: Console) -> Comparison[DraftRow]:
    """Runs the whole comparison; progress goes to `console`. more: `costs`, what a forward takes by its tokens.

    Raises:
        UsageError, CheckpointError, DataError: on arguments that do not fit together, or a checkpoint or file that is wrong.
    """
    load_before = load_average()
    decoder, asked = load_questions(request.directory, request.data, request.limit or QUESTIONS, request.device)
    model, config = decoder.model, decoder.model.config
    if model.gate is None:
        raise UsageError(f"{request.directory}: no gated adapters there; expected a checkpoint of a lossless conversion")
    if request.precision is not None:
        cast_weights(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[request.precision])
    batches = parse_numbers("--batch", request.batch, BATCHES)
    lengths = parse_numbers("--lengths", request.lengths, tuple(dict.fromkeys((1, 2, config.block_size))))
    ways = request.ways(config.block_size, lengths)
    chats = [chat_before(*one, decoder.processor.sampler) for one in asked]
    with spinner_or_line(console, "timing forwards"):
        costs = measured(model, max(batches) * (max(lengths) + 1) ** 2)
    sums = {(name, batch): Sums() for batch in batches for name in ways}
    for batch in batches:
        groups = [chats[start : start + batch] for start in range(0, len(chats), batch)]
        for settings in ways.values():
            decode(decoder, encode(decoder, groups[0]), settings)  # warms up
        plan = schedule(list(ways), len(groups))
        for number, name in track(console, plan, len(plan), f"answering, batch {batch}"):
            sums[name, batch].add(decoder, groups[number], ways[name])
    run = describe_run(model.device, model.trunk.dtype, load_before) | {
        "model": f"{request.directory} ({config.text_config.model_type})",
        "questions": len(chats),
        "settings": {"data": str(request.data), "max_new_tokens": ways[AR].max_new_tokens, "threshold": request.threshold},
    }
    return Comparison(run, [_row(name, batch, sums, costs) for name, batch in sums], {"costs": _cost_table(costs)})


def _row(name: str, batch: int, sums: dict[tuple[str, int], Sums], costs: Costs) -> DraftRow:
    own, ar = sums[name, batch], sums[AR, batch]
    single = next(found for (way, _), found in sums.items() if way == AR)
    drafting, _, length = name.partition(" ")
    acceptance = Acceptance([float(count) for count in own.drafts.reached], [float(count) for count in own.drafts.agreed])
    expected = costs.tokens_per_second(drafting, int(length), batch, acceptance) if length else None
    plain = costs.tokens_per_second("fused", 0, batch, acceptance)
    return DraftRow(
        way=name,
        batch=batch,
        answers=len(own.answers),
        equal=sum(one == other for one, other in zip(own.answers, ar.answers, strict=True)),
        equal_to_single=sum(one == other for one, other in zip(own.answers, single.answers, strict=True)),
        accepted_per_round=own.drafts.accepted_per_round if own.drafts.rounds else None,
        accepted_by_place=[one / other for one, other in zip(own.drafts.agreed, own.drafts.reached, strict=True)],
        tokens=own.tokens,
        forwards=own.forwards,
        tokens_per_forward=own.tokens / own.forwards,
        seconds=own.seconds,
        tokens_per_second=own.tokens / own.seconds,
        ratio_to_ar=(own.tokens / own.seconds) / (ar.tokens / ar.seconds),
        expected_ratio=None if expected is None else expected / plain,
    )


def _cost_table(costs: Costs) -> list[dict[str, Any]]:
    rows = zip(costs.tokens, costs.plain, costs.adapted, strict=True)
    return [{"tokens": tokens, "plain_ms": 1e3 * plain, "adapted_ms": 1e3 * adapted} for tokens, plain, adapted in rows]


def draft_tables(comparison: Comparison[DraftRow]) -> list[tuple[list[str], list[tuple[str, ...]]]]:
    """The figures as tables: costs, then ways."""
    costs = [(str(row["tokens"]), f"{row['plain_ms']:.1f}", f"{row['adapted_ms']:.1f}") for row in comparison.more["costs"]]
    single = comparison.rows[0].batch
    headings = ["way", "batch", "accepted/round", "by place", "tokens/forward", "tokens/s", "/ ar", "expected", "equal to ar"]
    rows = [
        (
            *(row.way, str(row.batch), "-" if row.accepted_per_round is None else f"{row.accepted_per_round:.2f}"),
            " ".join(f"{rate:.2f}" for rate in row.accepted_by_place) or "-",
            *(f"{row.tokens_per_forward:.2f}", f"{row.tokens_per_second:.1f}", f"{row.ratio_to_ar:.2f}"),
            "-" if row.expected_ratio is None else f"{row.expected_ratio:.2f}",
            f"{row.equal} of {row.answers} (at batch {single}: {row.equal_to_single})",
        )
        for row in comparison.rows
    ]
    return [(["tokens of a forward", "ms", "ms with adapters"], costs), (headings, rows)]
