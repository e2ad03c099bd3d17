"""What the objectives share: the streams of a batch as a trunk takes them, and what an objective gives.

Shapes: S samples, L clean length, W tokens of a sample's streams; V vocabulary, M predicted tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from diffvl.attention.block_mask import FLEX, bucket
from diffvl.data.samples import Batch
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.images_diffvl import Shown, is_visual, placed_images
from diffvl.hub.layout_diffvl import Layout, Rope
from diffvl.hub.spans_diffvl import answer_cells, span_ids
from diffvl.objective.packing import Packed, pack


@dataclass(frozen=True)
class Draw:
    """Where in a run the noise is drawn: its generators are seeded by (seed, step, sample); progress moves curricula."""

    seed: int
    step: int
    progress: float


@dataclass(frozen=True)
class LossOutput:
    """loss: summed over tokens, with its graph; divide by the normaliser of the whole optimiser step.

    sums: counts and sums without a graph, over answer tokens and their first stop only (padding stops left out):
    `predicted`, `correct`, `cross_entropy`, and under block diffusion `eligible`; of drafts see `drafts.draft`.
    tokens: positions that went through the trunk.
    """

    loss: torch.Tensor
    tokens: int
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


def token_cross_entropy(logits_MV: torch.Tensor, targets_M: torch.Tensor, forbidden_V: torch.Tensor) -> torch.Tensor:
    """Computes the cross-entropy of each row in fp32, [M]; forbidden tokens (the mask token, padding rows of the table) get no
    probability."""
    return functional.cross_entropy(logits_MV.float().masked_fill(forbidden_V, float("-inf")), targets_M, reduction="none")


def packed_rows(streams: Layout, row_S: torch.Tensor, config: DiffVLConfig) -> Packed:
    """Samples into rows; with FlexAttention of a length for which kernels are compiled once."""
    return pack(streams, row_S, bucket if config.text_config._attn_implementation == FLEX else int)


def shown_images(config: DiffVLConfig, batch: Batch) -> torch.Tensor:
    """Gives for each clean token the image token that it shows, counted over the batch, -1 for text; [S, L]."""
    return placed_images(batch["input_ids"], config, batch["valid"])


def clean_rope(model: Any, config: DiffVLConfig, batch: Batch) -> Rope:
    """Gives the position ids of the clean tokens, as the model numbers text and images."""
    if config.source_config is None:
        return Rope()
    stock: Any = model.module if hasattr(model, "module") else model  # data parallelism wraps it
    return stock.images.rope(batch["input_ids"], batch["valid"], batch.get("pixels", {}), Shown.in_batch(batch))


def mark_spans(layout: Layout, batch: Batch, config: DiffVLConfig) -> None:
    """Lets the clean tokens of an image see each other, as the model wants it."""
    layout.image_attention = config.image_attention
    if config.image_attention == "causal":
        return
    ids, answer, valid = batch["input_ids"], batch["answer_index"].abs(), batch["valid"]
    cut = answer_cells(layout.block, answer)
    layout.span = span_ids(is_visual(ids, config), answer, valid, cut, config.image_attention)


def scores_dtype(model: Any, device_type: str) -> torch.dtype:
    """Gives the type in which the trunk computes attention scores. A mask that eager attention adds to them must have it: one in
    fp32 would turn bf16 scores, the largest tensors of such a layer, into fp32 ones."""
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), torch.float32)
