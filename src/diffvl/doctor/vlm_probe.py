"""Two conversations with images, laid out as in training, and a tiny vision-language model in the form in which it is shipped.

Place in the flow: `vlm_checks` measures on it. Everything that a checkpoint will run is run here: the DiffVL model around the
stock one, images as rows, its own position ids, spans and masks. The references (`vlm_reference`) ask the stock model.

Shapes: B conversations, L clean length, R noisy length, T = L + R, A rotary axes, V vocabulary.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from diffvl.config.supported import image_token_id
from diffvl.doctor.timm_tower import stand_in_towers
from diffvl.doctor.tiny_copy import FIRST_ORDINARY
from diffvl.doctor.vlm_pixels import Pixels
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.images_diffvl import TOKEN_TYPES, ImageRows, Shown, placed_images
from diffvl.hub.layout_diffvl import Layout, NoisyStream, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.hub.masks_diffvl import attention_masks
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.spans_diffvl import answer_cells, span_ids
from diffvl.prepare.attention_proof import BLOCK_SIZE, GRIDS
from diffvl.prepare.source_traits import source_traits

# Below what some types use for images inside their vocabulary.
TOKENS, MASK = range(FIRST_ORDINARY, 99), 99
Piece = tuple[str, int]  # "text", "answer" (tokens) or "image" (its number)
# Images before the first answer and in the second question, where one ends inside a block. It begins so soon that the stops which
# fill up the first answer's last block have indices inside it. The other conversation has no image.
CHATS: tuple[tuple[Piece, ...], ...] = (
    (("text", 5), ("image", 0), ("text", 4), ("answer", 5), ("text", 1), ("image", 1), ("answer", 9)),
    (("text", 6), ("answer", 5)),
)
SINGLE: tuple[Piece, ...] = (("text", 4), ("image", 0), ("text", 2), ("image", 1), ("text", 4), ("answer", 10))
NOTHING = -1e30  # logits below it are a model's way to forbid a token
# These mark what an answer is, not what an image is, in the token types that their own forward reads.
MARKS_ANSWERS = ("paligemma",)


def shipped(source: PreTrainedModel, pixels: Pixels, image_attention: str = "causal") -> DiffVLForConditionalGeneration:
    """Puts a stock model into the form in which `prepare` writes it; it stays the same object."""
    image_id = image_token_id(source.config)
    assert image_id is not None, "refused by the static rule"
    config = DiffVLConfig(
        source_config=source.config,
        image_token_id=image_id,
        mask_token_id=MASK,
        vocabulary_size=MASK + 1,
        image_inputs=list(pixels),
        image_attention=image_attention,
        **source_traits(source),
        decoding="blocks",
        block_size=BLOCK_SIZE,
        target="same",
    )
    with stand_in_towers(), torch.device("meta"):
        model = DiffVLForConditionalGeneration(config)
    model.set_source(source)
    return model.eval()


@torch.no_grad()
def image_sizes(model: DiffVLForConditionalGeneration, pixels: Pixels) -> tuple[int, int]:
    """Counts the tokens of each of the two images."""
    counts = model.images.encode(pixels).counts
    total = sum(counts)
    return (counts[0], counts[1]) if len(counts) == 2 else (total // 2, total - total // 2)


def conversation(chat: tuple[Piece, ...], sizes: tuple[int, int], image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws a conversation, the same in every call: ids and answer index, each [L]."""
    generator = torch.Generator().manual_seed(len(chat))
    ids, answer, answers = [], [], 0
    for kind, number in chat:
        if kind == "image":
            own = torch.full((sizes[number],), image_id)
        else:
            own = torch.randint(TOKENS.start, TOKENS.stop, (number,), generator=generator)
        answers += kind == "answer"
        ids.append(own)
        answer.append(torch.full_like(own, answers if kind == "answer" else 0))
    return torch.cat(ids), torch.cat(answer)


@dataclass(frozen=True)
class VlmProbe:
    """Both streams of the conversations, every second answer token masked.

    ids, image_index [B, T] and rope [B, T] or [A, B, T] belong to `layout`; their first `clean_length` columns are the clean
    stream.
    """

    model: DiffVLForConditionalGeneration
    pixels: Pixels
    rows: ImageRows
    layout: Layout
    stream: NoisyStream
    ids: torch.Tensor
    image_index: torch.Tensor
    rope: torch.Tensor
    clean_length: int

    @classmethod
    @torch.no_grad()
    def make(cls, model: DiffVLForConditionalGeneration, pixels: Pixels, context: str) -> "VlmProbe":
        """Lays the conversations out for a context, "block" or "causal", by the steps of the objective."""
        config, grid = model.config, GRIDS[context]
        config.context, config.grid = context, grid
        rows = model.images.encode(pixels)
        ids, answer, valid = _padded(model, image_sizes(model, pixels))
        block = block_index(answer, BLOCK_SIZE, grid)
        stream = noisy_stream(answer, block, BLOCK_SIZE, grid)
        clean = clean_layout(block, valid, context)
        clean.image_attention = config.image_attention
        is_image = ids == config.image_token_id
        clean.span = span_ids(is_image, answer, valid, answer_cells(block, answer), config.image_attention)
        numbers = model.images.rope(ids, valid, pixels, Shown([2, 0], [0, 0]))
        masked = stream.eligible & (torch.arange(stream.eligible.shape[1]) % 2 == 0)
        shown = placed_images(ids, config, valid)
        return cls(
            model,
            pixels,
            rows,
            clean.joined(noisy_layout(stream, context)),
            stream,
            torch.cat([ids, ids.gather(1, stream.source).masked_fill(masked, MASK)], 1),
            torch.cat([shown, shown.gather(1, stream.source).masked_fill(masked, -1)], 1),
            torch.cat([numbers.at(clean.position), numbers.of_stream(stream)], -1),
            ids.shape[1],
        )

    @property
    def source(self) -> Any:
        return self.model.source

    def forward(self, encode: bool = False, **more: Any) -> Any:
        """Runs one pass as training does it, over rows that are there already or, with `encode`, the vision part as well; gives
        what the model gives."""
        masks = attention_masks(self.model.config.text_config, self.layout, slice(None), torch.float32)
        images: dict[str, Any] = dict(self.pixels) if encode else {"rows": self.rows}
        return self.model(self.ids, **images, image_index=self.image_index, attention_mask=masks, position_ids=self.rope, **more)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Runs the model: [B, T, V] in fp32."""
        return permitted(self.forward().logits)

    def changed(self, **parts: Any) -> "VlmProbe":
        """Puts other ids, images or another layout in the place of its own."""
        return replace(self, **parts)

    def noisy_blocks(self, row: int = 0) -> list[int]:
        """Lists the noisy blocks of one conversation."""
        return self.layout.block[row, self.clean_length :][self.stream.valid[row]].unique().tolist()

    def is_clean(self) -> torch.Tensor:
        """Marks the clean stream, bool [T]."""
        return torch.arange(self.ids.shape[1]) < self.clean_length

    def own_block(self, block: int) -> torch.Tensor:
        """Marks the noisy tokens of a block, bool [B, T]."""
        return (self.layout.block == block) & self.layout.noisy.bool() & self.layout.valid


def _padded(model: DiffVLForConditionalGeneration, sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gives ids, answer index and valid of the conversations, each [B, L]."""
    drawn = [conversation(chat, sizes, model.config.image_token_id) for chat in CHATS]
    lengths = torch.tensor([len(ids) for ids, _ in drawn])
    ids, answer = (torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*drawn, strict=True))
    return ids, answer, torch.arange(ids.shape[1])[None] < lengths[:, None]


def permitted(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, with zeros where a model forbids a token by the smallest number there is."""
    logits = logits.float()
    return torch.where(logits < NOTHING, 0.0, logits)


def token_types(source: Any, ids: torch.Tensor, answer: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gives the token types that a processor would, under every name that a stock forward asks for."""
    known = inspect.signature(type(source).forward).parameters
    marked = answer > 0 if source.config.model_type in MARKS_ANSWERS else ids == image_token_id(source.config)
    return {name: marked.long() for name in TOKEN_TYPES if name in known}
