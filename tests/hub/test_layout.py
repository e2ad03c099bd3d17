"""Blocks, noisy streams and masks on examples small enough to write down."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffvl.hub.layout_diffvl import Layout, block_end, block_index, clean_layout, noisy_stream, segment_start
from diffvl.hub.masks_diffvl import attention_masks

#         0  1  2  3  4  5  6  7  8  9 10 11 12 13
ANSWER = [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 0]


def row(values: list[int]) -> torch.Tensor:
    return torch.tensor([values])


def rows_of(stream: Any) -> dict[str, list]:
    """The stream's fields for its first sample, padding left out."""
    valid = stream.valid[0]
    return {name: value[0, valid].tolist() for name, value in vars(stream).items() if name != "valid"}


def test_segments():
    assert segment_start(row(ANSWER), "absolute")[0].tolist() == [0] * 6 + [6] * 7 + [13]
    assert segment_start(row(ANSWER), "response")[0].tolist() == [0] * 3 + [3] * 3 + [6] * 2 + [8] * 5 + [13]


def test_block_index_on_the_absolute_grid():
    """Cells start at 0, 4, 8, 12; the cell 4..7 is cut behind the first answer, the cell 12.. behind the second."""
    assert block_index(row(ANSWER), 4, "absolute")[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5]


def test_block_index_on_the_response_grid():
    """Every answer, and every text between answers, counts its blocks from its own start."""
    assert block_index(row(ANSWER), 4, "response")[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5]
    assert block_index(row(ANSWER), 2, "response")[0].tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8]


def test_block_index_without_answers_and_with_neighbouring_ones():
    for grid in ("absolute", "response"):
        assert block_index(row([0] * 6), 4, grid)[0].tolist() == [0, 0, 0, 0, 1, 1]
        assert block_index(row([1, 1, 2, 2, 2]), 4, grid)[0].tolist() == (
            [0, 0, 1, 1, 2] if grid == "absolute" else [0, 0, 1, 1, 1]
        )
        assert block_index(row(ANSWER), 1, grid)[0].tolist() == list(range(14))


def test_block_end():
    first, start = torch.tensor([5, 9, 8]), torch.tensor([3, 8, 8])
    assert block_end(first, start, 4, "absolute").tolist() == [8, 12, 12]
    assert block_end(first, start, 4, "response").tolist() == [7, 12, 12]


def test_noisy_stream_on_the_absolute_grid():
    """Blocks 0 (with the prompt's tail), 1 (cut after 5, filled with stops to the cell's end), 3, and 4 (filled)."""
    block = block_index(row(ANSWER), 4, "absolute")
    assert rows_of(noisy_stream(row(ANSWER), block, 4, "absolute")) == {
        "source": [0, 1, 2, 3, 4, 5, 5, 5, 8, 9, 10, 11, 12, 12, 12, 12],
        "position": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        "block": [0, 0, 0, 0, 1, 1, 1, 1, 3, 3, 3, 3, 4, 4, 4, 4],
        "eligible": [False] * 3 + [True] * 13,
        "padding_stop": [False] * 6 + [True] * 2 + [False] * 5 + [True] * 3,
    }


def test_noisy_stream_on_the_response_grid():
    block = block_index(row(ANSWER), 4, "response")
    assert rows_of(noisy_stream(row(ANSWER), block, 4, "response")) == {
        "source": [3, 4, 5, 5, 8, 9, 10, 11, 12, 12, 12, 12],
        "position": [3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15],
        "block": [1, 1, 1, 1, 3, 3, 3, 3, 4, 4, 4, 4],
        "eligible": [True] * 12,
        "padding_stop": [False] * 3 + [True] + [False] * 5 + [True] * 3,
    }


UNTRAINED = [-mark if mark == 1 else mark for mark in ANSWER]  # the first answer is context only


@pytest.mark.parametrize("grid", ["absolute", "response"])
@pytest.mark.parametrize("block_size", [2, 4, 16])
def test_an_untrained_answer_cuts_blocks_as_any_other(block_size: int, grid: str):
    """In decoding it is an earlier answer. It is not in the noisy stream, whose other blocks stay what they are."""
    assert torch.equal(block_index(row(UNTRAINED), block_size, grid), block_index(row(ANSWER), block_size, grid))
    assert torch.equal(segment_start(row(UNTRAINED), grid), segment_start(row(ANSWER), grid))
    block = block_index(row(ANSWER), block_size, grid)
    both, second = (rows_of(noisy_stream(row(marks), block, block_size, grid)) for marks in (ANSWER, UNTRAINED))
    first_of_second = int(block[0, 8])
    kept = [place for place, index in enumerate(both["block"]) if index >= first_of_second]
    assert second == {name: [values[place] for place in kept] for name, values in both.items()}
    assert any(second["eligible"]) and min(second["position"]) >= 6


def test_nothing_is_noised_where_no_answer_is_trained():
    marks = row([-mark for mark in ANSWER])
    assert noisy_stream(marks, block_index(marks, 4, "absolute"), 4, "absolute").source.shape == (1, 0)


def test_two_turns_in_one_cell():
    """Blocks as long as the whole text: each answer keeps the cell's end, and the second block starts behind the first."""
    block = block_index(row(ANSWER[:9]), 16, "absolute")
    assert block[0].tolist() == [0] * 6 + [1] * 3
    stream = rows_of(noisy_stream(row(ANSWER[:9]), block, 16, "absolute"))
    assert stream["position"] == [*range(16), *range(6, 16)]
    assert stream["block"] == [0] * 16 + [1] * 10
    assert stream["eligible"] == [False] * 3 + [True] * 13 + [False] * 2 + [True] * 8
    assert stream["source"] == [0, 1, 2, 3, 4] + [5] * 11 + [6, 7] + [8] * 8


def test_an_answer_that_fills_its_last_block_gets_no_stops():
    answer = row([0, 0, 1, 1, 0])
    stream = noisy_stream(answer, block_index(answer, 2, "absolute"), 2, "absolute")
    assert rows_of(stream)["source"] == [2, 3] and not stream.padding_stop.any()


def test_noisy_streams_of_a_batch_are_padded():
    answer = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    stream = noisy_stream(answer, block_index(answer, 2, "response"), 2, "response")
    assert stream.valid.sum(1).tolist() == [4, 2, 0]
    assert stream.source.tolist() == [[1, 2, 3, 3], [3, 3, 0, 0], [0, 0, 0, 0]]
    assert stream.eligible.tolist() == stream.valid.tolist()
    nothing = noisy_stream(answer[2:], block_index(answer[2:], 2, "response"), 2, "response")
    assert nothing.source.shape == (1, 0) and nothing.valid.shape == (1, 0)


# --- the attention rule ------------------------------------------------------------------------------------------------------


def small_layout(context: str) -> Layout:
    """Clean tokens 0 1 | 2 3 in two blocks of 2, then the noisy copy of the second, then one token of padding."""
    return Layout(
        position=row([0, 1, 2, 3, 2, 3, 0]),
        block=row([0, 0, 1, 1, 1, 1, 0]),
        noisy=torch.tensor([[False] * 4 + [True] * 3]),
        valid=torch.tensor([[True] * 6 + [False]]),
        document=row([0] * 7),
        context=context,
    )


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in line) for line in mask.tolist()]


def test_the_rule_written_out():
    assert drawn(small_layout("block").allowed()[0]) == [
        "xx.....",
        "xx.....",
        "xxxx...",
        "xxxx...",
        "xx..xx.",
        "xx..xx.",
        "......x",
    ]
    assert drawn(small_layout("causal").allowed()[0])[:4] == ["x......", "xx.....", "xxx....", "xxxx..."]
    assert drawn(small_layout("causal").allowed()[0])[4:] == drawn(small_layout("block").allowed()[0])[4:]


def test_queries_windows_and_chunks():
    layout = small_layout("causal")
    assert drawn(layout.allowed(slice(4, 6))[0]) == ["xx..xx.", "xx..xx."]
    # A window of 2 in positions: a token sees itself and the one before; the noisy token at position 2 sees position 1.
    assert drawn(layout.allowed(window=2)[0]) == ["x......", "xx.....", ".xx....", "..xx...", ".x..xx.", "....xx.", "......x"]
    assert drawn(layout.allowed(chunk=2)[0]) == ["x......", "xx.....", "..x....", "..xx...", "....xx.", "....xx.", "......x"]


def test_documents_do_not_see_each_other():
    first = clean_layout(row([0, 0]), torch.ones(1, 2, dtype=torch.bool), "block")
    second = clean_layout(row([0, 0]), torch.ones(1, 2, dtype=torch.bool), "block")
    second.document = second.document + 1
    assert drawn(first.joined(second).allowed()[0]) == ["xx..", "xx..", "..xx", "..xx"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_clean_layout_counts_positions_of_what_is_valid(side: str):
    valid = torch.tensor([[False, True, True]]) if side == "left" else torch.tensor([[True, True, False]])
    layout = clean_layout(row([0, 0, 0]), valid, "causal")
    assert layout.position[0, valid[0]].tolist() == [0, 1]
    allowed = layout.allowed()
    assert drawn(allowed[0, valid[0]]) == ([".x.", ".xx"] if side == "left" else ["x..", "xx."])
    assert allowed.any(2).all(), "a softmax over nothing"


# --- masks for stock trunks --------------------------------------------------------------------------------------------------


def config(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"_attn_implementation": "sdpa", "sliding_window": None, **settings})


def test_attention_masks_take_the_trunks_form():
    layout = small_layout("causal")
    everything = slice(None)
    plain = attention_masks(config(), layout, everything, torch.float32)
    assert plain.dtype == torch.bool and plain.shape == (1, 1, 7, 7) and torch.equal(plain[:, 0], layout.allowed())
    windowed = attention_masks(config(sliding_window=2), layout, everything, torch.float32)
    assert torch.equal(windowed[:, 0], layout.allowed(window=2))
    chunked = attention_masks(config(attention_chunk_size=2), layout, everything, torch.float32)
    assert torch.equal(chunked[:, 0], layout.allowed(chunk=2))
    kinds = config(sliding_window=2, layer_types=["sliding_attention", "full_attention"])
    both = attention_masks(kinds, layout, slice(4, 6), torch.float32)
    assert both.keys() == {"sliding_attention", "full_attention"}
    assert torch.equal(both["full_attention"][:, 0], layout.allowed(slice(4, 6)))
    assert torch.equal(both["sliding_attention"][:, 0], layout.allowed(slice(4, 6), window=2))


def test_eager_attention_gets_floats_to_add():
    layout = small_layout("block")
    mask = attention_masks(config(_attn_implementation="eager"), layout, slice(None), torch.bfloat16)
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask[:, 0] == 0.0, layout.allowed())
    assert (mask[:, 0][~layout.allowed()] == torch.finfo(torch.bfloat16).min).all()


def test_what_cannot_take_a_mask_is_refused():
    layout = small_layout("block")
    with pytest.raises(ValueError, match="attention implementation 'flash_attention_2': dense masks are for 'sdpa' and 'eager'"):
        attention_masks(config(_attn_implementation="flash_attention_2"), layout, slice(None), torch.float32)
    with pytest.raises(ValueError, match=r"layer types \['linear_attention'\] cannot take block attention; known: "):
        attention_masks(config(layer_types=["full_attention", "linear_attention"]), layout, slice(None), torch.float32)
