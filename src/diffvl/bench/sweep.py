"""`diffvl bench decode DIR --data FILE --sweep`: what a lower confidence threshold buys, and what it costs in answers.

Each question of the file is answered at every threshold (each question beginning with another one), alone, by
`low_confidence_dynamic` with a step for every token of a block, so that the threshold alone decides how many settle at once; at
1.0 no confidence is above it and they settle one by one. Scores are those of `diffvl evaluate`.
"""

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.answer_turns import chat_before, questions
from diffvl.bench import machine
from diffvl.bench.measure import schedule
from diffvl.bench.subject import load_block_decoder
from diffvl.bench.train import pick_device
from diffvl.data.records import iterate_records
from diffvl.decode import Answer, DecodeSettings, answer_chats
from diffvl.progress import track
from diffvl.resume import reading_of
from diffvl.textscore import edit_similarity, is_exact

THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.6)
NEW_TOKENS = 128


@dataclass(frozen=True)
class SweepBench:
    """What the command line asks for; limit: questions, None for all of the file."""

    directory: Path
    data: Path
    limit: int | None = None
    max_new_tokens: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Scored:
    answer: Answer
    exact: bool
    similarity: float


def sweep(request: SweepBench, console: Console) -> dict[str, Any]:
    """{"machine", "rows"}, one row for each threshold.

    Raises:
        CheckpointError, DataError, UsageError: as `diffvl evaluate`; and for a checkpoint that does not decode in blocks.
    """
    load_before = round(machine.load(), 2)
    decoder = load_block_decoder(request.directory, pick_device(request.device))
    reading = reading_of(request.directory, request.data)
    records = iterate_records(request.data, reading.image_folder, reading.unpaired_turns)
    asked = list(islice(questions(records), request.limit))
    settings = DecodeSettings(
        max_new_tokens=NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens,
        strategy="low_confidence_dynamic",
    )
    scored: dict[str, list[Scored]] = {str(threshold): [] for threshold in THRESHOLDS}
    chat = chat_before(*asked[0])
    answer_chats(decoder, [chat], replace(settings, threshold=1.0), shorten=True)  # warms up
    plan = list(schedule(list(scored), len(asked)))
    for number, name in track(console, plan, len(plan), "answering"):
        record, turn = asked[number]
        chosen = replace(settings, threshold=float(name))
        (given,) = answer_chats(decoder, [chat_before(record, turn)], chosen, shorten=True)
        truth = record.turns[turn].text
        scored[name].append(Scored(given, is_exact(given.text, truth), edit_similarity(given.text, truth)))
    config = decoder.model.config
    described = machine.describe() | {
        "device": decoder.model.device.type,
        "dtype": str(decoder.model.language_model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "model": f"{request.directory} ({config.text_config.model_type})",
        "questions": len(asked),
        "block_size": config.block_size,
        "steps": config.block_size,
        "context": config.context,
        "settings": {"data": str(request.data), "limit": request.limit, "max_new_tokens": settings.max_new_tokens},
    }
    return {"machine": described, "rows": [sweep_row(float(name), found) for name, found in scored.items()]}


def sweep_row(threshold: float, found: list[Scored]) -> dict[str, Any]:
    """Sums over all answers; seconds are those of `generate`, pictures' features included and their files not."""
    tokens, forwards = sum(one.answer.tokens for one in found), sum(one.answer.forwards for one in found)
    seconds = sum(one.answer.prefill_seconds + one.answer.decode_seconds for one in found)
    return {
        "threshold": threshold,
        "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
        "exact_match": sum(one.exact for one in found) / len(found),
        "edit_similarity": sum(one.similarity for one in found) / len(found),
        "answers": len(found),
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
    }
