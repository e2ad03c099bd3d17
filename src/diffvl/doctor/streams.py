"""What the probe lets a trunk read: two short conversations, clean and noisy, and the ways to run a forward over them.

Place in the flow: under `probe` and `doctor`. `Streams` is training's own form (layout, masks, positions of `diffvl.hub`);
`plain_forward` is the form that references are written in, where the rule is a function of two tokens.

Shapes: B batch, L clean length, R noisy length, T = all tokens of a row, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from diffvl.doctor.tiny_copy import FIRST_ORDINARY
from diffvl.hub.layout_diffvl import Layout, NoisyStream, attention_masks, block_index, clean_layout, for_layers, noisy_stream
from diffvl.objective.losses import noisy_layout
from diffvl.prepare.proof import PROBE_BLOCK

# Lengths of prompt, answer, prompt, answer: longer than the tiny window and chunk, cut inside blocks; the second is padded.
SAMPLES = ((9, 7, 6, 9), (6, 5))
GRID_OF = {"block": "absolute", "causal": "response"}  # both contexts and both grids in two runs


def vocabulary(trunk: PreTrainedModel) -> int:
    """Rows of the embedding table; the last stands for the mask token."""
    table: Any = trunk.get_input_embeddings()
    return table.weight.shape[0]


def text(trunk: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two random conversations: ids, answer index and valid, each [B, L]."""
    longest = max(map(sum, SAMPLES))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ORDINARY, vocabulary(trunk) - 1, (len(SAMPLES), longest), generator=generator)
    answer = torch.zeros_like(ids)
    for row, lengths in enumerate(SAMPLES):
        numbers = [(turn + 1) // 2 if turn % 2 else 0 for turn in range(len(lengths))]
        answer[row, : sum(lengths)] = torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))
    valid = torch.arange(longest)[None] < torch.tensor([[sum(lengths)] for lengths in SAMPLES])
    return ids, answer, valid


class LeakyLayout(Layout):
    """The bug to be caught: `<=` for `<`, so that a noisy token sees the clean copy of its own block."""

    def allowed(self, queries: slice = slice(None), window: int | None = None, chunk: int | None = None) -> torch.Tensor:
        q, k = ({name: row[:, places] for name, row in self.rows.items()} for places in (queries, slice(None)))
        own_block = (k["block"][:, None] == q["block"][..., None]) & (k["document"][:, None] == q["document"][..., None])
        leak = own_block & q["noisy"][..., None].bool() & ~k["noisy"][:, None].bool() & k["valid"][:, None]
        return super().allowed(queries, window, chunk) | leak


@dataclass(frozen=True)
class Streams:
    """Both streams of the probe's text with every second answer token masked; ids [B, T] belong to `layout`."""

    trunk: PreTrainedModel
    layout: Layout
    stream: NoisyStream
    ids: torch.Tensor
    clean: int

    @classmethod
    def of(cls, trunk: PreTrainedModel, context: str) -> "Streams":
        ids, answer, valid = text(trunk)
        block = block_index(answer, PROBE_BLOCK, GRID_OF[context])
        stream = noisy_stream(answer, block, PROBE_BLOCK, GRID_OF[context])
        masked = stream.eligible & (torch.arange(stream.eligible.shape[1]) % 2 == 0)
        noisy = ids.gather(1, stream.source).masked_fill(masked, vocabulary(trunk) - 1)
        layout = clean_layout(block, valid, context).joined(noisy_layout(stream, context))
        return cls(trunk, layout, stream, torch.cat([ids, noisy], 1), ids.shape[1])

    def leaking(self) -> "Streams":
        """The same with the bug in its masks."""
        layout = LeakyLayout(**self.layout.rows, context=self.layout.context)
        return Streams(self.trunk, layout, self.stream, self.ids, self.clean)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, V], of other tokens on the same layout where `ids` are given."""
        return forward(self.trunk, self.ids if ids is None else ids, self.layout).logits.float()

    def noisy_blocks(self, row: int = 0) -> list[int]:
        return self.layout.block[row, self.clean :][self.stream.valid[row]].unique().tolist()


def forward(trunk: PreTrainedModel, ids: torch.Tensor, layout: Layout, **more: Any) -> Any:
    """One pass as training does it: explicit masks and positions, no cache."""
    masks = attention_masks(text_config(trunk), layout, slice(None), torch.float32)
    return trunk(input_ids=ids, attention_mask=masks, position_ids=layout.position, use_cache=False, **more)


def text_config(trunk: PreTrainedModel) -> Any:
    return trunk.config.get_text_config(decoder=True)


@dataclass(frozen=True)
class Token:
    """id: what the model reads. place: where it stands in the probe's own rows, whose logits it is compared with."""

    id: int
    position: int
    block: int
    noisy: bool
    place: int


def tokens_of(two: Streams) -> list[Token]:
    """The first sample, both streams, without padding."""
    rows = {name: row[0].tolist() for name, row in two.layout.rows.items()}
    ids = two.ids[0].tolist()
    places = [place for place, valid in enumerate(rows["valid"]) if valid]
    return [Token(ids[at], rows["position"][at], rows["block"][at], bool(rows["noisy"][at]), at) for at in places]


def plain_forward(trunk: PreTrainedModel, tokens: list[Token], sees: Callable[[Token, Token], bool]) -> torch.Tensor:
    """Logits [T, V] of a list of tokens under a rule between two of them; windows and chunks go by position."""
    config = text_config(trunk)

    def mask(window: int | None, chunk: int | None) -> torch.Tensor:
        table = [[sees(q, k) and (not window or k.position > q.position - window)
                  and (not chunk or k.position // chunk == q.position // chunk) for k in tokens] for q in tokens]  # fmt: skip
        allowed = torch.tensor(table)[None, None]
        return allowed if config._attn_implementation == "sdpa" else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)

    output = trunk(
        input_ids=torch.tensor([[token.id for token in tokens]]),
        attention_mask=for_layers(config, mask),
        position_ids=torch.tensor([[token.position for token in tokens]]),
        use_cache=False,
    )
    return output.logits[0].float()
