"""Numeric proofs on a loaded trunk: AR parity, and that masks and positions really steer its attention.

`prepare` proves the model that it has written; `doctor` asks the same of a tiny copy, and more (`doctor.checks`). Measured on
short random conversations, clean and noisy, in training's own form (layout, masks and positions of `diffvl.hub`).

Shapes: B conversations, L clean length, R noisy length, T = L + R, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from diffvl.errors import UnsupportedModelError
from diffvl.hub.layout_diffvl import Layout, NoisyStream, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.hub.masks_diffvl import attention_masks, masks_for

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
    masks_at: str = "forward"

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
        return forward(self.trunk, self.ids if ids is None else ids, self.layout, self.masks_at).logits.float()

    def noisy_blocks(self, row: int = 0) -> list[int]:
        """Lists the noisy blocks of one conversation."""
        return self.layout.block[row, self.clean_length :][self.stream.valid[row]].unique().tolist()

    def is_clean(self) -> torch.Tensor:
        """Marks the clean stream, bool [T]."""
        return torch.arange(self.ids.shape[1]) < self.clean_length


def forward(trunk: PreTrainedModel, ids: torch.Tensor, layout: Layout, masks_at: str = "forward") -> Any:
    """Runs one pass as training does it: explicit masks and positions, no cache."""
    masks = attention_masks(text_config(trunk), layout, slice(None), torch.float32)
    with masks_for(trunk, masks, masks_at) as given:
        return trunk(input_ids=ids, attention_mask=given, position_ids=layout.position, use_cache=False)


def text_config(trunk: PreTrainedModel) -> Any:
    """Gives the configuration of the language half."""
    return trunk.config.get_text_config(decoder=True)


# Errors of families that pass lie below 1e-5 of the logits' spread, errors of those that fail above 0.5.
TOLERANCE = 1e-3
SHORT = ((14, 7),)  # one conversation with two noisy blocks, the second of which is filled up: for models of full size


@torch.no_grad()
def native_logits(trunk: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Runs the stock model by itself, without masks and positions: [B, L, V] in fp32."""
    return trunk(input_ids=ids, use_cache=False).logits.float()


def largest(errors: Iterable[float], default: float = 0.0) -> float:
    """Gives the largest error, nan where any is nan: Python's own max loses a nan that does not stand first."""
    errors = list(errors)
    return next((error for error in errors if math.isnan(error)), max(errors, default=default))


def smallest(changes: Iterable[float]) -> float:
    """Gives the smallest change, nan where any is nan."""
    return -largest(-change for change in changes)


def spread(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Measures the largest difference in units of the reference's standard deviation; nan, which passes no `not error <= limit`,
    where a logit is no finite number."""
    return float(difference.abs().max() / reference.std().clamp_min(1e-12))


# --- what must hold --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ar_error(trunk: PreTrainedModel, ids: torch.Tensor, masks_at: str = "forward") -> float:
    """Compares an explicit causal mask with positions with the stock forward, which makes its own."""
    layout = clean_layout(torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool), "causal")
    reference = native_logits(trunk, ids)
    return spread(forward(trunk, ids, layout, masks_at).logits.float() - reference, reference)


@torch.no_grad()
def clean_error(probe: ProbeText) -> float:
    """Compares the clean stream that has the noisy one after it with the clean stream alone."""
    rows = {name: row[:, : probe.clean_length] for name, row in probe.layout.rows.items()}
    layout = probe.layout.with_rows(rows)
    alone = forward(probe.trunk, probe.ids[:, : probe.clean_length], layout, probe.masks_at).logits.float()
    valid = rows["valid"]
    return spread(probe.logits()[:, : probe.clean_length][valid] - alone[valid], alone[valid])


def leak(probe: ProbeText) -> float:
    """Measures how far the noisy logits of a block move when its own clean tokens and all later ones change; the largest."""
    before, clean, worst = probe.logits(), probe.is_clean(), 0.0
    first, count = probe.tokens.start, len(probe.tokens)
    for block in probe.noisy_blocks():
        later = clean & (probe.layout.block >= block)
        moved = probe.logits(torch.where(later, (probe.ids + 1 - first) % count + first, probe.ids)) - before
        own = (probe.layout.block == block) & probe.layout.noisy.bool() & probe.layout.valid
        worst = largest([worst, spread(moved[own], before)])
    return worst


def both_ways(probe: ProbeText) -> float:
    """Measures how far the first token of a noisy block moves with the last one; the largest of the blocks."""
    before, moves, first = probe.logits(), [], probe.tokens.start
    for block in probe.noisy_blocks():
        own = (probe.layout.block[0] == block) & probe.layout.noisy[0].bool() & probe.layout.valid[0]
        places = own.nonzero()[:, 0]
        other = probe.ids.clone()
        other[0, places[-1]] = first + (other[0, places[-1]] == first)
        if len(places) > 1:
            moves.append(spread((probe.logits(other) - before)[0, places[0]], before))
    return largest(moves)


def check_block_attention(trunk: PreTrainedModel, vocabulary: int, mask_token_id: int, masks_at: str = "forward") -> float:
    """Compares what the trunk does with clean tokens and noisy blocks with what block diffusion demands.

    Args:
        vocabulary: tokens that may stand in a text. masks_at: see `DiffVLConfig`.
    Returns:
        the largest error, in standard deviations of the logits.
    Raises:
        UnsupportedModelError: if the clean stream differs from the AR model, a noisy block sees its clean copy or later
            tokens, its tokens do not see each other, or any logit is no finite number.
    """
    kind, tokens = trunk.config.model_type, range(vocabulary)
    probe = replace(ProbeText.make(trunk, "causal", tokens, mask_token_id, SHORT), masks_at=masks_at)
    clean = largest([ar_error(trunk, conversations(tokens, SHORT)[0], masks_at), clean_error(probe)])
    if not clean <= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: with explicit masks the logits differ from its own by {clean:.2g} std")
    leaked = leak(probe)
    if not leaked <= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: a noisy block sees its own clean copy (its logits move by {leaked:.2g} std)")
    if not both_ways(probe) >= TOLERANCE:
        raise UnsupportedModelError(f"{kind}: tokens of a noisy block do not see each other: the model ignores the mask")
    return largest([clean, leaked])
