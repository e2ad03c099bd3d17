"""What the objectives count and weigh, with a model whose every prediction costs the same: cross-entropy log(V) each."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import batch, objective

from diffvl.config.objectives import ArObjective
from diffvl.data.samples import Sample
from diffvl.hub.layout_diffvl import NoisyStream, block_index, noisy_stream
from diffvl.objective.losses import Draw, ar, block_diffusion, loss_of, measure, predicting_places, rates, scores

ROWS, VOCABULARY, MASK, IMAGE = 20, 16, 14, 15  # rows 16 to 19 are spare
COST = math.log(VOCABULARY - 2)  # uniform over what may be predicted
CONFIG: Any = SimpleNamespace(
    mask_token_id=MASK,
    image_token_id=IMAGE,
    video_token_id=None,
    vocabulary_size=VOCABULARY,
    placeholder_ids=[],
    image_attention="causal",
    source_config=None,
    text_config=SimpleNamespace(_attn_implementation="sdpa"),
)
HERE = Draw(seed=1, step=2, progress=0.5)


def flat(**given: Any) -> Any:
    """The model: equal logits at the rows asked for, but those of 3 a little higher, so that it predicts 3 everywhere."""
    count = len(given["logits_rows"])
    logits = torch.zeros(count, ROWS)
    logits[:, 3] = 1e-9
    logits[:, [MASK, IMAGE, 19]] = 50.0  # what may never be predicted
    return SimpleNamespace(logits=given["row_map"](logits, slice(0, count)))


def two_samples() -> Any:
    """Answers of 6 and 3 tokens that begin at 3 and 2, the first one of the token 3 only but for its stop."""
    one = Sample([1, 2, 4, 3, 3, 3, 3, 3, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], None, 7)
    other = Sample([1, 2, 5, 6, 0, 8], [0, 0, 1, 1, 1, 0], None, 8)
    return batch([one, other])


def test_full_noise_counts_everything_once():
    """Grid of 4: answers end at 9 and 5, so 3 padding stops follow each of them."""
    settings = objective(noise={"schedule": "full"}, weight="none", pad_weight=0.25)
    output = block_diffusion(flat, CONFIG, two_samples(), settings, HERE)
    assert float(output.loss) == pytest.approx((9 + 0.25 * 6) * COST, rel=1e-5)
    sums = {name: float(value) for name, value in output.sums.items()}
    assert sums == {"predicted": 9, "eligible": 9, "correct": 5, "cross_entropy": pytest.approx(9 * COST, rel=1e-5)}
    # Through the trunk went both clean streams, the cells 0..11 of the first and 0..7 of the second.
    assert output.tokens == 9 + 6 + 12 + 8
    assert rates(sums) == {"mask_ratio": 1.0, "masked_accuracy": 5 / 9}
    assert scores(sums) == {"masked_loss": pytest.approx(COST, rel=1e-5), "masked_accuracy": 5 / 9, "tokens": 9}


@pytest.mark.parametrize("pad_weight", [0.0, 1.0])
def test_effective_weights_add_up_to_the_eligible_tokens(pad_weight: float):
    settings = objective(noise={"schedule": "full"}, weight="effective", pad_weight=pad_weight)
    output = block_diffusion(flat, CONFIG, two_samples(), settings, HERE)
    assert float(output.loss) == pytest.approx((9 + pad_weight * 6) * COST, rel=1e-5)


def test_inverse_t_is_unbiased():
    """The mean loss over draws with 1/t is that of full noise; the masks themselves are fewer."""
    settings = objective(noise={"schedule": "uniform", "t_min": 0.2, "t_max": 1.0}, weight="1/t")
    many = batch([Sample([1, 2, 4, 3, 3, 3, 3, 3, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1], None, index) for index in range(250)])
    output = block_diffusion(flat, CONFIG, many, settings, HERE)
    assert float(output.loss) / 250 == pytest.approx(9 * COST, rel=0.05)
    assert float(output.sums["predicted"]) / (250 * 6) == pytest.approx(0.6, rel=0.05)


def test_ar_loss_on_the_clean_stream_is_added():
    settings = objective(noise={"schedule": "full"}, weight="none", context="causal", ar_weight=0.5, pad_weight=0.0)
    output = block_diffusion(flat, CONFIG, two_samples(), settings, HERE)
    assert float(output.loss) == pytest.approx((9 + 0.5 * 9) * COST, rel=1e-5)
    assert float(output.sums["predicted"]) == 9


def test_ar_counts_answers_only():
    output = ar(flat, CONFIG, two_samples())
    assert float(output.loss) == pytest.approx(9 * COST, rel=1e-5)
    sums = {name: float(value) for name, value in output.sums.items()}
    assert sums == {"predicted": 9, "correct": 5, "cross_entropy": pytest.approx(9 * COST, rel=1e-5)}
    assert output.tokens == 15
    assert scores(sums)["next_token_loss"] == pytest.approx(COST, rel=1e-5)


def test_measure_has_its_own_noise_and_seed():
    """Figures of runs with different training noise compare: the same tokens are masked."""
    kinds = [{"schedule": "full"}, {"schedule": "beta"}, {"schedule": "uniform", "t_min": 0.9}]
    sums = [measure(flat, CONFIG, [two_samples(), two_samples()], objective(noise=noise)) for noise in kinds]
    assert all(found == sums[0] for found in sums)
    assert 0 < float(sums[0]["predicted"]) < float(sums[0]["eligible"]) == 18
    assert "eligible" not in measure(flat, CONFIG, [two_samples()], ArObjective())


def test_loss_of_picks_the_objective():
    assert float(loss_of(flat, CONFIG, two_samples(), ArObjective(), HERE).loss) == pytest.approx(9 * COST, rel=1e-5)
    settings = objective(noise={"schedule": "full"}, weight="none")
    assert float(loss_of(flat, CONFIG, two_samples(), settings, HERE).loss) == pytest.approx(15 * COST, rel=1e-5)


def test_predicting_places():
    """`shift`: the token before, in the noisy block where it has one there, else in the clean stream."""
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0]])
    block = block_index(answer, 4, "absolute")
    stream: NoisyStream = noisy_stream(answer, block, 4, "absolute")
    assert stream.position[0].tolist() == list(range(12))
    masked = torch.zeros(1, 12, dtype=torch.bool)
    masked[0, [3, 4, 6, 8, 9]] = True
    same = predicting_places(stream, masked, "same", 10)
    assert same[1].tolist() == [13, 14, 16, 18, 19]
    shift = predicting_places(stream, masked, "shift", 10)
    assert shift[0].tolist() == [0] * 5
    # 3: noisy 2. 4 begins a block: clean 3. 6: noisy 5. 8 begins a block: clean 7. 9, a padding stop: noisy 8.
    assert shift[1].tolist() == [12, 3, 15, 7, 18]


# --- answers that are not trained on -------------------------------------------------------------------------------------

SECOND = [0, 0, 0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 2, 0]
UNTRAINED = [-mark if mark == 1 else mark for mark in SECOND]
IDS = [1, 2, 4, 3, 3, 8, 5, 6, 3, 3, 3, 3, 8, 9]


def test_an_untrained_answer_costs_and_counts_nothing():
    """5 tokens of the second answer are left of 8; its padding stops on the grid of 4 are those of positions 13 to 15."""
    settings = objective(noise={"schedule": "full"}, weight="none", pad_weight=0.0)
    whole, half = (batch([Sample(IDS, marks, None, 7)]) for marks in (SECOND, UNTRAINED))
    assert (half["labels"] != -100).sum() == 5 and (whole["labels"] != -100).sum() == 8  # the loss normaliser
    output = block_diffusion(flat, CONFIG, half, settings, HERE)
    assert float(output.loss) == pytest.approx(5 * COST, rel=1e-5)
    assert {name: float(output.sums[name]) for name in ("predicted", "eligible", "correct")} == {
        "predicted": 5,
        "eligible": 5,
        "correct": 4,
    }
    assert output.tokens == 14 + 8  # the clean stream, and the cells 8..11 and 12..15
    next_token = ar(flat, CONFIG, half)
    assert float(next_token.loss) == pytest.approx(5 * COST, rel=1e-5) and float(next_token.sums["predicted"]) == 5
    causal = objective(noise={"schedule": "full"}, weight="none", context="causal", ar_weight=0.5, pad_weight=0.0)
    assert float(block_diffusion(flat, CONFIG, half, causal, HERE).loss) == pytest.approx(7.5 * COST, rel=1e-5)
    assert float(measure(flat, CONFIG, [half], settings)["eligible"]) == 5
