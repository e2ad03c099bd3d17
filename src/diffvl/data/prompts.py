"""A file of prompts -> `Prompt`s, for `diffvl answers`: records whose answers are still to be given, or to be given anew.

A record is one of training (`records`), of which answers may be missing: every question is answered in its place, whether an
answer stands there or not, but for those marked with `train: false`, which are context and stay. A row of `questions`, with
`prompt` in the place of turns, becomes a record of one question. Whatever else a record says it keeps.

Invariant: what `Prompt.with_answers` gives is read by `records` again, as the same questions.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffvl.data.columns import ColumnNames
from diffvl.data.content import escaped
from diffvl.data.image_folder import ImageFolder
from diffvl.data.jsonfile import check_path
from diffvl.data.keys import is_absent, trained_of
from diffvl.data.problems import Problem
from diffvl.data.reading import json_rows
from diffvl.data.records import FORMS, Record, RecordReader
from diffvl.data.rows import Part, Row
from diffvl.errors import DataError

BLANK = "-"  # stands for an answer that is not there yet


@dataclass(frozen=True)
class Prompt:
    """A record to be answered.

    value: the object as it is written, with `BLANK` where an answer is to come. form: the key of its turns. places: those of the
    answers to come in it. record: the same as the rest of diffvl reads it; turns: the answers to come among its turns.
    """

    value: dict[str, Any]
    form: str
    places: tuple[int, ...]
    record: Record
    turns: tuple[int, ...]

    def answered(self, answers: Sequence[str]) -> Record:
        """The record with its first answers, the others still blank."""
        given = dict(zip(self.turns, answers, strict=False))
        turns = (replace(turn, text=given.get(number, turn.text)) for number, turn in enumerate(self.record.turns))
        return replace(self.record, turns=tuple(turns))

    def with_answers(self, answers: Sequence[str]) -> dict[str, Any]:
        """The object with all its answers in place."""
        value = copy.deepcopy(self.value)
        _, text_key, _ = FORMS[self.form]
        for place, answer in zip(self.places, answers, strict=True):
            value[self.form][place][text_key] = escaped(answer)
        return value


class PromptReader:
    """Reads the prompts of one file, as often as it is asked to."""

    def __init__(self, path: Path, image_folder: str | None) -> None:
        """
        Args:
            image_folder: where relative paths of images start; default: the file's folder.
        Raises:
            DataError: for a file that is none of records.
        """
        check_path(path)
        self.path, self.images = path, ImageFolder(image_folder, str(path.parent))

    def __iter__(self) -> Iterator[Prompt | Problem]:
        """Gives every record of the file, or in its place what is wrong with it."""
        reader = RecordReader(self.images, "error")
        rows = json_rows(str(self.path), self.path.name, ColumnNames(None), False, Part())
        number = 0
        for number, (_, row) in enumerate(rows, 1):
            yield self._prompt(row, number, reader)
        if not number:
            raise DataError(f"{self.path}: no records in it; expected at least one object with `conversations` or `prompt`")

    def _prompt(self, row: Row, number: int, reader: RecordReader) -> Prompt | Problem:
        value, form, places = row.value, "", ()
        if isinstance(value, dict):
            value = _as_turns(value)
            form = next((name for name in FORMS if isinstance(value.get(name), list)), "")
            if form:
                value, places = _with_blanks(value, form)
        record = reader.record_or_problem(row._replace(value=value), self.path, number)
        if isinstance(record, Problem):
            return record
        asked = [turn for turn, spoken in enumerate(record.turns) if spoken.role == "assistant" and spoken.trained]
        return Prompt(value, form, places, record, tuple(asked))


def _as_turns(value: dict[str, Any]) -> dict[str, Any]:
    """A row of questions as a record of one; the turns stand where the prompt stood."""
    prompt = value.get("prompt")
    if not isinstance(prompt, str) or any(not is_absent(value.get(form)) for form in FORMS):
        return value
    turns = ("conversations", [{"from": "human", "value": prompt}])
    kept = [turns if key == "prompt" else (key, item) for key, item in value.items() if key not in FORMS]
    return dict(kept)


def _with_blanks(value: dict[str, Any], form: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The object with a blank for every answer to come, and their places among its turns. What is wrong with a turn is told by
    who reads it."""
    speaker_key, text_key, roles = FORMS[form]
    names = {role: name for name, role in roles.items()}
    turns: list[Any] = []
    for item in value[form]:
        if turns and _role(item, form) == _role(turns[-1], form) == "user":
            turns.append({speaker_key: names["assistant"], text_key: BLANK})
        turns.append(item)
    if turns and _role(turns[-1], form) == "user":
        turns.append({speaker_key: names["assistant"], text_key: BLANK})
    places = [place for place, item in enumerate(turns) if _role(item, form) == "assistant" and _is_asked(item)]
    for place in places:
        turns[place] = {**turns[place], text_key: BLANK}
    return {**value, form: turns}, tuple(places)


def _role(item: Any, form: str) -> str | None:
    speaker_key, _, roles = FORMS[form]
    speaker = item.get(speaker_key) if isinstance(item, dict) else None
    return roles.get(speaker) if isinstance(speaker, str) else None


def _is_asked(item: dict[str, Any]) -> bool:
    """Whether an answer is to be given: not where it is marked as context. A mark that says neither is told by who reads it."""
    try:
        return trained_of(item, True, "")
    except DataError:
        return True
