"""The law of t and of the masks: marginals against closed forms, independence of position, the curriculum, determinism."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import objective

from diffvl.config import BetaNoise, FullNoise, Noise, UniformNoise
from diffvl.hub.layout_diffvl import block_index, noisy_stream
from diffvl.noise import beta_curriculum, mask_ratios, masked_tokens, sample_generator
from diffvl.objective import Draw, corrupt

MANY = 4000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still_beta(alpha: float, beta: float, **settings: bool) -> BetaNoise:
    """Beta(alpha, beta) at any progress."""
    mean, total = alpha / (alpha + beta), alpha + beta
    ends = {"mean_start": mean, "mean_end": mean, "concentration_start": total, "concentration_end": total}
    return BetaNoise.model_validate({**ends, "t_min": 1e-9, **settings})


# distribution functions in closed form
LAWS: dict[str, tuple[Callable[[bool], Noise], Callable[[torch.Tensor], torch.Tensor]]] = {
    "uniform(0.2, 0.7)": (lambda s: UniformNoise(t_min=0.2, t_max=0.7, stratified=s), lambda x: (x - 0.2) / 0.5),
    "beta(1, 1)": (lambda s: still_beta(1, 1, stratified=s), lambda x: x),
    "beta(2, 2)": (lambda s: still_beta(2, 2, stratified=s), lambda x: 3 * x**2 - 2 * x**3),
    "beta(3, 1)": (lambda s: still_beta(3, 1, stratified=s), lambda x: x**3),
    "beta(1, 4)": (lambda s: still_beta(1, 4, stratified=s), lambda x: 1 - (1 - x) ** 4),
    "beta(1/2, 1/2)": (lambda s: still_beta(0.5, 0.5, stratified=s), lambda x: 2 / math.pi * x.sqrt().asin()),
}


@pytest.mark.parametrize("name", LAWS)
def test_marginal_by_quantiles(name: str):
    """Stratified draws put one t between each two neighbouring quantiles; plain draws stay near them (Kolmogorov-Smirnov)."""
    make, distribution = LAWS[name]
    strata = torch.arange(MANY, dtype=torch.float64) / MANY
    at = distribution(mask_ratios(make(True), MANY, 0.3, generator()).sort().values)
    assert (at >= strata - 1e-4).all() and (at <= strata + 1 / MANY + 1e-4).all()
    at = distribution(mask_ratios(make(False), MANY, 0.3, generator()).sort().values)
    assert (at - strata).abs().max() < 1.63 / math.sqrt(MANY)  # the 1 % point of the test
    assert (at - strata).abs().max() > 1 / MANY  # and they are draws, not the quantiles themselves


@pytest.mark.parametrize(("mean", "concentration"), [(0.5, 4.0), (0.8, 2.0), (0.7, 25.0), (0.8, 50.0), (0.1, 8.0)])
def test_beta_mean_and_variance(mean: float, concentration: float):
    noise = still_beta(mean * concentration, (1 - mean) * concentration, stratified=True)
    t = mask_ratios(noise, MANY, 0.0, generator())
    assert t.dtype == torch.float64
    assert float(t.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(t.var()) == pytest.approx(mean * (1 - mean) / (concentration + 1), rel=0.01)
    assert ((t > 0) & (t <= 1)).all()


def test_t_min_bounds_every_schedule():
    low = BetaNoise(mean_start=0.05, mean_end=0.05, concentration_start=1.0, concentration_end=1.0, t_min=0.02)
    t = mask_ratios(low, MANY, 0.5, generator())
    assert float(t.min()) == 0.02 and (t > 0.02).any()
    t = mask_ratios(UniformNoise(), MANY, 0.5, generator())
    assert 1e-3 <= float(t.min()) < 5e-3 and 0.995 < float(t.max()) <= 1.0
    assert torch.equal(mask_ratios(FullNoise(), 5, 0.5, generator()), torch.ones(5, dtype=torch.float64))
    assert mask_ratios(UniformNoise(stratified=True), 0, 0.0, generator()).shape == (0,)


def correlation_with_position(noise: Noise, blocks: int, samples: int) -> float:
    """Pearson's, over all blocks of samples drawn one by one, as batch size 1 draws them."""
    t = torch.stack([mask_ratios(noise, blocks, 0.5, sample_generator(0, 7, sample)) for sample in range(samples)])
    place = torch.arange(blocks, dtype=torch.float64).expand(samples, blocks)
    return float(torch.corrcoef(torch.stack([t.flatten(), place.flatten()]))[0, 1])


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("schedule", [UniformNoise, BetaNoise])
def test_t_does_not_depend_on_position(schedule: type[UniformNoise] | type[BetaNoise], stratified: bool):
    blocks, samples = 8, 200
    noise = schedule(stratified=stratified)
    assert abs(correlation_with_position(noise, blocks, samples)) < 3.5 / math.sqrt(blocks * samples)


def test_stratified_draws_left_in_order_would_be_caught(monkeypatch: pytest.MonkeyPatch):
    """The bug of the public DiffusionVL code: t as a ramp over the sequence."""
    monkeypatch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
    assert correlation_with_position(UniformNoise(stratified=True), 8, 50) > 0.9


def test_stratified_draws_of_one_sample_are_spread():
    t = mask_ratios(UniformNoise(t_min=1e-9, stratified=True), 8, 0.0, generator()).sort().values
    assert torch.equal((t * 8).floor(), torch.arange(8, dtype=torch.float64))


def test_curriculum():
    noise = BetaNoise(mean_start=0.5, mean_end=0.7, concentration_start=4.0, concentration_end=25.0)
    assert beta_curriculum(noise, 0.0) == (0.5, 4.0)
    assert beta_curriculum(noise, 1.0) == pytest.approx((0.7, 25.0), abs=1e-12)
    assert beta_curriculum(noise, 0.5) == pytest.approx((0.6, 14.5), abs=1e-12)
    assert beta_curriculum(noise, -1.0) == beta_curriculum(noise, 0.0)
    assert beta_curriculum(noise, 2.0) == beta_curriculum(noise, 1.0)
    early, late = (mask_ratios(noise, MANY, progress, generator()) for progress in (0.0, 1.0))
    assert float(early.mean()) == pytest.approx(0.5, abs=0.02) and float(late.mean()) == pytest.approx(0.7, abs=0.01)
    assert float(late.std()) == pytest.approx(math.sqrt(0.7 * 0.3 / 26), rel=0.05)


def test_masked_tokens():
    t_K = torch.tensor([0.1, 0.9, 1.0, 0.5], dtype=torch.float64)
    block_R = torch.arange(4).repeat_interleave(MANY)
    eligible_R = torch.ones(4 * MANY, dtype=torch.bool)
    eligible_R[-MANY:] = False
    masked = masked_tokens(t_K, block_R, eligible_R, generator())
    share = [float(masked[block_R == block].double().mean()) for block in range(4)]
    assert share[0] == pytest.approx(0.1, abs=0.02) and share[1] == pytest.approx(0.9, abs=0.02)
    assert share[2:] == [1.0, 0.0]


def test_sample_generator_is_a_function_of_its_three_numbers():
    def draw(*numbers: int) -> list[float]:
        return torch.rand(4, generator=sample_generator(*numbers)).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    drawn = [
        draw(*numbers) for numbers in ((1, 2, 3), (1, 3, 2), (2, 1, 3), (1, 2, 4), (1, 3, 3), (0, 2, 3), (12, 3, 0), (1, 23, 0))
    ]
    assert len({tuple(row) for row in drawn}) == len(drawn)
    # Neighbouring samples, steps and seeds are as unlike as any two: correlation of long draws near 0.
    base = torch.rand(MANY, generator=sample_generator(5, 6, 7))
    for numbers in ((5, 6, 8), (5, 7, 7), (6, 6, 7)):
        other = torch.rand(MANY, generator=sample_generator(*numbers))
        assert abs(float(torch.corrcoef(torch.stack([base, other]))[0, 1])) < 0.06


def test_a_samples_noise_does_not_depend_on_its_batch():
    """Nor on padding: only on (seed, step, sample), and for the curriculum on progress."""
    settings = objective(noise={"schedule": "beta", "stratified": True})
    answer = torch.zeros(3, 30, dtype=torch.long)
    answer[0, 4:27], answer[1, 3:12], answer[2, 3:14] = 1, 1, 1
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")
    together = corrupt(stream, settings, Draw(3, 5, 0.4), torch.tensor([10, 11, 12]))
    assert not together.masked[~stream.eligible].any()
    for row, index in ((1, 11), (2, 12)):
        short = answer[row : row + 1, :20]
        one = noisy_stream(short, block_index(short, 4, "absolute"), 4, "absolute")
        alone = corrupt(one, settings, Draw(3, 5, 0.4), torch.tensor([index]))
        length = one.valid.shape[1]
        assert torch.equal(alone.masked[0], together.masked[row, :length])
        assert torch.equal(alone.t[0], together.t[row, :length])
    for draw in (Draw(4, 5, 0.4), Draw(3, 6, 0.4), Draw(3, 5, 0.9)):
        assert not torch.equal(corrupt(stream, settings, draw, torch.tensor([10, 11, 12])).t, together.t)
    assert not torch.equal(corrupt(stream, settings, Draw(3, 5, 0.4), torch.tensor([10, 11, 13])).t[2], together.t[2])


def test_t_is_one_number_per_block():
    settings = objective(block_size=4)
    answer = torch.zeros(1, 24, dtype=torch.long)
    answer[0, 3:23] = 1
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")
    t = corrupt(stream, settings, Draw(0, 0, 0.0), torch.tensor([0])).t[0]
    values = [t[stream.block[0] == block].unique() for block in stream.block[0].unique()]
    assert [len(value) for value in values] == [1] * 6
    assert len(torch.cat(values).unique()) == 6
