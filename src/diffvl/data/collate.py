"""Rows of samples -> Batch: right padding, nothing random. Noise is drawn in the objective, so that a resume repeats it."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import torch

from diffvl.data.chat import Sample
from diffvl.errors import DataError, DiffvlError

IGNORED = -100


class Batch(TypedDict):
    """One line a sample; the objective packs them into rows. input_ids [S, L]. answer_index [S, L]: 0 outside answers, k
    inside the k-th, -k where that one is not trained on. valid [S, L]: False for padding. labels [S, L]: the ids of tokens of
    trained answers, -100 elsewhere; their number is the loss normaliser. sample [S]: dataset indices. row [S]: the row that
    each sample stands in, rising from 0. pixel_values [N, 3, side, side], absent in a batch without pictures."""

    input_ids: torch.Tensor
    answer_index: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    sample: torch.Tensor
    row: torch.Tensor
    pixel_values: NotRequired[torch.Tensor]


def collate(rows: Sequence[Sequence[Sample | DiffvlError]], pad_token_id: int) -> dict[str, Any]:
    """Pads and stacks. A record that failed in a loader process travels as its error, and is raised by `raise_bad_record`
    in the main process, where its message arrives unharmed."""
    good: list[Sample] = []
    places: list[int] = []
    for number, row in enumerate(rows):
        for sample in row:
            if isinstance(sample, DiffvlError):
                # The trainer counts labels before it looks at anything else.
                return {"bad_record": str(sample), "labels": torch.empty(0, dtype=torch.long)}
            good.append(sample)
            places.append(number)
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
        "labels": torch.where(answer > 0, ids, IGNORED),
        "sample": torch.tensor([sample.index for sample in good]),
        "row": torch.tensor(places),
    }
    pictures = [sample.pixel_values for sample in good if sample.pixel_values is not None]
    if pictures:
        batch["pixel_values"] = torch.cat(pictures)
    return batch


def raise_bad_record(batch: dict[str, Any]) -> None:
    """Raises the DataError that a loader process met while it built this batch."""
    if "bad_record" in batch:
        raise DataError(batch["bad_record"])
