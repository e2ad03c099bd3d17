"""Prompts + who answers -> a file of records with these answers: `diffvl answers`, which makes data of a model's own words.

Every question of a record is answered in its place and in order, with the model's own earlier answers before it. Records go
through in batches of consecutive ones, which seed and place in the file decide alone; so a run that was killed goes on with the
next batch and ends with the same file. Until it is whole it lies beside, as NAME.partial, with what was asked for.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from diffvl.data.problems import Problem, as_error
from diffvl.data.prompts import Prompt, PromptReader
from diffvl.data.questions import summary
from diffvl.data.samples import chat_before, encode_record
from diffvl.decode.answer import Answer, Decoder, Message, answer_chats, check_settings, context_length, encode
from diffvl.decode.parents import LanguageModel, load_parent
from diffvl.errors import DataError, UsageError
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.seeding import batch_seed
from diffvl.store.files import PARTIAL, Writing, read_json, replace_text
from diffvl.terminal.bars import track

WEIGHTS = (".safetensors", ".gguf", ".bin")


@dataclass(frozen=True)
class AnswersRequest:
    """The arguments of the command. image_folder: where relative paths of images start; default: the folder of `data`."""

    model: str
    data: Path
    out: Path
    settings: DecodeSettings
    batch_size: int = 8
    image_folder: Path | None = None
    resume: bool = False
    trust_remote_code: bool = False


@dataclass
class Written:
    """What was written, in figures of this run; an interrupted one before it had its own. records: of the whole file.
    empty: answers without text. cut: answers that `max_new_tokens` ended, or the context (see `_answer_turn`)."""

    records: int = 0
    answers: int = 0
    tokens: int = 0
    empty: int = 0
    cut: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def count(self, answers: list[Answer], cut: int) -> None:
        """Counts the answers of one record, of which so many were cut."""
        self.records += 1
        self.answers += len(answers)
        self.tokens += sum(answer.tokens for answer in answers)
        self.empty += sum(not answer.text for answer in answers)
        self.cut += cut


def write_answers(request: AnswersRequest, console: Console) -> Written:
    """Answers every record of a file and writes `request.out`; progress goes to `console`.

    Raises:
        UsageError, CheckpointError, UnsupportedModelError: on arguments that do not fit together or cannot be loaded.
        DataError: naming file and line of records that cannot be answered, before the first is.
        DiskError: what was answered stays, and `--resume` goes on from it.
    """
    work = request.out.with_name(request.out.name + PARTIAL)
    _refuse_targets(request, work)
    reader = PromptReader(request.data, None if request.image_folder is None else str(request.image_folder))
    total = _count_records(reader, console)
    begun = _resumed(request, work) if work.exists() else 0
    decoder = load_parent(request.model, request.trust_remote_code, console)
    check_settings(request.settings, decoder.model.config)
    _check_fit(decoder, reader, request.settings, track(console, _prompts(reader), total, "checking that all records fit"))
    if not begun:  # what was asked for first, so that answers never lie there without it
        replace_text(_asked_file(work), json.dumps(_asked(request), indent=2) + "\n")
    written = Written(records=begun)
    rest = islice(_prompts(reader), begun, None)
    with Writing(work), work.open("a", encoding="utf-8") as lines:
        shown = track(console, _answered(decoder, rest, request, begun), total, lambda: _so_far(written), begun)
        for prompt, answers, cut in shown:
            value = prompt.with_answers([answer.text for answer in answers])
            lines.write(json.dumps(value, ensure_ascii=False) + "\n")
            written.count(answers, cut)
            if not written.records % request.batch_size:
                lines.flush()
    work.replace(request.out)
    _asked_file(work).unlink()
    return written


# --- what is there already -----------------------------------------------------------------------------------------------


def _refuse_targets(request: AnswersRequest, work: Path) -> None:
    """Raises UsageError if writing would touch something that is there, or goes nowhere."""
    out = request.out
    if out.suffix.lower() != ".jsonl":
        raise UsageError(f"--out {out}: answers are written as JSON lines: name a .jsonl file")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}: make it first")
    if out.exists():
        raise UsageError(f"--out {out} exists; nothing was written. Choose another --out, or remove it")
    if work.exists() and not request.resume:
        raise UsageError(f"{work} holds an interrupted run: continue it with --resume, or remove it")


def _asked_file(work: Path) -> Path:
    return work.with_name(work.name + ".json")


def _asked(request: AnswersRequest) -> dict[str, Any]:
    """What decides about the answers."""
    model = Path(request.model)
    files = sorted(model.iterdir()) if model.is_dir() else [model] if model.is_file() else []
    weights = [(file.name, file.stat().st_size) for file in files if file.suffix in WEIGHTS]
    with request.data.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    settings = request.settings
    return {
        "model": os.path.abspath(model) if model.exists() else request.model,
        "weights": [list(one) for one in weights],
        "data": digest,
        "image folder": None if request.image_folder is None else os.path.abspath(request.image_folder),
        "batch size": request.batch_size,
        "settings": [settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p, settings.seed],
    }


def _resumed(request: AnswersRequest, work: Path) -> int:
    """Cuts an interrupted run's answers where its last whole batch ends; returns how many records it has.

    Raises:
        UsageError: if it was asked for something else.
    """
    asked = _asked(request)
    before = read_json(_asked_file(work)) if _asked_file(work).is_file() else {}
    if changed := [name for name, value in asked.items() if before.get(name) != value]:
        raise UsageError(
            f"{work} was begun with another {', '.join(changed)}: ask as before, or remove it and begin anew without --resume"
        )
    ends = [0]
    with work.open("rb") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    whole = (len(ends) - 1) // request.batch_size * request.batch_size
    with Writing(work):
        os.truncate(work, ends[whole])
    return whole


# --- the records ---------------------------------------------------------------------------------------------------------


def _count_records(reader: PromptReader, console: Console) -> int:
    """Counts the records. Raises DataError with all that cannot be read."""
    problems, total = [], 0
    for total, item in enumerate(track(console, reader, None, f"reading {reader.path.name}"), 1):  # noqa: B007
        if isinstance(item, Problem):
            problems.append(item)
    if problems:
        raise as_error(problems, reader.path, "nothing was answered")
    return total


def _prompts(reader: PromptReader) -> Iterator[Prompt]:
    for item in reader:
        if isinstance(item, Problem):  # the file was whole a moment ago
            raise item.error()
        yield item


def _check_fit(decoder: Decoder, reader: PromptReader, settings: DecodeSettings, prompts: Iterator[Prompt]) -> None:
    """Raises DataError with all records that the model cannot take, or whose answers may not fit its context."""
    limit, problems = context_length(decoder), []
    for prompt in prompts:
        record = prompt.record
        if isinstance(decoder.model, LanguageModel) and (record.images or record.videos):
            problems.append(DataError(f"{record.source}: a record with images, and this is a language model: convert it first"))
            continue
        try:
            tokens = len(encode_record(record, decoder.processor).ids)
        except DataError as error:
            problems.append(error)
            continue
        needed = tokens + len(prompt.turns) * settings.max_new_tokens
        if limit is not None and needed > limit:
            told = f"{tokens} tokens and {len(prompt.turns)} answers of up to {settings.max_new_tokens}"
            advice = "lower --max-new-tokens, or shorten or remove the record"
            problems.append(DataError(f"{record.source}: {told} do not fit the context of {limit}: {advice}"))
    if problems:
        raise summary(problems)


# --- the answers ---------------------------------------------------------------------------------------------------------


def _answered(
    decoder: Decoder, prompts: Iterator[Prompt], request: AnswersRequest, begun: int
) -> Iterator[tuple[Prompt, list[Answer], int]]:
    """Answers batch by batch, in order; `begun` records went before. Gives each record, its answers and how many were cut."""
    number = begun // request.batch_size
    while batch := list(islice(prompts, request.batch_size)):
        answers: list[list[Answer]] = [[] for _ in batch]
        cut = [0] * len(batch)
        for turn in range(max(len(prompt.turns) for prompt in batch)):
            rows = [row for row, prompt in enumerate(batch) if len(prompt.turns) > turn]
            chats = [_chat(batch[row], answers[row], decoder) for row in rows]
            settings = request.settings
            if not settings.is_greedy:
                settings = replace(settings, seed=batch_seed(settings.seed, number, turn))
            given, longest = _answer_turn(decoder, chats, settings, [batch[row] for row in rows])
            for row, answer in zip(rows, given, strict=True):
                answers[row].append(answer)
                cut[row] += answer.tokens >= longest
        yield from zip(batch, answers, cut, strict=True)
        number += 1


def _answer_turn(
    decoder: Decoder, chats: list[list[Message]], settings: DecodeSettings, prompts: list[Prompt]
) -> tuple[list[Answer], int]:
    """Answers a question of each record of a batch, and says how long an answer could be.

    An earlier answer that is read again may have more tokens than were written (half a character is three of them), so that what
    was sure to fit does not. Such answers end where the context does: the file goes on.

    Raises:
        DataError: for a question that does not fit at all.
    """
    try:
        return answer_chats(decoder, chats, settings), settings.max_new_tokens
    except UsageError:
        limit = context_length(decoder)
        lengths = [encode(decoder, [chat])["input_ids"].shape[1] for chat in chats]
        if limit is None or max(lengths) + settings.max_new_tokens <= limit:
            raise
    length, prompt = max(zip(lengths, prompts, strict=True), key=lambda one: one[0])
    if length >= limit:
        raise DataError(
            f"{prompt.record.source}: {length} tokens with its earlier answers, which leave no room for the next one in the "
            f"context of {limit}: remove the record, or begin anew with fewer --max-new-tokens"
        )
    return answer_chats(decoder, chats, replace(settings, max_new_tokens=limit - length)), limit - length


def _chat(prompt: Prompt, answers: list[Answer], decoder: Decoder) -> list[dict[str, Any]]:
    """The conversation up to the next answer."""
    record = prompt.answered([answer.text for answer in answers])
    return chat_before(record, prompt.turns[len(answers)], decoder.processor.sampler)


def _so_far(written: Written) -> str:
    return f"answering, {written.rate:,.0f} tokens/s"
