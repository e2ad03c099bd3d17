"""One block of a batch whose samples choose their tokens in different ways.

The rules are those of `hub.answers_diffvl`; each is asked about the rows of those who decode by it, so that the answer of a
sample is the one that `generate` gives it alone. The forwards are shared: a step predicts the masked tokens of all.

Shapes: B batch, D block size, M masked tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from diffvl.hub.answers_diffvl import Picker, quota, settled
from diffvl.hub.blocks_diffvl import Places
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.settings_diffvl import DecodeSettings


@dataclass(frozen=True)
class Group:
    """Samples that choose alike: their settings, what makes tokens of logits, and their rows, rising."""

    settings: DecodeSettings
    pick: Picker
    rows: list[int]

    @property
    def steps(self) -> int:
        assert self.settings.denoising_steps is not None
        return self.settings.denoising_steps


@dataclass(frozen=True)
class Step:
    """What one sample's watcher sees after a denoising step, each [D]: ids with mask tokens where nothing has settled, which
    tokens are predicted in this block, which settled just now, and the confidence of what was predicted in this step."""

    ids: list[int]
    is_new: list[bool]
    settled: list[bool]
    confidence: list[float]


Watchers = Mapping[int, Callable[[Step], None]]  # by row


def denoise(decoder: BlockDecoder, groups: Sequence[Group], watchers: Watchers) -> torch.Tensor:
    """Fills the open block of every sample in at most as many forwards as the slowest group asks for; returns its ids [B, D]."""
    masked, left = decoder.block.open_BD, list(decoder.block.counts)
    count_B = masked.sum(1)
    for step in range(max(group.steps for group in groups)):
        if not any(left):
            break
        places = Places.true_in(masked, sum(left))
        predicted = _Predicted(decoder.predict(places), places.flat(masked.shape[1]), decoder.block.ids_BD)
        chosen = torch.zeros_like(masked)
        for group in groups:
            if any(left[row] for row in group.rows):
                alone = len(groups) == 1
                predicted.pick(group, None if alone else _tokens_of(group.rows, left))
                rows = slice(None) if alone else torch.tensor(group.rows, device=masked.device)
                quota_B = torch.minimum(quota(count_B[rows], step, group.steps), masked[rows].sum(1))
                of_group = (masked[rows], predicted.confidence[rows], predicted.entropy[rows])
                chosen[rows] = settled(group.settings, quota_B, *of_group)
        decoder.block = replace(decoder.block, ids_BD=torch.where(chosen, predicted.ids, decoder.block.ids_BD))
        masked = masked & ~chosen
        left = _left(groups, decoder.block.counts, left, step) if _are_fixed(groups) else masked.sum(1).tolist()
        _show(watchers, decoder, chosen, predicted.confidence)
    return decoder.block.ids_BD


class _Predicted:
    """What a step predicts, each [B, D]: ids, confidence, and entropy where it is asked for; zeros elsewhere.

    Args:
        logits: [M, V] of the masked tokens; flat: [M], their places in the flattened block. ids_BD: the block as it stands.
    """

    def __init__(self, logits: torch.Tensor, flat: torch.Tensor, ids_BD: torch.Tensor) -> None:
        self._logits, self._flat = logits, flat
        self.ids = ids_BD.clone()
        self.confidence = torch.zeros(ids_BD.shape, device=ids_BD.device)
        self.entropy = torch.zeros_like(self.confidence)

    def pick(self, group: Group, tokens: list[int] | None) -> None:
        """Notes what a group makes of the logits of its tokens; None for all."""
        index = slice(None) if tokens is None else torch.tensor(tokens, device=self._flat.device)
        prediction, flat = group.pick(self._logits[index]), self._flat[index]
        self.ids.view(-1).index_copy_(0, flat, prediction.ids)
        self.confidence.view(-1).index_copy_(0, flat, prediction.confidence)
        if prediction.entropy is not None:
            self.entropy.view(-1).index_copy_(0, flat, prediction.entropy)


def _tokens_of(rows: Sequence[int], left: Sequence[int]) -> list[int]:
    """Which of the masked tokens, counted in row-major order, are those of some rows."""
    ends = list(accumulate(left))
    return [token for row in rows for token in range(ends[row] - left[row], ends[row])]


def _are_fixed(groups: Sequence[Group]) -> bool:
    """Whether nobody has to look how many tokens a step settled."""
    return all(group.settings.has_fixed_quota for group in groups)


def _left(groups: Sequence[Group], counts: Sequence[int], left: Sequence[int], step: int) -> list[int]:
    """Masked tokens of each sample after a step in which everybody settled the quota."""
    after = list(left)
    for group in groups:
        for row in group.rows:
            after[row] -= min(quota(counts[row], step, group.steps), left[row])
    return after


def _show(watchers: Watchers, decoder: BlockDecoder, chosen: torch.Tensor, confidence: torch.Tensor) -> None:
    if not watchers:
        return
    block = decoder.block
    ids, is_new, settled_now, sure = (one.tolist() for one in (block.ids_BD, block.open_BD, chosen, confidence))
    for row, watch in watchers.items():
        if any(settled_now[row]):
            watch(Step(ids[row], is_new[row], settled_now[row], sure[row]))
