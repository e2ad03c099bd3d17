"""The text on which a trunk's attention is measured: short random conversations, clean and noisy, in training's own form (layout,
masks and positions of `diffvl.hub`).

Shapes: B conversations, L clean length, R noisy length, T = L + R, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from diffvl.hub.layout_diffvl import (
    Layout,
    NoisyStream,
    attention_masks,
    block_index,
    clean_layout,
    noisy_layout,
    noisy_stream,
)

BLOCK_SIZE = 4
GRIDS = {"block": "absolute", "causal": "response"}  # of each context, so that two runs have both contexts and both grids
# Lengths of prompt, answer, prompt, answer, cut inside blocks; the second conversation is padded.
LENGTHS = ((9, 7, 6, 9), (6, 5))


def conversations(tokens: range, lengths: Sequence[Sequence[int]] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws conversations out of these tokens, the same in every call: ids, answer index and valid, each [B, L]."""
    longest = max(map(sum, lengths))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(tokens.start, tokens.stop, (len(lengths), longest), generator=generator)
    answer = torch.zeros_like(ids)
    for number, turns in enumerate(lengths):
        marks = [(turn + 1) // 2 if turn % 2 else 0 for turn in range(len(turns))]
        answer[number, : sum(turns)] = torch.tensor(marks).repeat_interleave(torch.tensor(turns))
    valid = torch.arange(longest)[None] < torch.tensor([[sum(turns)] for turns in lengths])
    return ids, answer, valid


@dataclass(frozen=True)
class ProbeText:
    """Both streams of the conversations, every second answer token masked. ids [B, T] belong to `layout`; their first
    `clean_length` columns are the clean stream. tokens: those that the conversations are made of."""

    trunk: PreTrainedModel
    layout: Layout
    stream: NoisyStream
    ids: torch.Tensor
    clean_length: int
    tokens: range

    @classmethod
    def make(
        cls, trunk: PreTrainedModel, context: str, tokens: range, mask_token_id: int, lengths: Sequence[Sequence[int]] = LENGTHS
    ) -> "ProbeText":
        """Lays the conversations out for a context, "block" or "causal"."""
        ids, answer, valid = conversations(tokens, lengths)
        block = block_index(answer, BLOCK_SIZE, GRIDS[context])
        stream = noisy_stream(answer, block, BLOCK_SIZE, GRIDS[context])
        masked = stream.eligible & (torch.arange(stream.eligible.shape[1]) % 2 == 0)
        noisy = ids.gather(1, stream.source).masked_fill(masked, mask_token_id)
        layout = clean_layout(block, valid, context).joined(noisy_layout(stream, context))
        return cls(trunk, layout, stream, torch.cat([ids, noisy], 1), ids.shape[1], tokens)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the trunk: [B, T, V] in fp32, of other tokens on the same layout where `ids` are given."""
        return forward(self.trunk, self.ids if ids is None else ids, self.layout).logits.float()

    def noisy_blocks(self, row: int = 0) -> list[int]:
        """Lists the noisy blocks of one conversation."""
        return self.layout.block[row, self.clean_length :][self.stream.valid[row]].unique().tolist()

    def is_clean(self) -> torch.Tensor:
        """Marks the clean stream, bool [T]."""
        return torch.arange(self.ids.shape[1]) < self.clean_length


def forward(trunk: PreTrainedModel, ids: torch.Tensor, layout: Layout, **more: Any) -> Any:
    """Runs one pass as training does it: explicit masks and positions, no cache."""
    masks = attention_masks(text_config(trunk), layout, slice(None), torch.float32)
    return trunk(input_ids=ids, attention_mask=masks, position_ids=layout.position, use_cache=False, **more)


def text_config(trunk: PreTrainedModel) -> Any:
    """Gives the configuration of the language half."""
    return trunk.config.get_text_config(decoder=True)
