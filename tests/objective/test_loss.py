"""Weights and cross-entropy against numbers worked out by hand."""

import math

import torch
from helpers import objective

from diffvl.hub.layout_diffvl import block_index, noisy_stream
from diffvl.objective.losses import Draw, block_weights, corrupt, token_cross_entropy

# One row of two blocks of four (the first with a prompt token in front), and one row of one block with batch padding.
BLOCK = torch.tensor([[2, 2, 2, 2, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 0]])
ELIGIBLE = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
MASKED = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
T = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.8, 0.8, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)


def weights(kind: str) -> list[list[float]]:
    """Of the masked tokens of each row."""
    given = block_weights(kind, T, MASKED, ELIGIBLE, BLOCK)
    return [given[row, MASKED[row]].tolist() for row in range(2)]


def test_weights_by_hand():
    assert weights("none") == [[1.0, 1.0, 1.0], [1.0] * 4]
    assert weights("1/t") == [[2.0, 2.0, 5.0], [1.25] * 4]
    # effective: eligible / masked of the block. 3 of 3 + 1 prompt token, 2 masked; 4 of 4, 1 masked; all 4 masked.
    assert weights("effective") == [[1.5, 1.5, 4.0], [1.0] * 4]


def test_under_a_position_bias_each_token_counts_by_its_own_probability():
    p = torch.tensor([[0.5, 0.1, 0.25, 0.4]], dtype=torch.float64)
    masked, block = torch.tensor([[False, True, True, True]]), torch.zeros(1, 4, dtype=torch.long)
    assert block_weights("1/t", p, masked, masked, block)[0, 1:].tolist() == [10.0, 4.0, 2.5]
    assert block_weights("effective", p, masked, masked, block)[0, 1:].tolist() == [1.0] * 3


def test_effective_weight_makes_each_block_its_mean_times_its_eligible_tokens():
    """Whatever was drawn, the weights of a block that has a mask add up to its eligible tokens, and a block without one
    stays finite."""
    settings = objective(block_size=4, noise={"schedule": "uniform", "t_min": 0.05, "t_max": 0.6})
    answer = torch.zeros(4, 40, dtype=torch.long)
    for row in range(4):
        answer[row, 3 + row : 21 + 4 * row] = 1
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")
    (drawn,) = corrupt(stream, settings, Draw(0, 0, 0.0), torch.arange(4))
    given = block_weights("effective", drawn.p, drawn.masked, stream.eligible, stream.block)
    assert torch.isfinite(given).all()
    empty = 0
    for row in range(4):
        for block in stream.block[row, stream.valid[row]].unique():
            inside = (stream.block[row] == block) & stream.valid[row]
            total = given[row, inside & drawn.masked[row]].sum()
            if drawn.masked[row, inside].any():
                torch.testing.assert_close(total, stream.eligible[row, inside].sum().double(), rtol=1e-12, atol=0.0)
            else:
                empty += 1
    assert empty > 0, "the draw must leave some block without a mask"


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(3.0), 10.0], [1.0, 1.0, 1.0, -5.0]])
    forbidden = torch.tensor([False, False, False, True])
    entropy = token_cross_entropy(logits, torch.tensor([2, 0]), forbidden)
    torch.testing.assert_close(entropy, torch.tensor([math.log(6 / 3), math.log(3.0)]), rtol=1e-6, atol=1e-6)
    without = token_cross_entropy(logits, torch.tensor([2, 0]), torch.zeros(4, dtype=torch.bool))
    assert without[0] > 5.0, "the forbidden token would have had nearly all the probability"


def test_forbidden_tokens_have_no_probability_and_no_gradient():
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    forbidden = torch.zeros(8, dtype=torch.bool)
    forbidden[[3, 7]] = True
    token_cross_entropy(logits, torch.tensor([0, 1, 2, 4, 5]), forbidden).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, forbidden] == 0).all() and (logits.grad[:, ~forbidden] != 0).all()
    # A softmax over the others: the gradient of each row is p - onehot, which adds up to 0.
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(5), rtol=0.0, atol=1e-6)


def test_cross_entropy_is_taken_in_fp32():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    entropy = token_cross_entropy(logits, torch.tensor([0, 1, 2]), torch.zeros(8, dtype=torch.bool))
    assert entropy.dtype == torch.float32
    expected = -logits.double().log_softmax(-1)[torch.arange(3), torch.arange(3)]
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-6, atol=1e-6)


def test_no_rows_give_no_loss():
    logits = torch.zeros(0, 8, requires_grad=True)
    entropy = token_cross_entropy(logits, torch.zeros(0, dtype=torch.long), torch.zeros(8, dtype=torch.bool))
    assert entropy.shape == (0,) and entropy.sum().requires_grad
