"""The training steps that `diffvl bench train` compares: one model, one sample, four ways to compute a loss.

Every form is a function of (model, sample, draw) that returns a step: calling the step runs one forward and returns the loss
per answer token. `ar` and `ar_answer_logits` are next-token finetuning on the stock trunk. `published` is block diffusion
as DiffusionVL (arXiv 2512.15713) and BD3-LM (arXiv 2503.09573, section 3) publish it, written plainly. `ours` is the
objective that `diffvl convert` trains, called as training calls it. The trunk is the same module in all four.

`step_flops` counts each form as what it is: doubling the sequence raises its count (and lowers its tokens per second),
computing masked pairs lowers its MFU, the part of the machine's matrix products that it reaches.

Shapes: L clean length, R answer tokens, D block size, V vocabulary. Batch size is 1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from diffvl.attention.choose import choose
from diffvl.bench.random_model import NUM_SPECIAL, STOP_TOKEN, TrunkSize
from diffvl.config.objectives import BlockDiffusionObjective
from diffvl.data.samples import IGNORED, Batch, Sample, collate, on_device
from diffvl.errors import UsageError
from diffvl.hub.layout_diffvl import block_index, noisy_stream
from diffvl.objective.losses import Draw, corrupt, loss_of

SHAPE = re.compile(r"L([1-9]\d*)-R([1-9]\d*)")
FLOPS_FORMULA = "3 * (2 P tokens + 2 H V rows + 4 A N pairs), pairs as the attention rule allows"

Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """L clean tokens of which the last R are the answer."""

    length: int
    answer: int

    @property
    def name(self) -> str:
        return f"L{self.length}-R{self.answer}"


@dataclass(frozen=True)
class TrainingSample:
    """One sample as a batch, and the objective that it is trained with."""

    shape: Shape
    batch: Batch
    objective: BlockDiffusionObjective


def parse_shapes(text: str) -> list[Shape]:
    """Reads `L3000-R300,L512-R400`.

    Raises:
        UsageError: on other text, on a shape named twice, or on an answer that leaves no prompt.
    """
    shapes: list[Shape] = []
    for name in (part.strip() for part in text.split(",")):
        match = SHAPE.fullmatch(name)
        if match is None:
            raise UsageError(f"--shapes: {name!r} is not a shape: expected tokens in all and answer tokens, as in L3000-R300")
        shape = Shape(int(match[1]), int(match[2]))
        if shape.answer >= shape.length:
            raise UsageError(f"--shapes: {name}: the answer (R) must be shorter than the whole sample (L)")
        if shape in shapes:
            raise UsageError(f"--shapes: {name} is named twice")
        shapes.append(shape)
    return shapes


def make_sample(
    shape: Shape, objective: BlockDiffusionObjective, vocabulary: int, device: torch.device, seed: int
) -> TrainingSample:
    """Draws random text of a shape; the answer ends with the stop token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary - NUM_SPECIAL, (shape.length,), generator=generator)
    ids[-1] = STOP_TOKEN
    answer = [0] * (shape.length - shape.answer) + [1] * shape.answer
    batch: Any = collate([[Sample(ids.tolist(), answer, None, 0)]], pad_token_id=STOP_TOKEN)
    return TrainingSample(shape, on_device(batch, device), objective)  # pyright: ignore[reportArgumentType]


# --- the four forms ------------------------------------------------------------------------------------------------------


def ar(model: Any, sample: TrainingSample, draw: Draw) -> Step:
    """Finetunes on next tokens with transformers' own loss: logits at every position, labels -100 outside the answer."""
    trunk, ids, labels = model.trunk, sample.batch["input_ids"], sample.batch["labels"]
    return lambda: trunk(input_ids=ids, labels=labels, use_cache=False).loss


def ar_answer_logits(model: Any, sample: TrainingSample, draw: Draw) -> Step:
    """Finetunes on next tokens with logits at the answer's tokens only, through transformers' `logits_to_keep`."""
    trunk, ids = model.trunk, sample.batch["input_ids"]
    predicted = (sample.batch["labels"][0] != IGNORED).nonzero()[:, 0]

    def step() -> torch.Tensor:
        logits = trunk(input_ids=ids, use_cache=False, logits_to_keep=predicted - 1).logits
        return functional.cross_entropy(logits[0].float(), ids[0, predicted])

    return step


def published(model: Any, sample: TrainingSample, draw: Draw, forbidden_V: torch.Tensor | None = None) -> Step:
    """Trains block diffusion as published: the answer's last block filled with stop tokens; then the noisy copy of the whole
    sequence and the clean one (2L); a dense additive mask of 2L x 2L in the model's dtype, built in every step; logits of all
    L noisy positions in fp32; cross-entropy weighted 1/t.

    The noise is that of `ours` for the same draw. It is drawn here, outside the step and so not timed, which favours this
    form.

    Args:
        forbidden_V: tokens that get no probability, bool [V]; the published form has none, `ours` does, and a comparison of
            losses needs the same.
    """
    trunk, block_size = model.trunk, sample.objective.block_size
    ids = pad_to_block(sample.batch["input_ids"], block_size, STOP_TOKEN)
    length = ids.shape[1]
    masked_BL, t_BL = full_length_noise(sample, draw)
    noisy_ids = torch.where(masked_BL, torch.full_like(ids, model.config.mask_token_id), ids)
    targets = torch.where(masked_BL, ids, IGNORED)
    answers = (sample.batch["labels"] != IGNORED).sum()
    positions = torch.arange(length, device=ids.device)

    def step() -> torch.Tensor:
        mask = doubled_mask(length, block_size, sample.objective.context, ids.device, trunk.dtype)
        logits = trunk(
            input_ids=torch.cat([noisy_ids, ids], 1),
            attention_mask=mask,
            position_ids=positions.repeat(2)[None],
            use_cache=False,
            logits_to_keep=positions,
        ).logits.float()
        if forbidden_V is not None:
            logits = logits.masked_fill(forbidden_V, torch.finfo(logits.dtype).min)
        entropy = functional.cross_entropy(logits[0], targets[0], ignore_index=IGNORED, reduction="none")
        return (entropy / t_BL[0].to(entropy.dtype)).sum() / answers

    return step


def ours(model: Any, sample: TrainingSample, draw: Draw) -> Step:
    """Trains the objective of this package as its training loop calls it; drawing the noise is part of the step."""
    answers = (sample.batch["labels"] != IGNORED).sum()
    return lambda: loss_of(model, model.config, sample.batch, sample.objective, draw).loss / answers


FORMS: dict[str, Callable[[Any, TrainingSample, Draw], Step]] = {
    "ar": ar,
    "ar_answer_logits": ar_answer_logits,
    "published": published,
    "ours": ours,
}

STOCK_ATTENTION = "sdpa"
OUR_ATTENTION = "auto"  # the default of training, on every kind of device


def choose_attention(model: Any, form: str) -> str:
    """Sets the attention implementation that a form runs on, for ours as training does and for all others the stock one; returns
    its name."""
    return choose(model.trunk, OUR_ATTENTION if form == "ours" else STOCK_ATTENTION, model.trunk.device)


# --- pieces of the published form ------------------------------------------------------------------------------------------


def pad_to_block(values_BL: torch.Tensor, block_size: int, value: int) -> torch.Tensor:
    """Appends `value` until the last block is whole."""
    return functional.pad(values_BL, (0, -values_BL.shape[1] % block_size), value=value)


def full_length_noise(sample: TrainingSample, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the noise of `ours`, laid out over whole blocks from token 0 to the end of the answer's last block: masked
    (bool) and the probability of masking (fp64, 1 where nothing can be masked)."""
    answer, objective = sample.batch["answer_index"], sample.objective
    block = block_index(answer, objective.block_size, objective.grid)
    stream = noisy_stream(answer, block, objective.block_size, objective.grid)
    (corruption,) = corrupt(stream, objective, draw, sample.batch["sample"])
    whole = pad_to_block(answer, objective.block_size, 0)
    masked_BL = torch.zeros_like(whole, dtype=torch.bool).scatter(1, stream.position, corruption.masked)
    t_BL = torch.ones(whole.shape, dtype=torch.float64, device=whole.device).scatter(1, stream.position, corruption.p)
    return masked_BL, t_BL


def doubled_mask(length: int, block_size: int, context: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Builds the mask of [noisy ; clean], additive, [1, 1, 2L, 2L]: a noisy token sees its noisy block and the clean blocks
    before it; a clean one sees the clean blocks up to its own (or, with causal context, the clean tokens up to itself)."""
    index = torch.arange(length, device=device)
    block = torch.div(index, block_size, rounding_mode="floor")
    own, before = block[:, None] == block[None], block[None] < block[:, None]
    clean = own | before if context == "block" else index[None] <= index[:, None]
    allowed = torch.cat([torch.cat([own, before], 1), torch.cat([torch.zeros_like(clean), clean], 1)])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]


# --- model FLOPs -----------------------------------------------------------------------------------------------------------


def step_flops(form: str, size: TrunkSize, sample: TrainingSample, draw: Draw) -> int:
    """Counts the model FLOPs of one forward and backward (3 times the forward) of a form: FLOPS_FORMULA, with P weights in the
    layers, width H, vocabulary V, N layers with attention of width A (heads times their width); `tokens` go through the trunk,
    `rows` through the head, `pairs` are the (query, key) pairs that the attention rule allows."""
    tokens, num_logits, pairs = _counts(form, sample, draw)
    attention = size.heads * size.head_dim
    per_layer = size.hidden * (2 * attention + 2 * size.kv_heads * size.head_dim) + 3 * size.hidden * size.intermediate
    layers = 2 * per_layer * size.layers * tokens
    head = 2 * size.hidden * size.vocabulary * num_logits
    return 3 * (layers + head + 4 * attention * size.layers * pairs)


def _counts(form: str, sample: TrainingSample, draw: Draw) -> tuple[int, int, int]:
    """Counts tokens through the trunk, tokens through the head, and pairs of the attention rule."""
    length, answer, block_size = sample.shape.length, sample.shape.answer, sample.objective.block_size
    if form in ("ar", "ar_answer_logits"):
        return length, length if form == "ar" else answer, length * (length + 1) // 2
    whole = length + -length % block_size
    if form == "published":
        noisy, num_logits, clean = whole, whole, whole
    else:
        noisy = whole - (length - answer) // block_size * block_size
        num_logits, clean = int(full_length_noise(sample, draw)[0].sum()), length
    causal = sample.objective.context == "causal"
    seen_by_clean = (place + 1 if causal else min((place // block_size + 1) * block_size, clean) for place in range(clean))
    seen_by_noisy = ((place // block_size + 1) * block_size for place in range(whole - noisy, whole))
    return clean + noisy, num_logits, sum(seen_by_clean) + sum(seen_by_noisy)
