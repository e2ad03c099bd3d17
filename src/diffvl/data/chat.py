"""Record -> Sample: the chat template's own text, its answer tokens, its pictures."""

from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError

from diffvl.data.images import open_picture
from diffvl.data.records import Record
from diffvl.errors import DataError
from diffvl.hub.processing_diffvl import ChatEncoding, DiffVLProcessor

IMAGE_MARKER = "<image>"
TOO_LONG = "too long"  # kind of a record with more tokens than allowed, which `data.too_long: drop` forgives


@dataclass(frozen=True)
class Sample:
    """ids: the clean stream. answer: per token 0, or k inside the k-th answer. pixel_values: [N, 3, S, S] or None.
    index: the record's place in its dataset, which seeds its noise."""

    ids: list[int]
    answer: list[int]
    pixel_values: torch.Tensor | None
    index: int


def messages_of(record: Record) -> list[dict[str, Any]]:
    """The record as chat messages; every `<image>` marker becomes a picture part."""
    messages = []
    for turn in record.turns:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(turn.text.split(IMAGE_MARKER)):
            if number:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": parts if IMAGE_MARKER in turn.text else turn.text})
    return messages


def encode_record(record: Record, processor: DiffVLProcessor, longest: int | None = None) -> ChatEncoding:
    """Token ids and answer marks of a record.

    Raises:
        DataError: naming the record, if the chat template or the processor refuses it, or it has more than `longest` tokens.
    """
    try:
        encoding = processor.encode_chat(messages_of(record))
    except (TemplateError, ValueError) as error:
        message = f"{record.source}: record {record.id} does not fit the model's chat template: {error}"
        raise DataError(message, kind="does not fit the chat template") from error
    if longest is not None and len(encoding.ids) > longest:
        told = f"{record.source}: {len(encoding.ids)} tokens, pictures included, where at most {longest} are allowed"
        raise DataError(told, kind=TOO_LONG)
    return encoding


def sample_of(record: Record, index: int, processor: DiffVLProcessor, longest: int | None = None) -> Sample:
    """The whole sample, pictures decoded and resized. Raises DataError as `encode_record`, or for a picture."""
    encoding = encode_record(record, processor, longest)
    pixel_values = None
    if record.images:
        pictures = [open_picture(path, record.source) for path in record.images]
        pixel_values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return Sample(encoding.ids, encoding.answer, pixel_values, index)
