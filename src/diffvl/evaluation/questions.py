"""Records -> what is asked of a checkpoint: the conversation before each answer that is to be trained on."""

from collections.abc import Iterable, Iterator
from typing import Any

from diffvl.data.content import parts_of
from diffvl.data.images import open_image
from diffvl.data.records import Record
from diffvl.data.samples import messages_of, shown_by
from diffvl.data.videos import open_video
from diffvl.hub.clips_diffvl import Sampler
from diffvl.hub.template_diffvl import Visual, texts_of


def questions(records: Iterable[Record]) -> Iterator[tuple[Record, int]]:
    """Gives (record, turn) of every answer to be trained on."""
    for record in records:
        for turn in answer_turns(record):
            yield record, turn


def answer_turns(record: Record) -> Iterator[int]:
    """Gives the turns of a record that are answers to be trained on; at least one. An answer that is not (a draft that a later
    turn corrects, say) is no truth to be asked for."""
    return (turn for turn, spoken in enumerate(record.turns) if spoken.role == "assistant" and spoken.trained)


def chat_before(record: Record, turn: int, sampler: Sampler | None = None) -> list[dict[str, Any]]:
    """Gives the conversation up to (not including) a turn, with its images, and its videos where the checkpoint has a
    `sampler` for them."""
    shown = iter(shown_by(record))
    messages = messages_of(record)[:turn]
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] != "text":
                    visual, path = next(shown)
                    is_video = visual is Visual.VIDEO
                    part[visual.value] = (
                        open_video(path, record.source, sampler) if is_video else open_image(str(path), record.source)
                    )
    return messages


def asked(record: Record, turn: int) -> str:
    """Gives the text of the question that a turn answers."""
    return "".join(texts_of(tuple(parts_of(record.turns[turn - 1].text, bool(record.videos))))).strip()
