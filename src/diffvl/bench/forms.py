"""The training steps that `diffvl bench train` compares: one model, one sample, four ways to get a loss.

Every form is a function of (model, sample, draw) that gives a step: calling the step runs one forward and returns the loss
per answer token. `ar` and `ar_answer_logits` are next-token finetuning on the stock trunk; `published` is block diffusion
as DiffusionVL (arXiv 2512.15713) and BD3-LM (arXiv 2503.09573, section 3) publish it, written plainly; `ours` is the
objective that `diffvl convert` trains, called as the trainer calls it. The trunk is the same module in all four.

Shapes: L clean length, R answer tokens, D block size, V vocabulary. Batch size is 1.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from diffvl.attention.choose import choose
from diffvl.config.recipe import BlockDiffusionObjective
from diffvl.data.chat import Sample
from diffvl.data.collate import IGNORED, Batch, collate
from diffvl.errors import UsageError
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.layout_diffvl import block_index, noisy_stream
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.objective.losses import Draw, corrupt, loss_of

SHAPE = re.compile(r"L([1-9]\d*)-R([1-9]\d*)")
STOP_TOKEN = 0
NUM_SPECIAL = 2  # the vocabulary's last ids: the image token and the mask token, which no sample holds

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
class TrunkSize:
    """A llama-like trunk with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Work:
    """One sample and what is trained on it."""

    shape: Shape
    batch: Batch
    objective: BlockDiffusionObjective


def parse_shapes(text: str) -> list[Shape]:
    """`L3000-R300,L512-R400` -> shapes.

    Raises:
        UsageError: on other words, on a shape named twice, or on an answer that leaves no prompt.
    """
    shapes: list[Shape] = []
    for word in (part.strip() for part in text.split(",")):
        match = SHAPE.fullmatch(word)
        if match is None:
            raise UsageError(f"--shapes: {word!r} is not a shape: expected tokens in all and answer tokens, as in L3000-R300")
        shape = Shape(int(match[1]), int(match[2]))
        if shape.answer >= shape.length:
            raise UsageError(f"--shapes: {word}: the answer (R) must be shorter than the whole sample (L)")
        if shape in shapes:
            raise UsageError(f"--shapes: {word} is named twice")
        shapes.append(shape)
    return shapes


def resized(size: TrunkSize, layers: int | None, hidden: int | None) -> TrunkSize:
    """The size with other layers or another width; the width of a head, the groups of heads and the MLP's ratio stay.

    Raises:
        UsageError: if the width is not made of whole heads and groups.
    """
    if layers is not None:
        size = replace(size, layers=layers)
    if hidden is None:
        return size
    unit = size.head_dim * (size.heads // size.kv_heads)
    if hidden < unit or hidden % unit:
        raise UsageError(f"--hidden {hidden}: expected a multiple of {unit} (heads of {size.head_dim} in groups)")
    heads = hidden // size.head_dim
    return replace(
        size,
        hidden=hidden,
        heads=heads,
        kv_heads=heads * size.kv_heads // size.heads,
        intermediate=size.intermediate * hidden // size.hidden,
    )


def build_model(size: TrunkSize, device: torch.device, dtype: torch.dtype, seed: int, std: float = 0.02) -> Any:
    """A DiffVL model with random weights, in training mode; `std` is that of its linear layers.

    Its vision tower is as small as one can be and never runs, because no sample has a picture.
    """
    text = {
        "model_type": "llama",
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.intermediate,
        "vocab_size": size.vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "initializer_range": std,
        "bos_token_id": STOP_TOKEN,
        "eos_token_id": STOP_TOKEN,
        "attn_implementation": "sdpa",
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 8,
    }
    config = DiffVLConfig(
        text_config=text,
        vision_config=vision,
        image_size=8,
        image_token_id=size.vocabulary - 2,
        mask_token_id=size.vocabulary - 1,
        vocabulary_size=size.vocabulary,
        stop_token_ids=[STOP_TOKEN],
    )
    # Forked, so that the random state of the process stays; on CUDA the weights are drawn where they will be used.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model = DiffVLForConditionalGeneration(config)
    for parameter in model.parameters():
        # Parameters only: the rotary frequencies are buffers and stay in fp32, as in a loaded checkpoint.
        parameter.data = parameter.data.to(dtype)
    return model.train()


def make_work(shape: Shape, objective: BlockDiffusionObjective, vocabulary: int, device: torch.device, seed: int) -> Work:
    """Random text of a shape; the answer ends with the stop token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary - NUM_SPECIAL, (shape.length,), generator=generator)
    ids[-1] = STOP_TOKEN
    answer = [0] * (shape.length - shape.answer) + [1] * shape.answer
    batch: Any = collate([[Sample(ids.tolist(), answer, None, 0)]], pad_token_id=STOP_TOKEN)
    return Work(shape, {name: value.to(device) for name, value in batch.items()}, objective)  # pyright: ignore[reportArgumentType]


# --- the four forms ------------------------------------------------------------------------------------------------------


def ar(model: Any, work: Work, draw: Draw) -> Step:
    """Next-token finetuning with transformers' own loss: logits at every position, labels -100 outside the answer."""
    trunk, ids, labels = model.language_model, work.batch["input_ids"], work.batch["labels"]
    return lambda: trunk(input_ids=ids, labels=labels, use_cache=False).loss


def ar_answer_logits(model: Any, work: Work, draw: Draw) -> Step:
    """Next-token finetuning with logits at the answer's tokens only, through transformers' `logits_to_keep`."""
    trunk, ids = model.language_model, work.batch["input_ids"]
    predicted = (work.batch["labels"][0] != IGNORED).nonzero()[:, 0]

    def step() -> torch.Tensor:
        logits = trunk(input_ids=ids, use_cache=False, logits_to_keep=predicted - 1).logits
        return functional.cross_entropy(logits[0].float(), ids[0, predicted])

    return step


def published(model: Any, work: Work, draw: Draw, forbidden_V: torch.Tensor | None = None) -> Step:
    """Block diffusion as published: the answer's last block filled with stop tokens; then the noisy copy of the whole
    sequence and the clean one (2L); a dense additive mask of 2L x 2L in the model's dtype, built in every step; logits of all
    L noisy positions in fp32; cross-entropy weighted 1/t.

    The noise is that of `ours` for the same draw. It is drawn here, outside the step and so not timed, which favours this
    form.

    Args:
        forbidden_V: tokens that get no probability, bool [V]; the published form has none, `ours` does, and a comparison of
            losses needs the same.
    """
    trunk, block_size = model.language_model, work.objective.block_size
    ids = filled_up(work.batch["input_ids"], block_size, STOP_TOKEN)
    length = ids.shape[1]
    masked_BL, t_BL = full_length_noise(work, draw)
    noisy_ids = torch.where(masked_BL, torch.full_like(ids, model.config.mask_token_id), ids)
    targets = torch.where(masked_BL, ids, IGNORED)
    answers = (work.batch["labels"] != IGNORED).sum()
    positions = torch.arange(length, device=ids.device)

    def step() -> torch.Tensor:
        mask = doubled_mask(length, block_size, work.objective.context, ids.device, trunk.dtype)
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


def ours(model: Any, work: Work, draw: Draw) -> Step:
    """The objective of this package as its trainer calls it; drawing the noise is part of the step."""
    answers = (work.batch["labels"] != IGNORED).sum()
    return lambda: loss_of(model, model.config, work.batch, work.objective, draw).loss / answers


FORMS: dict[str, Callable[[Any, Work, Draw], Step]] = {
    "ar": ar,
    "ar_answer_logits": ar_answer_logits,
    "published": published,
    "ours": ours,
}

STOCK_ATTENTION = "sdpa"
OUR_ATTENTION = "auto"  # what the trainer takes by default, on every kind of device


def choose_attention(model: Any, form: str) -> str:
    """Sets the attention implementation that a form runs on, ours as the trainer does and all others the stock one; returns
    its name."""
    return choose(model.language_model, OUR_ATTENTION if form == "ours" else STOCK_ATTENTION, model.language_model.device)


# --- pieces of the published form ------------------------------------------------------------------------------------------


def filled_up(row_BL: torch.Tensor, block_size: int, value: int) -> torch.Tensor:
    """The row with as many `value` behind it as its last block lacks."""
    return functional.pad(row_BL, (0, -row_BL.shape[1] % block_size), value=value)


def full_length_noise(work: Work, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise that `ours` draws, laid out over whole blocks from token 0 to the end of the answer's last block: masked
    (bool) and the probability of masking (fp64, 1 where nothing can be masked)."""
    answer, objective = work.batch["answer_index"], work.objective
    block = block_index(answer, objective.block_size, objective.grid)
    stream = noisy_stream(answer, block, objective.block_size, objective.grid)
    (corruption,) = corrupt(stream, objective, draw, work.batch["sample"])
    whole = filled_up(answer, objective.block_size, 0)
    masked_BL = torch.zeros_like(whole, dtype=torch.bool).scatter(1, stream.position, corruption.masked)
    t_BL = torch.ones(whole.shape, dtype=torch.float64, device=whole.device).scatter(1, stream.position, corruption.p)
    return masked_BL, t_BL


def doubled_mask(length: int, block_size: int, context: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The mask of [noisy ; clean], additive, [1, 1, 2L, 2L]: a noisy token sees its noisy block and the clean blocks before
    it; a clean one sees the clean blocks up to its own (or, with causal context, the clean tokens up to itself)."""
    index = torch.arange(length, device=device)
    block = torch.div(index, block_size, rounding_mode="floor")
    own, before = block[:, None] == block[None], block[None] < block[:, None]
    clean = own | before if context == "block" else index[None] <= index[:, None]
    allowed = torch.cat([torch.cat([own, before], 1), torch.cat([torch.zeros_like(clean), clean], 1)])
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, torch.finfo(dtype).min)[None, None]
