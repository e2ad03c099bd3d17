"""One Batch -> LossOutput, as pure functions of the model, the batch and the place in the run.

`ar` is next-token cross-entropy on answers. `block_diffusion` is the masked-token objective of BD3-LM, SDAR-VL and
DiffusionVL, on the short layout: the clean stream once, then only the blocks that hold answer tokens. Both ask the head for
the rows that carry loss and no others.

Shapes: B batch, L clean length, R noisy length, T = L + R, M rows with loss, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffvl.config import ArObjective, BlockDiffusionObjective, Objective, UniformNoise
from diffvl.data.collate import Batch
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.layout_diffvl import Layout, NoisyStream, attention_masks, block_index, clean_layout, noisy_stream
from diffvl.hub.sampling_diffvl import never_predicted
from diffvl.loss import block_weights, token_cross_entropy
from diffvl.noise import mask_ratios, masked_tokens, sample_generator


@dataclass(frozen=True)
class Draw:
    """Where in a run the noise is drawn: its generators are seeded by (seed, step, sample); progress moves curricula."""

    seed: int
    step: int
    progress: float


@dataclass(frozen=True)
class LossOutput:
    """loss: summed over tokens, with its graph; divide by the answer tokens of the whole optimiser step.

    sums: counts and sums without a graph, over answer tokens and their first stop only (padding stops left out):
    `predicted`, `correct`, `cross_entropy`, and under block diffusion `eligible`.
    tokens: positions that went through the trunk.
    """

    loss: torch.Tensor
    tokens: int
    sums: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Corruption:
    """One draw over a batch's noisy stream, each [B, R]: which tokens are masked, and the mask ratio t of their block."""

    masked: torch.Tensor
    t: torch.Tensor


def loss_of(model: Any, config: DiffVLConfig, batch: Batch, objective: Objective, draw: Draw) -> LossOutput:
    """The objective that the stage asks for."""
    if isinstance(objective, ArObjective):
        return ar(model, config, batch)
    return block_diffusion(model, config, batch, objective, draw)


MEASURE_NOISE = UniformNoise(t_min=1e-3, t_max=1.0, stratified=True)


@torch.no_grad()
def measure(model: Any, config: DiffVLConfig, batches: Iterable[Any], objective: Objective) -> dict[str, torch.Tensor]:
    """The sums of LossOutput over a held-out set, under one fixed noise law and seed whatever the training noise was, so that
    figures of different runs can be compared."""
    if isinstance(objective, BlockDiffusionObjective):
        objective = objective.model_copy(update={"noise": MEASURE_NOISE, "ar_weight": 0.0})
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, value in loss_of(model, config, batch, objective, Draw(seed=0, step=0, progress=0.0)).sums.items():
            totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value
    return totals


def measured_sums(objective: Objective) -> list[str]:
    """The names of what `measure` sums under an objective."""
    names = ["correct", "cross_entropy", "predicted"]
    return names if isinstance(objective, ArObjective) else ["correct", "cross_entropy", "eligible", "predicted"]


def ar(model: Any, config: DiffVLConfig, batch: Batch) -> LossOutput:
    """Next-token cross-entropy on answers: position i - 1 predicts token i, under the trunk's own causal attention."""
    ids, answer, valid = batch["input_ids"], batch["answer_index"], batch["valid"]
    layout = clean_layout(torch.zeros_like(ids), valid, context="causal")
    target = answer > 0
    rows = torch.zeros_like(valid)
    rows[:, :-1] = target[:, 1:]
    logits = _forward(model, config, ids, batch, layout, None, rows)
    forbidden = never_predicted(config, logits.shape[-1], logits.device)
    entropy = token_cross_entropy(logits, ids[:, 1:][target[:, 1:]], forbidden)
    correct = logits.argmax(-1) == ids[:, 1:][target[:, 1:]]
    sums = {"predicted": target.sum(), "correct": correct.sum(), "cross_entropy": entropy.detach().sum()}
    return LossOutput(entropy.sum(), int(valid.sum()), sums)


def block_diffusion(model: Any, config: DiffVLConfig, batch: Batch, objective: BlockDiffusionObjective, draw: Draw) -> LossOutput:
    """Masked-token cross-entropy on noised answer blocks."""
    ids, answer, valid = batch["input_ids"], batch["answer_index"], batch["valid"]
    # 1. The grid, and the blocks that hold answers.
    block = block_index(answer, objective.block_size, objective.grid)
    stream = noisy_stream(answer, block, objective.block_size, objective.grid)
    # 2. Corruption: t per block, then masks.
    corruption = corrupt(stream, objective, draw, batch["sample"])
    # 3. Clean tokens first, noisy behind, on the positions of their clean counterparts.
    layout = clean_layout(block, valid, objective.context).joined(noisy_layout(stream, objective.context))
    clean_of_noisy = ids.gather(1, stream.source)
    noisy_ids = torch.where(corruption.masked, torch.full_like(clean_of_noisy, config.mask_token_id), clean_of_noisy)
    # 4. One forward; the head runs where a masked token is predicted.
    at = predicting_rows(stream, corruption.masked, objective.target, ids.shape[1])
    asked = torch.zeros_like(layout.valid)
    asked[at] = True
    ar_rows = torch.zeros_like(asked)
    if objective.ar_weight > 0:
        ar_rows[:, : ids.shape[1] - 1] = answer[:, 1:] > 0
    logits = _forward(model, config, torch.cat([ids, noisy_ids], 1), batch, layout, stream.source, asked | ar_rows)
    line = (asked | ar_rows).flatten().long().cumsum(0).view_as(asked) - 1
    # 5. Weighted cross-entropy of the masked tokens.
    forbidden = never_predicted(config, logits.shape[-1], logits.device)
    targets, predicted = clean_of_noisy[corruption.masked], logits[line[at]]
    entropy = token_cross_entropy(predicted, targets, forbidden)
    weights = block_weights(objective.weight, corruption.t, corruption.masked, stream.eligible, stream.block)
    weights = torch.where(stream.padding_stop, weights * objective.pad_weight, weights)[corruption.masked]
    loss = (weights.to(entropy.dtype) * entropy).sum()
    if objective.ar_weight > 0:
        following = ids[:, 1:][ar_rows[:, : ids.shape[1] - 1]]
        loss = loss + objective.ar_weight * token_cross_entropy(logits[line[ar_rows]], following, forbidden).sum()
    # 6. What is counted: answers and their first stop.
    counted = ~stream.padding_stop[corruption.masked]
    sums = {
        "predicted": counted.sum(),
        "correct": ((predicted.detach().masked_fill(forbidden, float("-inf")).argmax(-1) == targets) & counted).sum(),
        "cross_entropy": entropy.detach()[counted].sum(),
        "eligible": (stream.eligible & ~stream.padding_stop).sum(),
    }
    return LossOutput(loss, int(layout.valid.sum()), sums)


def corrupt(stream: NoisyStream, objective: BlockDiffusionObjective, draw: Draw, samples: torch.Tensor) -> Corruption:
    """Draws t and masks for every sample of a batch, each from its own generator; `samples` [B] are dataset indices."""
    masked = torch.zeros_like(stream.eligible)
    t = torch.ones(stream.eligible.shape, dtype=torch.float64, device=stream.block.device)
    for row, sample in enumerate(samples.tolist()):
        length = int(stream.valid[row].sum())
        generator = sample_generator(draw.seed, draw.step, sample)
        blocks, block_R = torch.unique(stream.block[row, :length].cpu(), return_inverse=True)
        t_K = mask_ratios(objective.noise, len(blocks), draw.progress, generator)
        masked_R = masked_tokens(t_K, block_R, stream.eligible[row, :length].cpu(), generator)
        t[row, :length] = t_K[block_R].to(t.device)
        masked[row, :length] = masked_R.to(masked.device)
    return Corruption(masked, t)


def noisy_layout(stream: NoisyStream, context: str) -> Layout:
    """The noisy stream's rows."""
    return Layout(
        position=stream.position,
        block=stream.block,
        noisy=torch.ones_like(stream.valid),
        valid=stream.valid,
        document=torch.zeros_like(stream.block),
        context=context,
    )


def predicting_rows(
    stream: NoisyStream, masked: torch.Tensor, target: str, clean_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in [B, T] the prediction of each masked token is read, in the row-major order of the masked tokens.

    `same`: at the token itself. `shift`: at the token before it, inside the noisy block where it has one there, otherwise at
    the last clean token before the block.
    """
    sample, place = masked.nonzero(as_tuple=True)
    if target == "same":
        return sample, clean_length + place
    before = (place - 1).clamp_min(0)
    inside = (place > 0) & (stream.block[sample, before] == stream.block[sample, place])
    return sample, torch.where(inside, clean_length + before, stream.position[sample, place] - 1)


def _forward(
    model: Any,
    config: DiffVLConfig,
    ids: torch.Tensor,
    batch: Batch,
    layout: Layout,
    noisy_source: torch.Tensor | None,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Logits [M, V] at `rows`; noisy copies of image placeholders show the same image tokens, which are encoded once."""
    clean_length = batch["input_ids"].shape[1]
    is_image = (batch["input_ids"] == config.image_token_id) & batch["valid"]
    image_index = torch.where(is_image, is_image.flatten().long().cumsum(0).view_as(is_image) - 1, -1)
    if noisy_source is not None:
        copies = image_index.gather(1, noisy_source)
        image_index = torch.cat([image_index, torch.where(ids[:, clean_length:] == config.image_token_id, copies, -1)], 1)
    dtype = torch.get_autocast_dtype(ids.device.type) if torch.is_autocast_enabled(ids.device.type) else torch.float32
    output = model(
        input_ids=ids,
        pixel_values=batch.get("pixel_values"),
        image_index=image_index,
        attention_mask=attention_masks(config.text_config, layout, slice(None), dtype),
        position_ids=layout.position,
        logits_rows=rows,
    )
    return output.logits


def rates(sums: dict[str, float]) -> dict[str, float]:
    """Training figures of a log line."""
    predicted = max(sums["predicted"], 1.0)
    if "eligible" not in sums:
        return {"next_token_accuracy": sums["correct"] / predicted}
    return {"mask_ratio": sums["predicted"] / max(sums["eligible"], 1.0), "masked_accuracy": sums["correct"] / predicted}


def scores(sums: dict[str, float]) -> dict[str, float]:
    """Held-out figures, over answer tokens and first stops."""
    kind = "masked" if "eligible" in sums else "next_token"
    predicted = sums["predicted"]
    return {
        f"{kind}_loss": sums["cross_entropy"] / predicted if predicted else math.nan,
        f"{kind}_accuracy": sums["correct"] / predicted if predicted else math.nan,
        "tokens": predicted,
    }
