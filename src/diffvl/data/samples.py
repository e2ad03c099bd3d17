"""Record -> Sample -> Batch: the chat template's own text, its answer tokens, its images; then rows of samples, padded.

Nothing here is random. Noise is drawn in the objective, so that a resume repeats it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from jinja2.exceptions import TemplateError

from diffvl.data.content import parts_of
from diffvl.data.images import UNREADABLE, image_size, open_image
from diffvl.data.problems import TOO_LONG, Problem
from diffvl.data.records import Record
from diffvl.data.videos import Video, open_video, video_size
from diffvl.errors import DataError
from diffvl.hub.chat_diffvl import arranged
from diffvl.hub.clips_diffvl import ClipSize, Sampler
from diffvl.hub.pixels_diffvl import Pixels, join_pixels
from diffvl.hub.processing_diffvl import ChatEncoding, DiffVLProcessor
from diffvl.hub.seen_diffvl import Size, size_of
from diffvl.hub.source_diffvl import ImageRefusedError
from diffvl.hub.template_diffvl import Visual


@dataclass(frozen=True)
class Sample:
    """ids: the clean stream. answer: per token 0, k inside the k-th answer, or -k where that answer is not trained on: then it
    is context, which ends blocks as every earlier answer does. pixels: what `processor.pixels` made of its images, or None.
    index: the record's place in its dataset, which seeds its noise. images, videos: how many it shows."""

    ids: list[int]
    answer: list[int]
    pixels: Pixels | None
    index: int
    images: int = 0
    videos: int = 0


def messages_of(record: Record) -> list[dict[str, Any]]:
    """Turns a record into chat messages; every marker becomes an image or video part."""
    messages = []
    for turn in record.turns:
        pieces = parts_of(turn.text, bool(record.videos)) if turn.role == "user" else [turn.text]
        parts = [{"type": one.value} if isinstance(one, Visual) else {"type": "text", "text": one} for one in pieces]
        shows = any(isinstance(one, Visual) for one in pieces)
        messages.append({"role": turn.role, "content": parts if shows else pieces[0]})
    return messages


def shown_by(record: Record) -> list[tuple[Visual, Video]]:
    """Gives a record's images and videos in the order in which its turns show them."""
    if not record.videos:
        return [(Visual.IMAGE, image) for image in record.images]
    rest = {Visual.IMAGE: iter(record.images), Visual.VIDEO: iter(record.videos)}
    texts = [turn.text for turn in record.turns if turn.role == "user"]
    shown = [one for text in texts for one in parts_of(text, videos=True) if isinstance(one, Visual)]
    return [(visual, next(rest[visual])) for visual in shown]


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


def encode_record(
    record: Record, processor: DiffVLProcessor, longest: int | None = None, sizes: "list[Size | ClipSize] | None" = None
) -> ChatEncoding:
    """Turns a record into token ids and answer marks; no image is decoded.

    Args:
        sizes: of its images and videos, where they are known already.
    Raises:
        DataError: naming the record, if the chat template or the processor refuses it, or it has more than `longest` tokens.
    """
    for token in filter(None, (processor.image_token, processor.video_token)):
        _refuse_image_token(record, token)
    if sizes is None and (processor.asks_sizes or record.videos):
        sizes = _sizes_of(record, processor)
    try:
        encoding = processor.encode_chat(messages_of(record), sizes=sizes)
    except ImageRefusedError as error:
        raise DataError(f"{record.source}: record {record.id}: {error}", UNREADABLE) from error
    except (TemplateError, ValueError) as error:
        message = f"{record.source}: record {record.id} does not fit the model's chat template: {error}"
        raise DataError(message, kind="does not fit the chat template") from error
    if longest is not None and len(encoding.ids) > longest:
        told = f"{record.source}: {len(encoding.ids)} tokens, images included, where at most {longest} are allowed"
        raise DataError(told, kind=TOO_LONG)
    return encoding


def _sizes_of(record: Record, processor: DiffVLProcessor) -> "list[Size | ClipSize]":
    """Gives the sizes of a record's images and videos. Raises DataError for one that cannot be read, or is not taken."""
    sampler = processor.sampler
    known = {
        path: video_size(path, record.source, sampler) if visual is Visual.VIDEO else image_size(path, record.source)  # type: ignore[arg-type]
        for visual, path in dict.fromkeys(shown_by(record))
    }
    return [known[path] for _, path in shown_by(record)]


def _refuse_image_token(record: Record, token: str) -> None:
    """Raises DataError for a text in which the checkpoint would see an image: an escaped `<image>`, say, where its own token
    is spelled so."""
    for number, turn in enumerate(record.turns, 1):
        pieces = parts_of(turn.text, bool(record.videos)) if turn.role == "user" else [turn.text]
        if any(token in piece for piece in pieces if isinstance(piece, str)):
            raise DataError(
                f"{record.source}: record {record.id}: turn {number}: the text {token} is what this checkpoint reads as an "
                "image, so it cannot stand there as text: spell it otherwise (< image >, say) or leave the record out",
                "image token in the text",
            )


def sample_of(record: Record, index: int, processor: DiffVLProcessor, longest: int | None = None) -> Sample:
    """Builds the whole sample, images decoded and resized. Raises DataError as `encode_record`, or for an image."""
    sizes = _sizes_of(record, processor) if processor.asks_sizes or record.videos else None
    encoding = encode_record(record, processor, longest, sizes)
    answer = _marked_untrained(encoding.answer, record)
    shown = shown_by(record)
    if not shown:
        return Sample(encoding.ids, answer, None, index)
    opened = [_opened(*one, record, processor, size) for one, size in zip(shown, sizes or [None] * len(shown), strict=True)]
    if sizes is not None:
        opened = arranged(encoding.shown, opened)
    return Sample(encoding.ids, answer, processor.pixels(opened, encoding.alone), index, len(record.images), len(record.videos))


def _opened(visual: Visual, path: Video, record: Record, processor: DiffVLProcessor, size: "Size | ClipSize | None") -> Any:
    """Decodes an image or a video. Raises DataError if it cannot be, or is not of the size that its head tells."""
    if visual is Visual.VIDEO:
        assert isinstance(size, ClipSize)
        return open_video(path, record.source, processor.sampler, size)
    assert isinstance(path, str)  # not `str(path)`: in a stream it carries its bytes
    image = open_image(path, record.source)
    if size is not None and size != size_of(image):
        raise DataError(f"{record.source}: an image has other sizes in its head and in its pixels: save it anew", UNREADABLE)
    return image


def _marked_untrained(answer: list[int], record: Record) -> list[int]:
    """Gives the marks, negative in the answers that are not to be trained on."""
    trained = [turn.trained for turn in record.turns if turn.role == "assistant"]
    if all(trained):
        return answer
    return [mark if not mark or trained[mark - 1] else -mark for mark in answer]


IGNORED = -100
PROBLEMS = "problems"  # key of the Problems of samples that could not be built, in the main process's hands
NO_SAMPLE = -1  # index of the sample that fills a batch without any


class Batch(TypedDict):
    """One line a sample; the objective packs them into rows. input_ids [S, L]. answer_index [S, L]: 0 outside answers, k
    inside the k-th, -k where that one is not trained on. valid [S, L]: False for padding. labels [S, L]: the ids of tokens of
    trained answers, -100 elsewhere; their number is the loss normaliser. sample [S]: dataset indices. row [S]: the row that
    each sample stands in, rising from 0. pixels: the tensors of all images in order, under the names
    that the model takes them by; absent in a batch without images. images, videos [S]: how many of them each sample shows, in a
    batch with some."""

    input_ids: torch.Tensor
    answer_index: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    sample: torch.Tensor
    row: torch.Tensor
    pixels: NotRequired[Pixels]
    images: NotRequired[torch.Tensor]
    videos: NotRequired[torch.Tensor]


def collate(rows: Sequence[Sequence[Sample | Problem]], pad_token_id: int) -> dict[str, Any]:
    """Pads and stacks. A sample that could not be built leaves its place empty and its Problem under `PROBLEMS`.

    A batch of which nothing is left holds one short text in their place, sample `NO_SAMPLE`, without labels: with data
    parallelism every process must go through the model as often as the others. See `is_filler`.
    """
    problems = [sample for row in rows for sample in row if isinstance(sample, Problem)]
    kept = [[sample for sample in row if isinstance(sample, Sample)] for row in rows]
    kept = [row for row in kept if row]  # rows are counted without gaps
    good = [sample for row in kept for sample in row] or [Sample([pad_token_id] * 2, [0, 1], None, NO_SAMPLE)]
    places = [number for number, row in enumerate(kept) for _ in row] or [0]
    longest = max(len(sample.ids) for sample in good)
    ids = torch.full((len(good), longest), pad_token_id, dtype=torch.long)
    answer = torch.zeros_like(ids)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for line, sample in enumerate(good):
        length = len(sample.ids)
        ids[line, :length] = torch.tensor(sample.ids)
        answer[line, :length] = torch.tensor(sample.answer)
        valid[line, :length] = True
    batch: dict[str, Any] = {
        "input_ids": ids,
        "answer_index": answer,
        "valid": valid,
        "labels": torch.where(answer > 0, ids, IGNORED) if kept else torch.full_like(ids, IGNORED),
        "sample": torch.tensor([sample.index for sample in good]),
        "row": torch.tensor(places),
    }
    pixels = join_pixels([sample.pixels for sample in good if sample.pixels is not None])
    if pixels:
        batch["pixels"] = pixels
        batch["images"] = torch.tensor([sample.images for sample in good])
        if any(sample.videos for sample in good):
            batch["videos"] = torch.tensor([sample.videos for sample in good])
    if problems:
        batch[PROBLEMS] = problems
    return batch


def on_device(batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False) -> dict[str, Any]:
    """Gives the batch with all tensors on a device."""
    return {
        name: on_device(value, device, non_blocking) if isinstance(value, dict) else value.to(device, non_blocking=non_blocking)
        for name, value in batch.items()
    }


def is_filler(batch: dict[str, Any]) -> bool:
    """Tells whether nothing is left of a batch: it goes through the model and teaches nothing."""
    return bool(batch["sample"][0] == NO_SAMPLE)
