"""Which clean tokens see each other both ways: those of an image, where a model wants it.

Shapes: B batch, L and T tokens.
"""

import torch


def answer_cells(block: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """True at the first token of every block that holds tokens of an answer, [B, L]."""
    first = block != torch.roll(block, 1, 1)
    first[:, 0] = True
    number = first.long().cumsum(1) - 1
    holds = torch.zeros_like(answer).scatter_add_(1, number, (answer > 0).long())
    return first & (holds.gather(1, number) > 0)


def span_ids(
    is_image: torch.Tensor, answer: torch.Tensor, valid: torch.Tensor, cut: torch.Tensor, image_attention: str
) -> torch.Tensor | None:
    """The span of each clean token, [B, T]: 0 for none, else counted from 1; None where no tokens see each other so.

    Args:
        is_image: image tokens. answer: 0 outside, k in the k-th answer. cut: True where a span may not reach across, at the
            first token of a block that holds answer tokens: what stands before it is committed before it in decoding.
    """
    if image_attention == "causal":
        return None
    inside = valid & (answer == 0) if image_attention == "prompt" else valid & is_image
    before = torch.roll(inside, 1, 1)
    before[:, 0] = False
    if image_attention.startswith("runs"):
        begins = inside & ~before
    else:  # one span from answer to answer
        turn = (answer != torch.roll(answer, 1, 1)).long()
        turn[:, 0] = 0
        turn = turn.cumsum(1)
        begins = inside & (turn != _before(turn, inside))
    return torch.where(inside, (begins | (inside & cut)).long().cumsum(1), 0)


def _before(value: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """At every token the value of the last token inside before it; -1 where there is none."""
    marked = torch.where(inside, value, -1)
    latest = marked.cummax(1).values
    shifted = torch.roll(latest, 1, 1)
    shifted[:, 0] = -1
    return shifted
