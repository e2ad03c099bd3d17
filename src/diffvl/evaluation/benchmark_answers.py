"""Questions of benchmarks -> answers, in batches, and what they took.

Place in the flow: between lmms-eval's model class and the decoder; nothing here knows lmms-eval. All questions are looked at
before the first is answered, or the first given answer scored, so that one that cannot be does not end a run of hours.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from rich.console import Console

from diffvl.decode.answer import Answer, Decoder, Message, answer_chats, context_length
from diffvl.errors import DiffvlError, UsageError, first_few
from diffvl.evaluation.likelihood import ONLY_A_BOUND, is_exact, likelihoods, spoken
from diffvl.evaluation.task_settings import TaskSettings, cut, settings_for_task
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.seeding import batch_seed
from diffvl.terminal.bars import track
from diffvl.terminal.console import say

NUM_SHOWN = 5  # of questions that cannot be answered
ROOM_STEP = 64  # tokens; the room that a context leaves is rounded down to it, so that questions can share a batch


@dataclass(frozen=True)
class Question:
    """One question. task: of which benchmark. place: task and document, for messages. chat: makes its messages, with the images
    opened. asked: how the task wants it answered, its `generation_kwargs`."""

    task: str
    place: str
    chat: Callable[[], list[Message]]
    asked: Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A question with one of its possible answers."""

    question: Question
    answer: str


@dataclass
class TaskFigures:
    """What a task took. how: how its questions were decoded. seconds: images' processing is in them; tokens: up to and including
    the stops; forwards: of the trunk, over all batches."""

    how: TaskSettings
    batches: int = 0
    answers: int = 0
    tokens: int = 0
    forwards: int = 0
    seconds: float = 0.0

    def add(self, batch: Sequence[Answer]) -> None:
        """Counts a batch in, whose forwards and seconds are those of each of its answers."""
        self.batches += 1
        self.answers += len(batch)
        self.tokens += sum(one.tokens for one in batch)
        self.forwards += batch[0].forwards
        self.seconds += batch[0].seconds


@dataclass(frozen=True)
class _Due:
    """A question with its place among all, its chat, its tokens, and how it is decoded."""

    number: int
    question: Question
    chat: Callable[[], list[Message]]
    length: int
    how: TaskSettings


class Answering:
    """Answers questions with a checkpoint.

    Args:
        settings: those of the caller, of which `named` were named and hold against what a task asks for.
    Attributes:
        figures: task -> what it took so far.
    """

    def __init__(self, decoder: Decoder, settings: DecodeSettings, named: Collection[str], batch_size: int, console: Console):
        self.decoder, self.settings, self.named, self.batch_size = decoder, settings, frozenset(named), batch_size
        self.console = console
        self.figures: dict[str, TaskFigures] = {}
        self._told: set[str] = set()

    def answers(self, questions: Sequence[Question]) -> list[tuple[str, int]]:
        """Answers all questions, those with most tokens first.

        Returns:
            for each question, in their order, the text up to what ends it, and the number of its tokens.
        Raises:
            UsageError: naming the questions that cannot be answered, before any is.
        """
        due = self._looked_at(questions)
        given: dict[int, tuple[str, int]] = {}
        batches = list(self._batches(due))
        for batch in track(self.console, batches, len(batches), "answering in batches"):
            how, figures = batch[0].how, self.figures[batch[0].question.task]
            settings = how.settings
            if not settings.is_greedy:  # a question that is asked several times has several answers
                settings = replace(settings, seed=batch_seed(settings.seed, figures.batches, 0))
            answers = answer_chats(self.decoder, [one.chat() for one in batch], settings)
            figures.add(answers)
            given |= {
                one.number: (cut(answer.text, how.until), answer.tokens) for one, answer in zip(batch, answers, strict=True)
            }
        return [given[number] for number in range(len(questions))]

    def likelihoods(self, choices: Sequence[Choice]) -> list[tuple[float, bool]]:
        """The log-likelihood of each answer, and whether greedy decoding would write it.

        Raises:
            UsageError: if the checkpoint, as it is to be decoded, has none that can be computed; or naming the questions that it
                does not take with their answers, before any is computed.
        """
        if choices and not is_exact(self.decoder.model.config, self.settings.mode):
            raise UsageError(f"task {choices[0].question.task} {ONLY_A_BOUND}")
        self._look_at(choices)
        found: list[tuple[float, bool]] = []
        batches = [
            alike[start : start + self.batch_size]
            for _, group in groupby(choices, lambda one: one.question.task)
            for alike in [list(group)]
            for start in range(0, len(alike), self.batch_size)
        ]
        for batch in track(self.console, batches, len(batches), "comparing answers"):
            figures = self.figures.setdefault(batch[0].question.task, TaskFigures(TaskSettings(self.settings)))
            start = time.monotonic()
            try:
                found += likelihoods(self.decoder, [one.question.chat() for one in batch], [one.answer for one in batch])
            except ValueError as error:
                raise UsageError(f"{batch[0].question.place}: {error}") from error
            figures.answers, figures.seconds = figures.answers + len(batch), figures.seconds + time.monotonic() - start
        return found

    def _looked_at(self, questions: Sequence[Question]) -> list[_Due]:
        """Raises UsageError with all questions that the checkpoint does not take."""
        due, problems, limit = [], [], context_length(self.decoder)
        for number, question in enumerate(track(self.console, questions, len(questions), "looking at the questions")):
            how = self._how(question)
            looked = self._chat_and_length(question, None, problems)
            if looked is None:
                continue
            chat, length = looked
            room = _room(how.settings.max_new_tokens, length, limit)
            if room < 1:
                problems.append(f"{question.place}: {length} tokens do not fit the context of {limit}")
                continue
            how = replace(how, settings=replace(how.settings, max_new_tokens=room))
            due.append(_Due(number, question, _kept(chat, question), length, how))
        _refuse(problems, f"of {len(questions)} questions cannot be answered; nothing was")
        return due

    def _look_at(self, choices: Sequence[Choice]) -> None:
        """Raises UsageError with all questions that, with their answers, the checkpoint does not take."""
        problems: list[str] = []
        limit = context_length(self.decoder)
        for one in track(self.console, choices, len(choices), "looking at the questions"):
            looked = self._chat_and_length(one.question, one.answer, problems)
            if looked is not None and limit is not None and looked[1] > limit:
                problems.append(f"{one.question.place}: {looked[1]} tokens with an answer do not fit the context of {limit}")
        _refuse(problems, f"of {len(choices)} questions, each with an answer, cannot be compared; nothing was")

    def _chat_and_length(self, question: Question, answer: str | None, problems: list[str]) -> tuple[list[Message], int] | None:
        """Makes the chat of a question, or of it with an answer, and counts its tokens; where it is refused, gives None, and the
        reason in `problems`."""
        try:
            chat = question.chat() if answer is None else spoken(question.chat(), answer)
            return chat, len(self.decoder.processor.encode_chat(chat, add_generation_prompt=answer is None).ids)
        except (DiffvlError, ValueError) as error:
            problems.append(str(error) if question.place in str(error) else f"{question.place}: {error}")
            return None

    def _how(self, question: Question) -> TaskSettings:
        """How a question is decoded; what its task asks for in vain is said once."""
        how = settings_for_task(self.settings, self.named, question.asked, question.task)
        self.figures.setdefault(question.task, TaskFigures(how))
        for word in how.unused:
            if word not in self._told:
                self._told.add(word)
                say(self.console, f"task {question.task} asks for {word}, which block decoding does not know: not used")
        return how

    def _batches(self, due: Sequence[_Due]) -> Iterator[list[_Due]]:
        """Questions of one task with one way of decoding, the longest first: a batch that does not fit is met at once, and
        neighbours are nearly as long."""
        groups: dict[tuple[str, str], list[_Due]] = {}
        for one in sorted(due, key=lambda one: -one.length):
            groups.setdefault((one.question.task, repr(one.how)), []).append(one)
        for alike in groups.values():  # each stands where its longest question does
            for start in range(0, len(alike), self.batch_size):
                yield alike[start : start + self.batch_size]


def _room(longest: int, length: int, limit: int | None) -> int:
    """How many tokens an answer may have: as many as were asked for, or up to where the context ends.

    That is a matter of its own prompt, not of its neighbours'. It is rounded down where it can be: else nearly every prompt
    would have a room of its own, and be a batch of its own.
    """
    if limit is None or length + longest <= limit:
        return longest
    room = limit - length
    return room - room % ROOM_STEP if room >= ROOM_STEP else room


def _kept(chat: list[Message], question: Question) -> Callable[[], list[Message]]:
    """What makes the chat again that was looked at. One of text is kept, for a task may draw other examples each time; images
    would not fit in memory, and are opened again."""
    parts = [part for message in chat for part in message["content"] if not isinstance(message["content"], str)]
    return (lambda: chat) if all(part["type"] == "text" for part in parts) else question.chat


def _refuse(problems: Sequence[str], what: str) -> None:
    """Raises UsageError with the problems, if there are any; those that several answers of one question share are told once."""
    if problems:
        lines = "\n  ".join(first_few(list(dict.fromkeys(problems)), NUM_SHOWN))
        raise UsageError(f"{len(problems)} {what}\n  {lines}")
