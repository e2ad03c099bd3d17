"""A checkpoint's own answers to the questions of a file, under several ways to decode: what `--sweep` and `bench modes` compare.

Every question is answered once in each way, alone, each question beginning with another way, so that a machine that slows down
slows all of them. Scores are those of `diffvl evaluate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.bench import machine
from diffvl.bench.measure import schedule
from diffvl.bench.subject import load_block_decoder
from diffvl.bench.train import pick_device
from diffvl.data.records import Record, iterate_records
from diffvl.data.textscore import edit_similarity, is_exact
from diffvl.decode.answer import Answer, Decoder, DecodeSettings, answer_chats
from diffvl.evaluation.answer_turns import chat_before, questions
from diffvl.evaluation.reading import reading_of
from diffvl.terminal.bars import track

NEW_TOKENS = 128


@dataclass(frozen=True)
class AnswersBench:
    """What the command line asks for; limit: questions, None for all of the file."""

    directory: Path
    data: Path
    limit: int | None = None
    max_new_tokens: int | None = None
    device: str = "auto"

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Scored:
    answer: Answer
    exact: bool
    similarity: float


def load_questions(request: AnswersBench) -> tuple[Decoder, list[tuple[Record, int]]]:
    """The checkpoint, and (record, turn) of each question.

    Raises:
        CheckpointError, DataError, UsageError: as `diffvl evaluate`; and for a checkpoint that does not decode in blocks.
    """
    decoder = load_block_decoder(request.directory, pick_device(request.device))
    reading = reading_of(request.directory, request.data)
    records = iterate_records(request.data, reading.image_folder, reading.unpaired_turns)
    return decoder, list(islice(questions(records), request.limit))


def answer_all(
    decoder: Decoder, asked: list[tuple[Record, int]], ways: Mapping[str, DecodeSettings], console: Console
) -> dict[str, list[Scored]]:
    """Way -> its answers, in the order of the questions."""
    scored: dict[str, list[Scored]] = {name: [] for name in ways}
    for settings in ways.values():
        answer_chats(decoder, [chat_before(*asked[0])], settings, shorten=True)  # warms up
    plan = list(schedule(list(ways), len(asked)))
    for number, name in track(console, plan, len(plan), "answering"):
        record, turn = asked[number]
        (given,) = answer_chats(decoder, [chat_before(record, turn)], ways[name], shorten=True)
        truth = record.turns[turn].text
        scored[name].append(Scored(given, is_exact(given.text, truth), edit_similarity(given.text, truth)))
    return scored


def described(request: AnswersBench, decoder: Decoder, asked: int, load_before: float) -> dict[str, Any]:
    """Machine and run, for the head of a table."""
    config = decoder.model.config
    return machine.describe() | {
        "device": decoder.model.device.type,
        "dtype": str(decoder.model.language_model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
        "model": f"{request.directory} ({config.text_config.model_type})",
        "questions": asked,
        "block_size": config.block_size,
        "steps": config.block_size,
        "context": config.context,
        "settings": {"data": str(request.data), "limit": request.limit, "max_new_tokens": request.new_tokens},
    }


def totals(found: list[Scored]) -> dict[str, Any]:
    """Sums over all answers; seconds are those of `generate`, pictures' features included and their files not."""
    tokens, forwards = sum(one.answer.tokens for one in found), sum(one.answer.forwards for one in found)
    seconds = sum(one.answer.prefill_seconds + one.answer.decode_seconds for one in found)
    return {
        "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
        "exact_match": sum(one.exact for one in found) / len(found),
        "edit_similarity": sum(one.similarity for one in found) / len(found),
        "answers": len(found),
        "tokens": tokens,
        "forwards": forwards,
        "seconds": seconds,
    }
