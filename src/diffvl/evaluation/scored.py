"""Records -> a checkpoint's answers to their questions, each scored against the true one.

Each question is asked after the true history of its conversation. Greedy answers do not depend on which others they are decoded
with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from diffvl.data.records import Record
from diffvl.data.samples import chat_before
from diffvl.data.textscore import edit_similarity, is_exact
from diffvl.decode.answer import Answer, Decoder, answer_within_context
from diffvl.evaluation.questions import questions
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.terminal.bars import track

BATCH_SIZE = 8

Question = tuple[Record, int]  # and the turn that answers it


@dataclass(frozen=True)
class ScoredAnswer:
    """An answer, and how near it is to the true one. record: the number of its record among those that were asked."""

    answer: Answer
    exact: bool
    similarity: float
    record: int = 0


@dataclass(frozen=True)
class Answered:
    """scored: in the order of the records and their turns. forwards: passes of the trunk over all batches."""

    scored: list[ScoredAnswer]
    forwards: int


def scored(question: Question, answer: Answer, number: int = 0) -> ScoredAnswer:
    """Scores the answer to a question; `number`: of its record."""
    record, turn = question
    truth = record.turns[turn].text
    return ScoredAnswer(answer, is_exact(answer.text, truth), edit_similarity(answer.text, truth), number)


def answer_records(
    decoder: Decoder, records: Sequence[Record], settings: DecodeSettings, console: Console, text: str = "answering"
) -> Answered:
    """Answers all questions of the records, in batches.

    Raises:
        UsageError, DataError: if settings, checkpoint and records do not fit together.
    """
    asked = [(number, question) for number, record in enumerate(records) for question in questions([record])]
    chunks = [asked[start : start + BATCH_SIZE] for start in range(0, len(asked), BATCH_SIZE)]
    found: list[ScoredAnswer] = []
    forwards = 0
    for chunk in track(console, chunks, len(chunks), text):
        answers, batches = answer_questions_of(decoder, [question for _, question in chunk], settings)
        found += [scored(question, given, number) for (number, question), given in zip(chunk, answers, strict=True)]
        forwards += sum(one.forwards for one in batches)
    return Answered(found, forwards)


def answer_questions_of(
    decoder: Decoder, chunk: Sequence[Question], settings: DecodeSettings
) -> tuple[list[Answer], list[Answer]]:
    """Answers questions together; answers end where the context does. Returns and raises as `answer_within_context`."""
    sampler = decoder.processor.sampler
    return answer_within_context(decoder, [chat_before(record, turn, sampler) for record, turn in chunk], settings)
