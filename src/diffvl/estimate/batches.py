"""Micro-batches to plan by: the first ones that training would see, the longest that it may see, and, where no data is here, one
that is made up.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

import torch

from diffvl.config.recipe import Stage
from diffvl.data.loader import StageData
from diffvl.data.samples import PROBLEMS, Sample, collate, is_filler
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.objective.losses import Draw, loss_of
from diffvl.train.feed import feed_of

LOOKED_AT = 64  # rows that a plan looks at
QUESTION = 48  # tokens beside image and answer of a sample that is made up


@dataclass(frozen=True)
class Tokens:
    """Positions of some micro-batches: clean text, image tokens, noisy copies, padding; and how many of them are predicted."""

    clean: float
    image: float
    noisy: float
    padding: float
    predicted: float

    @property
    def total(self) -> float:
        return self.clean + self.image + self.noisy + self.padding

    def times(self, factor: float) -> "Tokens":
        return Tokens(*(value * factor for value in vars(self).values()))


def first_batches(
    data: StageData, stage: Stage, seed: int, collator: Callable[..., dict[str, Any]], processes: int
) -> list[dict[str, Any]]:
    """Gives the micro-batches of the first steps, in one process, until enough rows have been seen. Records that cannot be used
    are left out, as in training."""
    alone = stage.model_copy(update={"data": stage.data.model_copy(update={"workers": 0})})
    feed = feed_of(data.train, alone, seed, collator, processes, 0)
    wanted = -(-LOOKED_AT // stage.batch_size)
    batches: Iterator[dict[str, Any]] = feed.batches(0, -(-wanted // stage.accumulation))
    seen = list(islice(batches, wanted))
    for batch in seen:
        batch.pop(PROBLEMS, None)
    return [batch for batch in seen if not is_filler(batch)]


def count_tokens(model: DiffVLForConditionalGeneration, stage: Stage, batch: dict[str, Any]) -> Tokens:
    """Counts the positions of a micro-batch by laying it out as training does, in front of a model that does nothing."""
    found: list[Tokens] = []

    def layout_of(input_ids: torch.Tensor, image_index: torch.Tensor, logits_rows: Any = (), **_: Any) -> Any:
        found.append(Tokens(0, int((image_index >= 0).sum()), 0, input_ids.numel(), len(logits_rows)))
        return SimpleNamespace(logits=torch.zeros(len(logits_rows), 2), hidden_states=(None,), past_key_values=None)

    looks: Any = type("Layouts", (), {"images": model.images, "__call__": staticmethod(layout_of)})()
    with torch.no_grad():
        used = loss_of(looks, model.config, batch, stage.objective, Draw(0, 0, 1.0)).tokens  # type: ignore[arg-type]
    # Drafts may take two forwards, of clean tokens and of masks.
    clean, image, all_places = int(batch["valid"].sum()), int(found[0].image), int(sum(one.padding for one in found))
    return Tokens(clean - image, image, used - clean, all_places - used, found[-1].predicted)


def longest(batches: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """Gives the longest micro-batch that training may see: that with most tokens, each of its samples made longer, with answers
    in the share that it has, up to `max_length`; packed rows up to `row_length`. Images stay as they are."""
    batch = max(batches, key=lambda one: int(one["valid"].sum()))
    limit = stage.data.max_length
    if stage.data.row_length is not None:  # its rows are nearly full: the last sample of each is made longer
        lengths = batch["valid"].sum(1)
        used = torch.zeros(int(batch["row"].max()) + 1, dtype=torch.long).index_add_(0, batch["row"], lengths)
        last = {int(row): number for number, row in enumerate(batch["row"])}
        targets = lengths.clone()
        for row, number in last.items():
            targets[number] += stage.data.row_length - used[row]
    else:
        targets = torch.full((len(batch["valid"]),), limit)
    return _stretched(batch, targets)


def _stretched(batch: dict[str, Any], targets: torch.Tensor) -> dict[str, Any]:
    """Gives the batch with samples of these lengths: an answer and the next question go on after their last one."""
    filler = int(batch["input_ids"][0, int(batch["valid"][0].sum()) - 1])
    share = float((batch["answer_index"] > 0).sum() / batch["valid"].sum())
    lines = []
    for number, target in enumerate(targets.tolist()):
        length = int(batch["valid"][number].sum())
        ids, answer = batch["input_ids"][number, :length].tolist(), batch["answer_index"][number, :length].tolist()
        more = max(target - length, 0)
        answers = round(more * share)
        next_one = max((abs(mark) for mark in answer), default=0) + 1
        ids += [filler] * more
        answer += [0] * (more - answers) + [next_one] * answers
        lines.append(([Sample(ids, answer, None, int(batch["sample"][number]))], int(batch["row"][number])))
    longer = collate([line for line, _ in lines], pad_token_id=filler)
    longer["row"] = torch.tensor([row for _, row in lines])
    return {**batch, **longer}


def made_up(config: DiffVLConfig, stage: Stage) -> list[dict[str, Any]]:
    """Makes a micro-batch for a stage of which no data is here: samples of `max_length` with one image, in as many tokens as it
    may have there; the rest is half answer."""
    tiling = config.tiles
    side, length = config.image_size, stage.data.max_length
    if tiling is None:
        pixels, tokens = {"pixel_values": torch.zeros(1, 3, side, side)}, config.image_tokens
    else:
        sizes = [(rows * tiling.pixels, columns * tiling.pixels) for rows, columns in tiling.grids]
        room = length - QUESTION  # the largest image of those that a sample has room for
        size = max([size for size in sizes if tiling.tokens(size) <= room] or sizes[:1], key=tiling.tokens)
        shown = torch.zeros(1, tiling.views(size), 3, side, side)
        pixels, tokens = {"pixel_values": shown, "image_sizes": torch.tensor([size])}, tiling.tokens(size)
    if tokens + QUESTION > length:
        pixels, tokens = None, 0
    answers = (length - tokens - QUESTION) // 2
    ids = [config.image_token_id] * tokens + [0] * (length - tokens)
    marks = [0] * (length - answers) + [1] * answers
    rows = [[Sample(ids, marks, pixels, number, int(tokens > 0))] for number in range(stage.batch_size)]
    return [collate(rows, pad_token_id=0)]
