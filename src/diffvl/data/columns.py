"""A row as its file gives it -> the object that a record is parsed from: columns under the keys that they stand for
(`data.columns`), and turns in the forms that tables have them in.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from diffvl.data.keys import is_absent
from diffvl.errors import DataError, first_few

TURNS = ("conversations", "messages")
MISSING = "column missing"
_NUM_TOLD = 20  # columns of a table


class ColumnNames:
    """`data.columns` of one source: key of a record -> column. Without it all columns are read under their own names."""

    def __init__(self, columns: Mapping[Any, str] | None) -> None:
        self.columns = columns
        self._unseen = set((columns or {}).values())

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Gives the object that a record is parsed from. Raises DataError for turns that cannot be read."""
        if self.columns is not None:
            if self._unseen:
                self._unseen.difference_update(row)
            row = {key: row[column] for key, column in self.columns.items() if column in row}
            row = _as_turns(row) if "answer" in row else row
        for key in TURNS:
            turns = row.get(key)
            if isinstance(turns, str) or (
                isinstance(turns, list) and turns and isinstance(turns[0], dict) and "assistant" in turns[0]
            ):
                row = {**row, key: _turns_of(turns, key)}
        return row

    def require_all(self, columns: Iterable[str], file: str) -> None:
        """Raises DataError unless a table has the columns that are to be read, and turns among them."""
        there = list(columns)
        listed = ", ".join(first_few([f"`{column}`" for column in there], _NUM_TOLD)) or "none"
        for key, column in (self.columns or {}).items():
            if column not in there:
                raise DataError(
                    f"{file}: no column `{column}`, which data.columns names as {key}; its columns are {listed}",
                    MISSING,
                    ends=True,
                )
        if self.columns is None and not any(key in there for key in TURNS):
            raise DataError(
                f"{file}: no column `conversations` or `messages`; its columns are {listed}. Name those that records are read "
                "from: data.columns={conversations: COLUMN, image: COLUMN}",
                MISSING,
                ends=True,
            )

    def require_seen(self, file: str) -> None:
        """Raises DataError for a column that no row has had: a setting without effect."""
        if self._unseen:
            column = sorted(self._unseen)[0]
            raise DataError(f"{file}: no row has `{column}`, which data.columns names", MISSING)


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Makes turns of a question and its answer; without a question the image alone is asked about."""
    question = row.pop("question", None)
    asked = "" if question is None else question
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row.pop("answer")}]
    return {**row, "messages": turns}


def _turns_of(turns: Any, key: str) -> Any:
    """Gives turns as a list of one object each: from a JSON text, and from pairs, {"user": ..., "assistant": ...}."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{key}` is a text that begins as JSON and is none ({error})", "no turns") from error
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "assistant" in turn for turn in turns):
        return turns
    spoken: list[Any] = []
    roles = ("role", "content") if key == "messages" else ("from", "value")
    speakers = ("user", "assistant") if key == "messages" else ("human", "gpt")
    for turn in turns:
        if not isinstance(turn, dict) or any(is_absent(turn.get(name)) for name in ("user", "assistant")):
            return turns  # not of this form: it is told as what it is
        spoken += [
            {roles[0]: speaker, roles[1]: turn[name]} for speaker, name in zip(speakers, ("user", "assistant"), strict=True)
        ]
    return spoken
