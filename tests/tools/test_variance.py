"""`python -m tools.variance`: its exact figures are what drawing gives, the sampled ones are gradients, and what it prints.

Shapes: D block size, B blocks, P parameters.
"""

import itertools
import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from helpers import QUIET

from diffvl.config.objectives import BlockDiffusionObjective, UniformNoise
from diffvl.objective.losses import Draw, block_diffusion, block_weights
from diffvl.objective.noise import mask_ratios, masked_tokens
from diffvl.seeding import sample_generator
from tools.variance import __main__ as program
from tools.variance import exact, sampled, study
from tools.variance.tables import tables

D, B = 4, 4
SEED = 4


# --- the exact table -------------------------------------------------------------------------------------------------------


def by_autograd(token_D: torch.Tensor, masked_D: torch.Tensor, coupling: float) -> torch.Tensor:
    """Gradient [P] and, last, the loss, from the model as it is described: log-odds = bias + sum over the visible tokens of the
    block of a weight for the distance, times the token."""
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    distances = range(1, len(token_D))
    start = [coupling * exact.DECAY ** (distance - 1) for distance in distances for _ in range(2)]
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # of d places after, d places before, for each d
    loss = torch.zeros((), dtype=torch.float64)
    for i in masked_D.nonzero()[:, 0].tolist():
        log_odds = bias[0]
        for distance, (side, sign) in itertools.product(distances, enumerate((1, -1))):
            j = i + sign * distance
            if 0 <= j < len(token_D) and not masked_D[j]:
                log_odds = log_odds + weights[2 * (distance - 1) + side] * token_D[j]
        loss = loss - torch.nn.functional.logsigmoid(token_D[i] * log_odds)
    if not loss.requires_grad:
        return torch.zeros(1 + len(start) + 1, dtype=torch.float64)
    gradients = torch.autograd.grad(loss, [bias, weights], materialize_grads=True)
    return torch.cat([*gradients, loss.detach()[None]])


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """[B, S, P + 1] by autograd, in the fitted state."""
    masks = [torch.tensor([bool(code >> i & 1) for i in range(D)]) for code in range(2**D)]
    return torch.stack(
        [
            torch.stack([by_autograd(token, mask, exact.COUPLING["fitted"]) for mask in masks])
            for token in exact.random_answers(1, B * D, SEED).view(B, D)
        ]
    )


def test_enumerated_sums_are_those_of_autograd(table: torch.Tensor):
    gradient, loss = exact.enumerate_masks("fitted", D, 1, B * D, SEED)
    count = torch.tensor([bin(code).count("1") for code in range(2**D)])
    opposite = table.flip(1)
    for m in range(D + 1):
        here = count == m
        torch.testing.assert_close(gradient.total[0, :, m], table[:, here, :-1].sum(1))
        torch.testing.assert_close(gradient.square[0, :, m], (table[:, here, :-1] ** 2).sum((1, 2)))
        torch.testing.assert_close(gradient.cross[0, :, m], (table[:, here, :-1] * opposite[:, here, :-1]).sum((1, 2)))
        torch.testing.assert_close(loss.total[0, :, m, 0], table[:, here, -1].sum(1))
    assert gradient.total[0, :, 2].abs().min() > 0.1


def drawn(table: torch.Tensor, draws: str, weight: str, samples: int = 6000) -> torch.Tensor:
    """The sum over a sample's blocks as noise.py and weights.py draw and weigh it, [samples, P + 1]."""
    noise = UniformNoise(t_min=0.05, t_max=0.95, draws="independent" if draws == "complementary" else draws)  # type: ignore[arg-type]
    t = torch.cat([mask_ratios(noise, torch.arange(B), B, 0.0, sample_generator(1, 0, number)) for number in range(samples)])
    p_R, everywhere = t.repeat_interleave(D), torch.ones(samples * B * D, dtype=torch.bool)
    masked_R = masked_tokens(p_R, everywhere, torch.Generator().manual_seed(2))
    block_R = torch.arange(samples * B).repeat_interleave(D)

    def summed(p: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        weight_K = block_weights(weight, p[None], masked[None], everywhere[None], block_R[None])[0].view(samples, B, D)
        # One weight for the block: that of any masked token.
        of_block = torch.where(masked.view(samples, B, D), weight_K, 0.0).amax(-1)
        code = (masked.view(samples, B, D) * 2 ** torch.arange(D)).sum(-1)
        return (of_block[..., None] * table[torch.arange(B), code]).sum(1)

    if draws != "complementary":
        return summed(p_R, masked_R)
    return (summed(p_R, masked_R) + summed(1 - p_R, ~masked_R)) / 2


def test_figures_of_several_answers_are_sums():
    """Variance over squared mean, each summed over the answers."""
    t_T = exact.quantiles(UniformNoise(draws="stratified"), 0.0)
    answers, _ = exact.enumerate_masks("fitted", 4, 3, 16, SEED)
    parts = [
        exact.Enumerated(4, *(value[i : i + 1] for value in (answers.total, answers.square, answers.cross))) for i in range(3)
    ]
    for draws in study.DRAWS:
        weights = exact.estimator(t_T, 4, draws, "1/t" if draws != "complementary" else "effective")
        signals = [float((torch.einsum("n,abnp->ap", weights.mean.mean(0), part.total) ** 2).sum()) for part in parts]
        noises = [exact.moments(part, weights).noise_to_signal * signal for part, signal in zip(parts, signals, strict=True)]
        assert exact.moments(answers, weights).noise_to_signal == pytest.approx(sum(noises) / sum(signals), rel=1e-9)


@pytest.mark.parametrize("weight", study.WEIGHTS)
@pytest.mark.parametrize("draws", study.DRAWS)
def test_exact_variance_is_that_of_drawn_estimates(draws: str, weight: str, table: torch.Tensor):
    """Of gradient and loss; within 4 standard errors of the variance, over 24 batches."""
    t_T = exact.quantiles(UniformNoise(t_min=0.05, t_max=0.95, draws="stratified"), 0.0)
    weights = exact.estimator(t_T, D, draws, weight)
    estimates = drawn(table, draws, weight)
    for masks, values in zip(
        exact.enumerate_masks("fitted", D, 1, B * D, SEED), (estimates[:, :-1], estimates[:, -1:]), strict=True
    ):
        found = exact.moments(masks, weights)
        mean = (weights.mean.mean(0)[None, :, None] * masks.total[0]).sum((0, 1))
        batches = values.view(24, -1, values.shape[1]).var(1).sum(1)
        error = float(batches.std() / math.sqrt(24))
        assert abs(float(batches.mean()) - found.noise_to_signal * float(mean @ mean)) < 4 * error
        assert ((values.mean(0) - mean).abs() < 4 * values.std(0) / math.sqrt(len(values)) + 1e-9).all()


def test_exact_bias_is_known_where_it_is_known():
    """1/t under uniform noise is the bound's; effective falls short by D / (D + 1); none has another direction."""
    t_T = exact.quantiles(UniformNoise(t_min=1e-6, draws="stratified"), 0.0)
    gradient, _ = exact.enumerate_masks("fitted", 8, 3, 64, 0)
    found = {weight: exact.moments(gradient, exact.estimator(t_T, 8, "independent", weight)) for weight in study.WEIGHTS}
    assert (found["1/t"].scale, found["1/t"].cosine) == pytest.approx((1.0, 1.0), abs=1e-3)
    assert (found["effective"].scale, found["effective"].cosine) == pytest.approx((8 / 9, 1.0), abs=1e-3)
    assert found["none"].cosine < 0.97
    weights = exact.estimator(t_T, 8, "independent", "none")
    assert (weights.masked_share, weights.blocks_without_mask) == pytest.approx((1 / 2, 1 / 9), abs=1e-4)
    both = exact.estimator(t_T, 8, "complementary", "none")
    assert (both.masked_share, both.blocks_without_mask) == (1.0, 0.0)


# --- the sampled table -----------------------------------------------------------------------------------------------------


def settings(**others: Any) -> BlockDiffusionObjective:
    return BlockDiffusionObjective.model_validate({"block_size": 4, "grid": "response", "weight": "effective", **others})


def test_gradients_of_a_batch_are_those_of_one_sample_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Two answers, each three times in a batch."""
    monkeypatch.setattr(sampled, "BATCH", 6)
    texts, model = sampled.Texts(12, 0), sampled.random_trunk(0)
    answers = [texts.sample(), texts.sample()]
    together = sampled.sample_gradients(model, answers, settings(), 0.0, 7, 2)
    names = [name for name, _ in model.language_model.named_parameters() if ".layers." in name and "proj" in name]
    weights = [model.language_model.get_parameter(name) for name in sorted(names)]
    sums, squares, masked = torch.zeros_like(together.sums), torch.zeros_like(together.squares), 0
    batch: dict[str, Any] = {**sampled.batch_of([answer for answer in answers for _ in range(3)])}
    for step, row in itertools.product(range(2), range(6)):
        alone: Any = {name: value[row : row + 1] for name, value in batch.items()} | {"row": torch.tensor([0])}
        output = block_diffusion(model, model.config, alone, settings(), Draw(7, step, 0.0))
        gradient = torch.cat([piece.flatten() for piece in torch.autograd.grad(output.loss, weights)]).double()
        sums[row // 3, step] += gradient
        squares[row // 3, step] += (gradient**2).sum()
        masked += int(output.sums["predicted"])
    torch.testing.assert_close(together.sums, sums, rtol=1e-4, atol=1e-5 * float(sums.abs().max()))
    torch.testing.assert_close(together.squares, squares, rtol=1e-4, atol=0.0)
    assert (together.draws, together.masked) == (3, masked / 12)


def test_figures_of_known_gradients():
    """Two answers with means (3, 4, 0 ...) and (0, 5, 0 ...) and unit variance in each of 50 components: 50 / 25."""
    values = torch.randn(2, 60, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, ..., 0] += 3.0
    values[0, ..., 1] += 4.0
    values[1, ..., 1] += 5.0
    known = sampled.Gradients(values.sum(2), (values**2).sum((2, 3)), draws=20, masked=0.0, tokens=0.0)
    assert known.count == 1200
    assert known.variance() == pytest.approx(50, rel=0.02)
    assert known.signal() == pytest.approx(25, abs=4 * 2 * 5 / math.sqrt(2400))
    assert known.noise_to_signal() == pytest.approx(2.0, abs=4 * known.standard_error())
    assert 0.005 < known.standard_error() < 0.05


def test_figures_against_the_bound(monkeypatch: pytest.MonkeyPatch):
    """The reference falls short of the bound by D / (D + 1), here of (4, 0); what is drawn has mean (2, 2), without scatter."""
    monkeypatch.setattr(study, "ANSWER", 16)

    def still(mean: list[float]) -> sampled.Gradients:
        sums = 10 * torch.tensor([[mean, mean]], dtype=torch.float64)
        squares = torch.full((1, 2), 10 * sum(x * x for x in mean), dtype=torch.float64)
        return sampled.Gradients(sums, squares, draws=10, masked=8.0, tokens=96.0)

    case = study.Case("fitted", 8, "uniform", "effective", "independent")
    figures = study.against_bound(case, still([2.0, 2.0]), still([4.0 * 8 / 9, 0.0]))
    expected = {"scale": 0.5, "cosine": 0.5**0.5, "masked_share": 0.5, "tokens_per_forward": 96, "noise_to_signal": 0.0}
    assert {name: getattr(figures, name) for name in expected} == pytest.approx(expected, abs=1e-9)


def test_texts_can_be_learned_and_fitting_learns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampled, "FIT_STEPS", 40)
    texts, model = sampled.Texts(16, 3), sampled.random_trunk(3)
    ids = texts.sample().ids
    successors = {int(token): int(follower) for token, follower in enumerate(texts.successor)}
    follows = sum(successors[one] == other for one, other in itertools.pairwise(ids + texts.sample().ids))
    assert follows > 0.6 * 2 * len(ids) and max(ids) < sampled.TRUNK.vocabulary - 2
    assert sampled.fit(model, texts, [settings()]) < 0.9 * math.log(sampled.TRUNK.vocabulary - 2)


# --- the program -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which the figures mean nothing."""
    monkeypatch.setattr(study, "ANSWER", 16)
    monkeypatch.setattr(study, "BLOCK_SIZES", (4, 8))
    monkeypatch.setattr(study, "WEIGHTS", ("effective",))
    monkeypatch.setattr(study, "SCHEDULES", {name: study.SCHEDULES[name] for name in ("uniform", "beta end")})
    monkeypatch.setattr(sampled, "BATCH", 8)
    monkeypatch.setattr(sampled, "FIT_STEPS", 2)


def test_the_study_and_its_tables(small: None):
    threads = torch.get_num_threads()
    found = study.measure_objectives(17, 0, QUIET)
    assert torch.get_num_threads() == threads
    assert found.settings["samples"] == 16
    assert len(found.exact) == 2 * 2 * 2 * 4 and len(found.sampled) == 4 + 4 + 2 * 4
    assert {figures.block_size for figures in found.exact} == {4, 8}
    machine, exactly, drawn_lines = tables(found)
    assert [len(exactly[1]), len(drawn_lines[1])] == [8, 4]
    for headings, lines in (machine, exactly, drawn_lines):
        assert all(len(line) == len(headings) for line in lines)
    first = next(figures for figures in found.exact if figures.draws == "synchronous")
    assert exactly[1][0][:5] == ("untrained", "4", "uniform", "effective", f"{first.noise_to_signal:.3f}")


def test_the_program_prints_one_json_object_or_tables(
    small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sampled, "BATCH", 64)
    measure = cache(study.measure_objectives)  # once for both
    monkeypatch.setattr(program, "measure_objectives", lambda samples, seed, _: measure(samples, seed, QUIET))
    program.main(["--samples", "128", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["machine", "settings", "exact", "sampled"]
    keys = {"model", "block_size", "schedule", "weight", "draws", "noise_to_signal", "scale", "cosine", "masked_share"}
    assert set(report["exact"][0]) == keys | {"loss_noise_to_signal", "blocks_without_mask"}
    assert set(report["sampled"][0]) == keys | {"standard_error", "tokens_per_forward"}
    program.main(["--samples", "128"])
    out = capsys.readouterr().out
    assert "loss strat" in out and " ± " in out


@pytest.mark.parametrize("samples", ["127", "1", "x"])
def test_too_few_samples_for_a_standard_error_are_refused(samples: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        program.main(["--samples", samples])
    assert stop.value.code == 2 and "expected a whole number from 128 on" in capsys.readouterr().err
