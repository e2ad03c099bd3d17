"""Records -> the questions in them, each as the conversation before a true answer, with its images."""

from collections.abc import Iterable, Iterator
from typing import Any

from diffvl.data.chat import messages_of
from diffvl.data.images import open_image
from diffvl.data.records import Record


def questions(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Gives (record, turn) of every answer to be trained on."""
    for record in records:
        for turn in answer_turns(record):
            yield record, turn


def answer_turns(record: Record) -> Iterator[int]:
    """Gives the turns of a record that are answers to be trained on; at least one. An answer that is not (a draft that a later
    turn corrects, say) is no truth to be asked for."""
    return (turn for turn, spoken in enumerate(record.turns) if spoken.role == "assistant" and spoken.trained)


def chat_before(record: Record, turn: int) -> list[dict[str, Any]]:
    """Gives the conversation up to (not including) a turn, with its images."""
    images = iter([open_image(path, record.source) for path in record.images])
    messages = messages_of(record)[:turn]
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = next(images)
    return messages
