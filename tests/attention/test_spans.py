"""Spans whose clean tokens see each other (the images of some models): the rule written out, and every form of it the same."""

from dataclasses import replace

import pytest
import torch
from executed_masks import executed
from helpers import CONTEXTS
from torch.nn.functional import scaled_dot_product_attention

from diffvl.attention.block_mask import block_mask
from diffvl.attention.cpu import tiled_attention
from diffvl.hub.layout_diffvl import IMAGE_ATTENTION, Layout, Rope, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.hub.spans_diffvl import answer_cells, span_ids
from diffvl.objective.packing import pack

SPANNED = [rule for rule in IMAGE_ATTENTION if rule != "causal"]


def packed(context: str, rule: str) -> Layout:
    """Two samples in one row and one beside them; each has an image longer than the window, an answer, another image and another
    answer, with a noisy copy of the answers."""
    answer = torch.zeros(3, 90, dtype=torch.long)
    is_image, valid = torch.zeros_like(answer, dtype=torch.bool), torch.ones_like(answer, dtype=torch.bool)
    for line, shift in enumerate((0, 3, 6)):
        is_image[line, 5 + shift : 30 + shift] = True
        is_image[line, 33 + shift : 38 + shift] = line != 1
        answer[line, 41 + shift : 48 + shift] = 1
        is_image[line, 52 + shift : 60 + shift] = True
        answer[line, 64 + shift : 75 + shift] = 2
        valid[line, 80 + shift :] = False
    block = block_index(answer, 4, "absolute")
    stream = noisy_stream(answer, block, 4, "absolute")
    clean = clean_layout(block, valid, context)
    clean = replace(clean, span=span_ids(is_image, answer, valid, answer_cells(block, answer), rule), image_attention=rule)
    return pack(clean.joined(noisy_layout(stream, context)), torch.tensor([0, 0, 1])).layout


@pytest.mark.parametrize("window", [None, 10])
@pytest.mark.parametrize("rule", SPANNED)
@pytest.mark.parametrize("context", CONTEXTS)
def test_block_masks_and_tiles_are_the_dense_rule(context: str, rule: str, window: int | None):
    layout = packed(context, rule)
    allowed = layout.allowed(window=window)
    plain = replace(layout, image_attention="causal").allowed(window=window)
    assert bool((allowed & ~plain).any()) == (rule != "runs_sliding" or window is not None), "spans change nothing here"
    assert torch.equal(executed(block_mask(layout, 8, window), 8), allowed)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(allowed), 2, allowed.shape[-1], 8, generator=generator).requires_grad_() for _ in range(3))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    tiled = tiled_attention(torch.nn.Identity(), q, k, v, block_mask(layout, 32, window))[0].transpose(1, 2)
    torch.testing.assert_close(tiled, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", SPANNED)
@pytest.mark.parametrize("context", CONTEXTS)
def test_noisy_tokens_and_later_answers_are_no_part_of_a_span(context: str, rule: str):
    """Nothing that a token sees beyond the plain rule is noisy, belongs to an answer, or stands after one that is to come."""
    layout = packed(context, rule)
    more = layout.allowed() & ~replace(layout, image_attention="causal").allowed()
    assert layout.span is not None
    assert not more[layout.noisy.bool()].any() and not (more & layout.noisy.bool()[:, None, :]).any()
    query, key = more.nonzero()[:, 1], more.nonzero()[:, 2]
    row = more.nonzero()[:, 0]
    assert (layout.span[row, query] == layout.span[row, key]).all() and (
        layout.document[row, query] == layout.document[row, key]
    ).all()


#        0  1  2  3  4  5  6  7  8  9 10 11
IMAGE = [0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0]
ANSWER = [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2]


def spans(rule: str, cut: list[int] | None = None) -> list[int]:
    is_image, answer = torch.tensor([IMAGE]).bool(), torch.tensor([ANSWER])
    given = torch.tensor([cut or [0] * 12]).bool()
    found = span_ids(is_image, answer, torch.ones_like(is_image), given, rule)
    assert found is not None
    return found[0].tolist()


def test_what_a_span_is():
    assert spans("runs") == spans("runs_sliding") == spans("runs_beyond_window") == [0, 1, 1, 0, 2, 2, 0, 0, 0, 3, 3, 0]
    assert spans("images") == [0, 1, 1, 0, 1, 1, 0, 0, 0, 2, 2, 0], "one from answer to answer"
    assert spans("prompt") == [1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 2, 0]
    assert spans("runs", [0] * 5 + [1] + [0] * 6) == [0, 1, 1, 0, 2, 3, 0, 0, 0, 4, 4, 0], "cut where an answer's block begins"
    nothing = torch.zeros(1, 12, dtype=torch.long)
    assert span_ids(nothing.bool(), nothing, nothing.bool(), nothing.bool(), "causal") is None


def test_the_blocks_that_hold_answers():
    answer = torch.tensor([ANSWER])
    cells = answer_cells(block_index(answer, 4, "absolute"), answer)
    assert cells[0].nonzero()[:, 0].tolist() == [4, 8, 9], "a block ends with every answer"


def test_rotation_is_a_table_and_goes_on_by_one():
    """Text behind an image, padding stops of a turn that is not the last, and a sample that is shorter than its batch."""
    table = torch.tensor([[[0, 1, 1, 1, 2, 3], [0, 1, 2, 0, 0, 0]], [[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 0, 0]]])
    rope = Rope(table, torch.tensor([6, 3]))
    assert rope.at(torch.tensor([[0, 3, 6, 8], [2, 3, 4, 5]])).tolist() == [
        [[0, 1, 4, 6], [2, 3, 4, 5]],
        [[0, 3, 6, 8], [2, 3, 4, 5]],
    ]
    answer = torch.tensor([[0, 0, 0, 1, 0, 2]])
    stream = noisy_stream(answer, block_index(answer, 2, "response"), 2, "response")
    assert stream.source.tolist() == [[3, 3, 5, 5]] and stream.position.tolist() == [[3, 4, 5, 6]]
    one = rope.selected(torch.tensor([0]))
    assert one.of_stream(stream).tolist() == [[[1, 2, 3, 4]], [[3, 4, 5, 6]]], "the second turn's entry at 4 is not the stop's"
    assert Rope().at(answer).tolist() == answer.tolist() and Rope().of_stream(stream).tolist() == stream.position.tolist()
