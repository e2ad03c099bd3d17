"""One Batch -> LossOutput, as pure functions of the model, the batch and the place in the run.

`ar` is next-token cross-entropy on answers. `block_diffusion` is the masked-token objective of BD3-LM, SDAR-VL and
DiffusionVL, on the short layout: the clean stream once, then only the blocks that hold answer tokens. `full_diffusion` is that of
LLaDA and Dream: answers noised in their place. All ask the head for the places that carry loss and no others.

Weights of masked tokens: "1/t" (BD3-LM, arXiv 2503.09573, Eq. 8; DiffusionVL; one over the token's own masking probability),
"effective" (SDAR-VL's effective mask ratio scaling, arXiv 2512.14068, Eq. 6 and 7: one over the *realised* mask ratio of the
block, over its eligible tokens), "none". What each of them is an unbiased estimate of: docs/objective.md.

Shapes: S samples, L clean length, R noisy length, W = L + R for each noisy copy; packed into B rows of T tokens; M predicted
tokens, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffvl.attention.block_mask import training_masks
from diffvl.config.objectives import (
    ArObjective,
    BlockDiffusionObjective,
    DraftObjective,
    FullDiffusionObjective,
    Noise,
    Objective,
    UniformNoise,
)
from diffvl.data.samples import Batch, is_filler
from diffvl.hub.configuration_diffvl import DiffVLConfig, never_predicted
from diffvl.hub.layout_diffvl import NoisyStream, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.objective.drafts import DRAFT_SUMS, draft, draft_rates
from diffvl.objective.noise import mask_probabilities, mask_ratios, masked_tokens, noise_state
from diffvl.objective.normaliser import shares
from diffvl.objective.packing import Packed
from diffvl.objective.streams import (
    Draw,
    LossOutput,
    clean_rope,
    mark_spans,
    packed_rows,
    scores_dtype,
    shown_images,
    token_cross_entropy,
)
from diffvl.seeding import sample_generator


def block_weights(
    kind: str, p_BR: torch.Tensor, masked_BR: torch.Tensor, eligible_BR: torch.Tensor, block_BR: torch.Tensor
) -> torch.Tensor:
    """Loss weight of every noisy token, [B, R]; only masked ones are used.

    Args:
        p_BR: the probability with which each token was masked: t of its block, unless masking is biased by position.
        block_BR: block index, counted within the row.
    """
    if kind == "none":
        return torch.ones_like(p_BR)
    if kind == "1/t":
        return 1.0 / p_BR
    blocks = int(block_BR.max()) + 1 if block_BR.numel() else 0
    shape = (len(block_BR), blocks)
    masked = torch.zeros(shape, dtype=p_BR.dtype, device=p_BR.device).scatter_add_(1, block_BR, masked_BR.to(p_BR.dtype))
    eligible = torch.zeros(shape, dtype=p_BR.dtype, device=p_BR.device).scatter_add_(1, block_BR, eligible_BR.to(p_BR.dtype))
    return (eligible / masked.clamp_min(1.0)).gather(1, block_BR)


@dataclass(frozen=True)
class Corruption:
    """One draw over a batch's noisy stream, each [S, R]: which tokens are masked, and with what probability they were."""

    masked: torch.Tensor
    p: torch.Tensor


def loss_of(model: Any, config: DiffVLConfig, batch: Batch, objective: Objective, draw: Draw) -> LossOutput:
    """Computes the objective that the stage asks for."""
    if isinstance(objective, ArObjective):
        return ar(model, config, batch)
    if isinstance(objective, FullDiffusionObjective):
        return full_diffusion(model, config, batch, objective, draw)
    if isinstance(objective, DraftObjective):
        return draft(model, config, batch, objective, draw)
    return block_diffusion(model, config, batch, objective, draw)


MEASURE_NOISE = UniformNoise(t_min=1e-3, t_max=1.0, draws="stratified")


@torch.no_grad()
def measure(model: Any, config: DiffVLConfig, batches: Iterable[Any], objective: Objective) -> dict[str, torch.Tensor]:
    """Computes the sums of LossOutput over a held-out set, under one fixed noise law and seed whatever the training noise was,
    and in blocks of the size that the checkpoint decodes with, so that figures of different runs can be compared. Fillers go
    through the model and count nothing."""
    if isinstance(objective, BlockDiffusionObjective):
        plain = {"noise": MEASURE_NOISE, "ar_weight": 0.0, "position_bias": 0.0, "complementary": False, "block_curriculum": {}}
        objective = objective.model_copy(update=plain)
    elif isinstance(objective, FullDiffusionObjective):
        objective = objective.model_copy(update={"noise": MEASURE_NOISE})
    elif isinstance(objective, DraftObjective):
        objective = objective.model_copy(update={"block_curriculum": {}})
    totals: dict[str, torch.Tensor] = {}
    for batch in batches:
        sums = loss_of(model, config, batch, objective, Draw(seed=0, step=0, progress=0.0)).sums
        if is_filler(batch):
            continue
        for name, value in sums.items():
            totals[name] = totals.get(name, torch.zeros((), device=value.device)) + value
    return totals


def curriculum_state(objective: Objective, progress: float) -> dict[str, float]:
    """Tells where the objective's curricula stand at a point of the stage; empty for an objective that does not move."""
    if isinstance(objective, ArObjective):
        return {}
    state: dict[str, float] = {}
    if not isinstance(objective, DraftObjective):
        state = {f"noise_{name}": value for name, value in noise_state(objective.noise, progress).items()}
    if not isinstance(objective, FullDiffusionObjective) and objective.block_curriculum:
        state["block_size"] = objective.block_size_at(progress)
    return state


def measured_sums(objective: Objective) -> list[str]:
    """Gives the names of what `measure` sums under an objective."""
    if isinstance(objective, DraftObjective):
        return list(DRAFT_SUMS)
    names = ["correct", "cross_entropy", "predicted"]
    return names if isinstance(objective, ArObjective) else ["correct", "cross_entropy", "eligible", "predicted"]


def ar(model: Any, config: DiffVLConfig, batch: Batch) -> LossOutput:
    """Computes next-token cross-entropy on answers: position i - 1 predicts token i, under the trunk's own causal attention."""
    ids, valid = batch["input_ids"], batch["valid"]
    layout = clean_layout(torch.zeros_like(ids), valid, context="causal")
    mark_spans(layout, batch, config)
    rope = clean_rope(model, config, batch)
    packed = packed_rows(layout, batch["row"], config)
    at = followed_by_answer(batch["answer_index"])
    targets = ids[at[0], at[1] + 1]
    shown = shown_images(config, batch)
    entropy, correct = _predict(model, config, batch, packed, rope.at(layout.position), ids, shown, packed.place[at], targets)
    counted = torch.ones_like(targets).sum()
    sums = {"predicted": counted, "correct": correct.sum(), "cross_entropy": entropy.detach().sum()}
    return LossOutput(entropy.sum(), int(valid.sum()), sums)


def block_diffusion(model: Any, config: DiffVLConfig, batch: Batch, objective: BlockDiffusionObjective, draw: Draw) -> LossOutput:
    """Computes masked-token cross-entropy on noised answer blocks."""
    ids, answer, valid = batch["input_ids"], batch["answer_index"], batch["valid"]
    # 1. The grid, and the blocks that hold answers.
    block_size = objective.block_size_at(draw.progress)
    block = block_index(answer, block_size, objective.grid)
    stream = noisy_stream(answer, block, block_size, objective.grid)
    # 2. Corruption: t per block, then masks; with complementary masks a second copy.
    copies = corrupt(stream, objective, draw, batch["sample"])
    # 3. Clean tokens first, noisy ones after them, on the positions of their clean counterparts; then samples into rows.
    layout = clean_layout(block, valid, objective.context)
    mark_spans(layout, batch, config)
    rope = clean_rope(model, config, batch)
    rotations = [rope.at(layout.position), *[rope.of_stream(stream) for _ in copies]]
    for number in range(len(copies)):
        layout = layout.joined(noisy_layout(stream, objective.context, number + 1))
    packed = packed_rows(layout, batch["row"], config)
    clean_of_noisy = ids.gather(1, stream.source)
    noisy_ids = [clean_of_noisy.masked_fill(copy.masked, config.mask_token_id) for copy in copies]
    image = shown_images(config, batch)
    # 4. One forward; the head runs where a masked token is predicted, and for the AR term where an answer's token follows.
    clean_length, noisy_length = ids.shape[1], stream.source.shape[1]
    at = [
        packed.place[predicting_places(stream, copy.masked, objective.target, clean_length + number * noisy_length)]
        for number, copy in enumerate(copies)
    ]
    targets = [clean_of_noisy[copy.masked] for copy in copies]
    following = followed_by_answer(answer)
    if objective.ar_weight > 0:
        at.append(packed.place[following])
        targets.append(ids[following[0], following[1] + 1])
    entropy, correct = _predict(
        model,
        config,
        batch,
        packed,
        torch.cat(rotations, -1),
        torch.cat([ids, *noisy_ids], 1),
        torch.cat([image, *[image.gather(1, stream.source).masked_fill(copy.masked, -1) for copy in copies]], 1),
        torch.cat(at),
        torch.cat(targets),
    )
    # 5. Weighted cross-entropy of the masked tokens, averaged over the copies.
    share = shares(objective, answer)
    weights = torch.cat([(share * _weights(objective, stream, copy))[copy.masked] for copy in copies]) / len(copies)
    masked_entropy = entropy[: len(weights)]
    loss = (weights.to(entropy.dtype) * masked_entropy).sum()
    if objective.ar_weight > 0:
        loss = loss + objective.ar_weight * entropy[len(weights) :].sum()
    # 6. What is counted: answers and their first stop.
    counted = torch.cat([~stream.padding_stop[copy.masked] for copy in copies])
    sums = {
        "predicted": counted.sum(),
        "correct": (correct[: len(weights)].bool() & counted).sum(),
        "cross_entropy": masked_entropy.detach()[counted.nonzero(as_tuple=True)].sum(),
        "eligible": (stream.eligible & ~stream.padding_stop).sum() * len(copies),
    }
    return LossOutput(loss, int(layout.valid.sum()), sums)


def full_diffusion(model: Any, config: DiffVLConfig, batch: Batch, objective: FullDiffusionObjective, draw: Draw) -> LossOutput:
    """Computes masked-token cross-entropy on answers that are noised in their place: the clean answer stands nowhere, so nothing
    can leak; a turn (question and answer) never sees a later one, as in decoding."""
    ids, answer, valid = batch["input_ids"], batch["answer_index"], batch["valid"]
    # 1. One stream; its blocks are the turns, which end with every answer.
    turn = block_index(answer, ids.shape[1], "absolute")
    layout = clean_layout(turn, valid, "block")
    none = torch.zeros_like(valid)
    stream = NoisyStream(layout.position, layout.position, turn, eligible=answer > 0, padding_stop=none, valid=valid)
    # 2. Corruption: t per answer, then masks.
    noised = noise_blocks(stream, objective.noise, 0.0, draw, batch["sample"])
    packed = packed_rows(layout, batch["row"], config)
    # 3. One forward; the head runs where a masked token is predicted, which is never the first one of a sample.
    sample, place = noised.masked.nonzero(as_tuple=True)
    at = packed.place[sample, place if objective.target == "same" else place - 1]
    noisy_ids, image = ids.masked_fill(noised.masked, config.mask_token_id), shown_images(config, batch)
    rope = clean_rope(model, config, batch).at(layout.position)
    entropy, correct = _predict(model, config, batch, packed, rope, noisy_ids, image, at, ids[noised.masked])
    weights = block_weights(objective.weight, noised.p, noised.masked, stream.eligible, turn)[noised.masked]
    sums = {
        "predicted": noised.masked.sum(),
        "correct": correct.sum(),
        "cross_entropy": entropy.detach().sum(),
        "eligible": stream.eligible.sum(),
    }
    return LossOutput((weights.to(entropy.dtype) * entropy).sum(), int(valid.sum()), sums)


def _weights(objective: BlockDiffusionObjective, stream: NoisyStream, copy: Corruption) -> torch.Tensor:
    """Loss weight of every noisy token, [S, R]."""
    weights = block_weights(objective.weight, copy.p, copy.masked, stream.eligible, stream.block)
    return torch.where(stream.padding_stop, weights * objective.pad_weight, weights)


def corrupt(stream: NoisyStream, objective: BlockDiffusionObjective, draw: Draw, samples: torch.Tensor) -> list[Corruption]:
    """Draws the masks of a batch; `samples` [S] are dataset indices. One corruption, or two with complementary masks."""
    drawn = noise_blocks(stream, objective.noise, objective.position_bias, draw, samples)
    if not objective.complementary:
        return [drawn]
    return [drawn, Corruption(stream.eligible & ~drawn.masked, 1 - drawn.p)]


def noise_blocks(stream: NoisyStream, noise: Noise, position_bias: float, draw: Draw, samples: torch.Tensor) -> Corruption:
    """Draws t for each block and masks for each eligible token of every sample, each sample from its own generator."""
    masked = torch.zeros_like(stream.eligible)
    p = torch.ones(stream.eligible.shape, dtype=torch.float64, device=stream.block.device)
    for number, sample in enumerate(samples.tolist()):
        length = int(stream.valid[number].sum())
        generator = sample_generator(draw.seed, draw.step, sample)
        blocks, block_R = torch.unique(stream.block[number, :length].cpu(), return_inverse=True)
        eligible_R = stream.eligible[number, :length].cpu()
        num_blocks = int(blocks[-1]) + 1 if len(blocks) else 0  # text after the last answer is not counted
        t_K = mask_ratios(noise, blocks, num_blocks, draw.progress, generator)
        p_R = mask_probabilities(t_K, block_R, eligible_R, position_bias)
        masked_R = masked_tokens(p_R, eligible_R, generator)
        p[number, :length] = p_R.to(p.device)
        masked[number, :length] = masked_R.to(masked.device)
    return Corruption(masked, p)


def predicting_places(
    stream: NoisyStream, masked: torch.Tensor, target: str, noisy_start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tells where in the samples' streams [S, W] the prediction of each masked token is read, in row-major order of these tokens.

    `same`: at the token itself. `shift`: at the token before it, inside the noisy block where it has one there, otherwise at
    the last clean token before the block.

    Args:
        noisy_start: where the noisy copy begins in W; the clean stream stands at 0.
    """
    sample, place = masked.nonzero(as_tuple=True)
    if target == "same":
        return sample, noisy_start + place
    before = (place - 1).clamp_min(0)
    inside = (place > 0) & (stream.block[sample, before] == stream.block[sample, place])
    return sample, torch.where(inside, noisy_start + before, stream.position[sample, place] - 1)


def followed_by_answer(answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives (sample, column) of the clean tokens whose next token belongs to an answer."""
    return (answer[:, 1:] > 0).nonzero(as_tuple=True)  # type: ignore[return-value]


def _predict(
    model: Any,
    config: DiffVLConfig,
    batch: Batch,
    packed: Packed,
    rope_SW: torch.Tensor,
    ids_SW: torch.Tensor,
    image_SW: torch.Tensor,
    at_M: torch.Tensor,
    targets_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs one forward: cross-entropy of each target at its place, [M] with the graph, and whether it is the likeliest token,
    [M]."""
    ids = packed.moved(ids_SW, 0)
    dtype = scores_dtype(model, ids.device.type)

    def judge(logits_mV: torch.Tensor, which: slice) -> torch.Tensor:
        forbidden = never_predicted(config, logits_mV.shape[-1], logits_mV.device)
        entropy = token_cross_entropy(logits_mV, targets_M[which], forbidden)
        if torch.is_grad_enabled() and not entropy.requires_grad and isinstance(model, torch.nn.Module):
            # A batch without images in a stage that trains the connector alone: nothing to learn, but a step like any other.
            # Added here, inside the model's forward, where data parallelism sees that the parameters take part.
            entropy = entropy + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        likeliest = logits_mV.detach().masked_fill(forbidden, float("-inf")).argmax(-1)
        return torch.stack([entropy, (likeliest == targets_M[which]).to(entropy.dtype)], -1)

    judged = model(
        input_ids=ids,
        **batch.get("pixels", {}),
        image_index=packed.moved(image_SW, -1),
        attention_mask=training_masks(config.text_config, packed.layout, dtype),
        position_ids=packed.moved(rope_SW, 0),
        logits_rows=at_M,
        row_map=judge,
    ).logits
    return judged[:, 0], judged[:, 1]


def rates(sums: dict[str, float]) -> dict[str, float]:
    """Computes the training figures of a log line."""
    predicted = max(sums["predicted"], 1.0)
    if "drafts" in sums:
        return draft_rates(sums)
    if "eligible" not in sums:
        return {"next_token_accuracy": sums["correct"] / predicted}
    return {"mask_ratio": sums["predicted"] / max(sums["eligible"], 1.0), "masked_accuracy": sums["correct"] / predicted}


def scores(sums: dict[str, float]) -> dict[str, float]:
    """Computes the held-out figures, over answer tokens and first stops."""
    if "drafts" in sums:
        return {**draft_rates(sums), "tokens": sums["predicted"]}
    kind = "masked" if "eligible" in sums else "next_token"
    predicted = sums["predicted"]
    return {
        f"{kind}_loss": sums["cross_entropy"] / predicted if predicted else math.nan,
        f"{kind}_accuracy": sums["correct"] / predicted if predicted else math.nan,
        "tokens": predicted,
    }
