"""Record -> Sample: the chat template's own text, its answer tokens, its images."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from diffvl.data.images import open_image
from diffvl.data.markers import pieces_between
from diffvl.data.records import Record
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import ChatEncoding, DiffVLProcessor

TOO_LONG = "too long"  # kind of a record with more tokens than allowed, which `data.too_long: drop` forgives


@dataclass(frozen=True)
class Sample:
    """ids: the clean stream. answer: per token 0, k inside the k-th answer, or -k where that answer is not trained on: then it
    is context, which ends blocks as every earlier answer does. pixel_values: [N, 3, S, S] or None.
    index: the record's place in its dataset, which seeds its noise."""

    ids: list[int]
    answer: list[int]
    pixel_values: torch.Tensor | None
    index: int


def messages_of(record: Record) -> list[dict[str, Any]]:
    """Turns a record into chat messages; every `<image>` marker becomes an image part."""
    messages = []
    for turn in record.turns:
        pieces = pieces_between(turn.text) if turn.role == "user" else [turn.text]
        parts: list[dict[str, str]] = []
        for number, text in enumerate(pieces):
            if number:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts if len(pieces) > 1 else pieces[0]})
    return messages


def encode_record(record: Record, processor: DiffVLProcessor, longest: int | None = None) -> ChatEncoding:
    """Turns a record into token ids and answer marks.

    Raises:
        DataError: naming the record, if the chat template or the processor refuses it, or it has more than `longest` tokens.
    """
    _refuse_image_token(record, processor.image_token)
    try:
        encoding = processor.encode_chat(messages_of(record))
    except (TemplateError, ValueError) as error:
        message = f"{record.source}: record {record.id} does not fit the model's chat template: {error}"
        raise DataError(message, kind="does not fit the chat template") from error
    if longest is not None and len(encoding.ids) > longest:
        told = f"{record.source}: {len(encoding.ids)} tokens, images included, where at most {longest} are allowed"
        raise DataError(told, kind=TOO_LONG)
    return encoding


def _refuse_image_token(record: Record, token: str) -> None:
    """Raises DataError for a text in which the checkpoint would see an image: an escaped `<image>`, say, where its own token
    is spelled so."""
    for number, turn in enumerate(record.turns, 1):
        if any(token in piece for piece in (pieces_between(turn.text) if turn.role == "user" else [turn.text])):
            raise DataError(
                f"{record.source}: record {record.id}: turn {number}: the text {token} is what this checkpoint reads as an "
                "image, so it cannot stand there as text: spell it otherwise (< image >, say) or leave the record out",
                "image token in the text",
            )


def sample_of(record: Record, index: int, processor: DiffVLProcessor, longest: int | None = None) -> Sample:
    """Builds the whole sample, images decoded and resized. Raises DataError as `encode_record`, or for an image."""
    encoding = encode_record(record, processor, longest)
    pixel_values = None
    if record.images:
        images = [open_image(path, record.source) for path in record.images]
        pixel_values = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    return Sample(encoding.ids, _marked_untrained(encoding.answer, record), pixel_values, index)


def _marked_untrained(answer: list[int], record: Record) -> list[int]:
    """Gives the marks, negative in the answers that are not to be trained on."""
    trained = [turn.trained for turn in record.turns if turn.role == "assistant"]
    if all(trained):
        return answer
    return [mark if not mark or trained[mark - 1] else -mark for mark in answer]
