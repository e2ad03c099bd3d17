"""A checkpoint's own answers to the questions of a file, under several settings: `diffvl bench decode DIR --data FILE --sweep`
and `diffvl bench modes DIR --data FILE`.

The sweep: what a lower confidence threshold gains in speed, and what it costs in answers. `low_confidence_dynamic` takes a step
for every token of a block, so that the threshold alone decides how many settle at once. At 1.0 no confidence is above it and they
settle one by one.

The modes: is a converted model faster in blocks than token by token, with the same weights? In blocks as many tokens settle at
once as have a confidence above `THRESHOLD`.

Every question is answered once under each setting, alone, each question beginning with another setting, so that a machine that
slows down slows all of them. Scores are those of `diffvl evaluate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from diffvl.bench.comparison import AnswersRow, Comparison
from diffvl.bench.decode import DecodeBench, refuse_idle_arguments
from diffvl.bench.machine import describe_run, load_average, pick_device
from diffvl.bench.turns import Player, answer_in_turns
from diffvl.bench.workload import load_block_decoder
from diffvl.data.source_records import iterate_source, source_at
from diffvl.decode.answer import Decoder
from diffvl.errors import UsageError
from diffvl.evaluation.evaluate import reading_of
from diffvl.evaluation.questions import questions
from diffvl.evaluation.scored import Question, ScoredAnswer
from diffvl.hub.settings_diffvl import DecodeSettings

NEW_TOKENS = 128
THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.6)  # of the sweep
THRESHOLD = 0.9  # of the modes


@dataclass(frozen=True)
class AnswersBench:
    """What the command line asks for. limit: questions, None for all of the file."""

    directory: Path
    data: Path
    limit: int | None = None
    max_new_tokens: int | None = None
    device: str = "auto"

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    def in_blocks(self, threshold: float) -> DecodeSettings:
        """Settings under which the tokens above a confidence settle."""
        return DecodeSettings(max_new_tokens=self.new_tokens, remasking="low_confidence_dynamic", threshold=threshold)


# --- the sweep -------------------------------------------------------------------------------------------------------------


def sweep_request(request: DecodeBench, sweep: bool, limit: int | None) -> AnswersBench:
    """Reads what `--sweep` is asked to do. Raises UsageError if something is missing, or would have no effect."""
    if not sweep:
        raise UsageError(f"--limit {limit} has no effect without --sweep")
    if request.directory is None or request.data is None:
        raise UsageError("--sweep measures answers against true ones: give DIR and --data FILE")
    refuse_idle_arguments(request)
    idle = {"--steps": request.steps, "--batch": request.batch, "--repeats": request.repeats, "--seed": request.seed or None}
    idle |= {"--compile": request.compile, "--compile-batch": request.compile_batch}
    for flag, value in idle.items():
        if value is not None:
            raise UsageError(f"{flag} has no effect with --sweep, which answers every question once at each threshold")
    return AnswersBench(request.directory, request.data, limit, request.max_new_tokens, request.device)


def sweep_thresholds(request: AnswersBench, console: Console) -> Comparison[AnswersRow]:
    """Measures every threshold. Raises as `load_questions`."""
    run, scored = answer_all(request, {str(threshold): request.in_blocks(threshold) for threshold in THRESHOLDS}, console)
    return Comparison(run, [make_row(answers, threshold=float(name)) for name, answers in scored.items()])


# --- the modes -------------------------------------------------------------------------------------------------------------


def compare_modes(request: AnswersBench, console: Console) -> Comparison[AnswersRow]:
    """Measures decoding in blocks, then token by token. more: speedup, tokens per second of the first over those of the second.

    Raises as `load_questions`.
    """
    settings = {
        "blocks": request.in_blocks(THRESHOLD),
        "ar": DecodeSettings(max_new_tokens=request.new_tokens, mode="ar"),
    }
    run, scored = answer_all(request, settings, console)
    rows = [make_row(answers, mode=name) for name, answers in scored.items()]
    speedup = rows[0].tokens_per_second / rows[1].tokens_per_second
    return Comparison(run | {"threshold": THRESHOLD}, rows, {"speedup": speedup})


def modes_line(comparison: Comparison[AnswersRow]) -> str:
    """Says the comparison in one line."""
    blocks, ar = comparison.rows
    return (
        f"in blocks of {comparison.machine['block_size']}: {_figures(blocks)}; token by token: {_figures(ar)}; "
        f"{comparison.more['speedup']:.2f} times the speed, {blocks.answers} answers one at a time"
    )


def _figures(row: AnswersRow) -> str:
    speed = f"{row.tokens_per_forward:.2f} tokens per forward, {row.tokens_per_second:.1f} tokens/s"
    return f"{speed}, exact match {row.exact_match:.2f}"


# --- both ------------------------------------------------------------------------------------------------------------------


def load_questions(directory: Path, data: Path, limit: int | None, device: str) -> tuple[Decoder, list[Question]]:
    """Loads a checkpoint, and (record, turn) of each question of a file.

    Raises:
        CheckpointError, DataError, UsageError: as `diffvl evaluate`; and for a checkpoint that does not decode in blocks.
    """
    decoder = load_block_decoder(directory, pick_device(device))
    reading = reading_of(directory, data)
    records = iterate_source(source_at(data, reading), reading.unpaired_turns)
    return decoder, list(islice(questions(records), limit))


def answer_all(
    request: AnswersBench, settings: Mapping[str, DecodeSettings], console: Console
) -> tuple[dict[str, Any], dict[str, list[ScoredAnswer]]]:
    """Answers every question under each of the settings, which have names; returns what it ran on, and the answers by name."""
    load_before = load_average()
    decoder, turns = load_questions(request.directory, request.data, request.limit, request.device)
    players = {name: Player(decoder, chosen) for name, chosen in settings.items()}
    calls = answer_in_turns(players, [[question] for question in turns], 1, console, "answering")
    scored = {name: [one for call in of_player for one in call.scored] for name, of_player in calls.items()}
    model, config = decoder.model, decoder.model.config
    run = describe_run(model.device, model.trunk.dtype, load_before) | {
        "model": f"{request.directory} ({config.text_config.model_type})",
        "questions": len(turns),
        "block_size": config.block_size,
        "steps": config.block_size,
        "context": config.context,
        "settings": {"data": str(request.data), "limit": request.limit, "max_new_tokens": request.new_tokens},
    }
    return run, scored


def make_row(scored: list[ScoredAnswer], threshold: float | None = None, mode: str | None = None) -> AnswersRow:
    """Sums over all answers under one setting."""
    answers = [one.answer for one in scored]
    tokens, forwards = sum(answer.tokens for answer in answers), sum(answer.forwards for answer in answers)
    seconds = sum(answer.prefill_seconds + answer.decode_seconds for answer in answers)
    return AnswersRow(
        threshold=threshold,
        mode=mode,
        tokens_per_forward=tokens / forwards,
        tokens_per_second=tokens / seconds,
        exact_match=sum(one.exact for one in scored) / len(scored),
        edit_similarity=sum(one.similarity for one in scored) / len(scored),
        answers=len(scored),
        tokens=tokens,
        forwards=forwards,
        seconds=seconds,
    )
