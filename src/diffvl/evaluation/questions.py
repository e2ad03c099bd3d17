"""Records -> what is asked of a checkpoint: the conversation before each answer that is to be trained on."""

from collections.abc import Iterable, Iterator

from diffvl.data.content import parts_of
from diffvl.data.records import Record
from diffvl.hub.template_diffvl import texts_of


def questions(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Gives (record, turn) of every answer to be trained on."""
    for record in records:
        for turn in answer_turns(record):
            yield record, turn


def answer_turns(record: Record) -> Iterator[int]:
    """Gives the turns of a record that are answers to be trained on; at least one. An answer that is not (a draft that a later
    turn corrects, say) is no truth to be asked for."""
    return (turn for turn, spoken in enumerate(record.turns) if spoken.role == "assistant" and spoken.trained)


def asked(record: Record, turn: int) -> str:
    """Gives the text of the question that a turn answers."""
    return "".join(texts_of(tuple(parts_of(record.turns[turn - 1].text, bool(record.videos))))).strip()
