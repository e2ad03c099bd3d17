"""The form that references are written in: a forward over a list of tokens, under a rule between two of them.

Shapes: T tokens of the list, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from diffvl.hub.masks_diffvl import for_layers
from diffvl.prepare.attention_proof import ProbeText, text_config


@dataclass(frozen=True)
class Token:
    """id: what the model reads. place: where it stands in the probe's own rows, whose logits it is compared with."""

    id: int
    position: int
    block: int
    noisy: bool
    place: int


def tokens_of(probe: ProbeText) -> list[Token]:
    """Gives the first sample, both streams, without padding."""
    rows = {name: row[0].tolist() for name, row in probe.layout.rows.items()}
    ids = probe.ids[0].tolist()
    places = [place for place, valid in enumerate(rows["valid"]) if valid]
    return [Token(ids[at], rows["position"][at], rows["block"][at], bool(rows["noisy"][at]), at) for at in places]


def plain_forward(trunk: PreTrainedModel, tokens: list[Token], sees: Callable[[Token, Token], bool]) -> torch.Tensor:
    """Computes the logits [T, V] of a list of tokens under a rule between two of them; windows and chunks go by position."""
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
