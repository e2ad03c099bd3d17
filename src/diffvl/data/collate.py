"""Rows of samples -> Batch: right padding, nothing random. Noise is drawn in the objective, so that a resume repeats it."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

import torch

from diffvl.data.chat import Sample
from diffvl.data.problems import Problem

IGNORED = -100
PROBLEMS = "problems"  # key of the Problems of samples that could not be built, in the main process's hands
NO_SAMPLE = -1  # index of the sample that fills a batch without any


class Batch(TypedDict):
    """One line a sample; the objective packs them into rows. input_ids [S, L]. answer_index [S, L]: 0 outside answers, k
    inside the k-th, -k where that one is not trained on. valid [S, L]: False for padding. labels [S, L]: the ids of tokens of
    trained answers, -100 elsewhere; their number is the loss normaliser. sample [S]: dataset indices. row [S]: the row that
    each sample stands in, rising from 0. pixel_values [N, 3, side, side], absent in a batch without images."""

    input_ids: torch.Tensor
    answer_index: torch.Tensor
    valid: torch.Tensor
    labels: torch.Tensor
    sample: torch.Tensor
    row: torch.Tensor
    pixel_values: NotRequired[torch.Tensor]


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
    images = [sample.pixel_values for sample in good if sample.pixel_values is not None]
    if images:
        batch["pixel_values"] = torch.cat(images)
    if problems:
        batch[PROBLEMS] = problems
    return batch


def is_filler(batch: dict[str, Any]) -> bool:
    """Tells whether nothing is left of a batch: it goes through the model and teaches nothing."""
    return bool(batch["sample"][0] == NO_SAMPLE)
