"""The law of t and of the masks: marginals, how blocks share their draws, the curriculum, position bias, determinism.

Marginals are compared with laws written here (Kolmogorov-Smirnov, no code of noise.py); every statistic also meets a law that
it must reject. Seeds are fixed; the levels are those of the statistic.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import objective
from pydantic import TypeAdapter

from diffvl.config.objectives import BetaNoise, BlockDiffusionObjective, ClampNoise, FullNoise, Noise, RampNoise, UniformNoise
from diffvl.hub.layout_diffvl import NoisyStream, block_index, noisy_stream
from diffvl.objective.losses import Corruption, Draw, corrupt
from diffvl.objective.noise import beta_curriculum, mask_probabilities, mask_ratios, masked_tokens, noise_state
from diffvl.seeding import sample_generator

MANY = 4000
DRAWS = ("independent", "stratified", "synchronous")
Law = Callable[[torch.Tensor], torch.Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ratios(noise: Noise, blocks: int, progress: float = 0.5, seed: int = 0) -> torch.Tensor:
    """t of the first `blocks` blocks of a sample that has no others."""
    return mask_ratios(noise, torch.arange(blocks), blocks, progress, generator(seed))


def over_samples(noise: Noise, blocks: int, samples: int, progress: float = 0.5) -> torch.Tensor:
    """t of samples drawn one by one, as batch size 1 draws them, [samples, blocks]."""
    index = torch.arange(blocks)
    return torch.stack([mask_ratios(noise, index, blocks, progress, sample_generator(0, 7, i)) for i in range(samples)])


def kolmogorov_smirnov(x: torch.Tensor, law: Law) -> float:
    """Probability that independent draws from `law`, a continuous distribution function, lie as far from it as `x` does
    (Kolmogorov's limit with Stephens' correction for the number of draws)."""
    at, count = law(x.sort().values), len(x)
    rank = torch.arange(count, dtype=torch.float64) / count
    distance = float(torch.maximum(at - rank, rank + 1 / count - at).max())
    scaled = (math.sqrt(count) + 0.12 + 0.11 / math.sqrt(count)) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


def beta_law(alpha: float, beta: float) -> Law:
    """Beta's distribution function by the midpoint rule, from each end to 1/2; at an end whose shape is below 1 in
    s = x^shape, which takes the infinite density away."""
    cells = 20_000
    log_total = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)

    def lower(a: float, b: float, x: torch.Tensor) -> torch.Tensor:
        """For x up to 1/2."""
        power = min(a, 1.0)
        top = 0.5**power
        middle = (torch.arange(cells, dtype=torch.float64) + 0.5) * top / cells
        log_density = (a / power - 1) * middle.log() + (b - 1) * torch.log1p(-(middle ** (1 / power)))
        mass = (log_density - log_total).exp() * top / cells / power
        summed = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
        place = x**power / top * cells
        cell = place.floor().clamp(0, cells - 1).long()
        return summed[cell] + (place - cell) * (summed[cell + 1] - summed[cell])

    half = torch.tensor([0.5], dtype=torch.float64)
    assert float(lower(alpha, beta, half) + lower(beta, alpha, half)) == pytest.approx(1.0, abs=1e-6)
    return lambda x: torch.where(x < 0.5, lower(alpha, beta, x.clamp_max(0.5)), 1 - lower(beta, alpha, (1 - x).clamp(0, 0.5)))


def still_beta(alpha: float, beta: float, **settings: Any) -> BetaNoise:
    """Beta(alpha, beta) at any progress."""
    mean, total = alpha / (alpha + beta), alpha + beta
    ends = {"mean_start": mean, "mean_end": mean, "concentration_start": total, "concentration_end": total}
    return BetaNoise.model_validate({**ends, "t_min": 1e-12, **settings})


SHAPES = [(1, 1), (2, 2), (3, 1), (1, 4), (0.5, 0.5), (1.6, 0.4), (17.5, 7.5), (40, 10), (700, 300)]
LAWS: dict[str, tuple[Callable[[Any], Noise], Law]] = {
    "uniform(0.2, 0.7)": (lambda draws: UniformNoise(t_min=0.2, t_max=0.7, draws=draws), lambda x: (x - 0.2) / 0.5),
    "uniform(1e-3, 1)": (lambda draws: UniformNoise(draws=draws), lambda x: (x - 1e-3) / (1 - 1e-3)),
    "clamp(1e-12, 1)": (lambda draws: ClampNoise(t_min=1e-12, t_max=1.0, draws=draws), lambda x: x),
    **{
        f"beta{shape}": (lambda draws, shape=shape: still_beta(*shape, draws=draws), beta_law(*shape))  # type: ignore[misc]
        for shape in SHAPES
    },
}


def first_copy(stream: NoisyStream, settings: BlockDiffusionObjective, draw: Draw, samples: torch.Tensor) -> Corruption:
    """Of a batch without complementary masks, the only one."""
    (drawn,) = corrupt(stream, settings, draw, samples)
    return drawn


# --- marginals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("name", LAWS)
def test_marginal(name: str, draws: str):
    """t of one block over samples, whatever its place and however the sample's blocks share their draws."""
    make, law = LAWS[name]
    t = over_samples(make(draws), 4, 1500)
    assert t.dtype == torch.float64 and ((t > 0) & (t <= 1)).all()
    for block in (0, 3):
        assert kolmogorov_smirnov(t[:, block], law) > 0.01
    # The test can fail: a law whose distribution function differs by up to 0.07 is refused.
    assert kolmogorov_smirnov(t[:, 0], lambda x: law(x) + 0.28 * law(x) * (1 - law(x))) < 1e-4


@pytest.mark.parametrize("name", LAWS)
def test_stratified_draws_lie_between_neighbouring_quantiles(name: str):
    """The law to an accuracy that no test of independent draws has: 1e-4 in probability."""
    make, law = LAWS[name]
    at = law(ratios(make("stratified"), MANY).sort().values)
    strata = torch.arange(MANY, dtype=torch.float64) / MANY
    assert (at >= strata - 1e-4).all() and (at <= strata + 1 / MANY + 1e-4).all()


def test_a_beta_law_that_is_infinite_at_both_ends():
    """Its end cells hold much of the mass: the quantiles between are right, and the floor takes what lies below it."""
    t = ratios(still_beta(0.1, 0.3, draws="stratified", t_min=1e-3), MANY).sort().values
    law = beta_law(0.1, 0.3)
    at, strata = law(t), torch.arange(MANY, dtype=torch.float64) / MANY
    between = (t > 1e-3) & (t < 1 - 1e-6)
    assert 0.5 < float(between.double().mean()) < 0.7
    assert ((at - strata)[between] > -1e-4).all() and ((at - strata)[between] < 1 / MANY + 1e-4).all()
    assert float((t == 1e-3).double().mean()) == pytest.approx(float(law(torch.tensor([1e-3], dtype=torch.float64))), abs=5e-4)


@pytest.mark.parametrize(("mean", "concentration"), [(0.5, 4.0), (0.8, 2.0), (0.7, 25.0), (0.8, 50.0), (0.1, 8.0)])
def test_beta_mean_and_variance(mean: float, concentration: float):
    noise = still_beta(mean * concentration, (1 - mean) * concentration, draws="stratified")
    t = ratios(noise, MANY)
    assert float(t.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(t.var()) == pytest.approx(mean * (1 - mean) / (concentration + 1), rel=0.01)


def test_t_min_bounds_every_schedule():
    low = BetaNoise(mean_start=0.05, mean_end=0.05, concentration_start=1.0, concentration_end=1.0, t_min=0.02)
    t = ratios(low, MANY)
    assert float(t.min()) == 0.02 and (t > 0.02).any()
    t = ratios(UniformNoise(), MANY)
    assert 1e-3 <= float(t.min()) < 5e-3 and 0.995 < float(t.max()) <= 1.0
    assert torch.equal(ratios(FullNoise(), 5), torch.ones(5, dtype=torch.float64))
    for draws in DRAWS:
        assert ratios(UniformNoise(draws=draws), 0).shape == (0,)
    assert mask_ratios(RampNoise(), torch.arange(0), 0, 0.0, generator()).shape == (0,)


@pytest.mark.parametrize("draws", DRAWS)
def test_clamp_has_point_masses_at_its_bounds_and_is_no_rescaled_uniform(draws: Any):
    samples = 2000
    t = over_samples(ClampNoise(t_min=0.2, t_max=0.9, draws=draws), 3, samples)[:, 1]
    for bound, mass in ((0.2, 0.2), (0.9, 0.1)):
        assert abs(int((t == bound).sum()) - samples * mass) < 3.3 * math.sqrt(samples * mass * (1 - mass))
    inside = t[(t > 0.2) & (t < 0.9)]
    assert kolmogorov_smirnov(inside, lambda x: (x - 0.2) / 0.7) > 0.01
    assert float(t.min()) == 0.2 and float(t.max()) == 0.9


def test_ramp_is_the_published_draw():
    """Block k of N lies in the k-th of N equal parts, uniform inside it; a noisy block keeps its number in the whole sample."""
    noise, of = RampNoise(t_min=0.1, t_max=0.9), 20
    index = torch.tensor([3, 4, 11, 19])
    t = torch.stack([mask_ratios(noise, index, of, 0.5, sample_generator(1, 2, sample)) for sample in range(1500)])
    inside = (t - 0.1) / 0.8 * of - index
    assert ((inside >= 0) & (inside < 1)).all()
    for block in range(4):
        assert kolmogorov_smirnov(inside[:, block], lambda x: x) > 0.01
    assert abs(correlation(inside[:, 0], inside[:, 1])) < 3.3 / math.sqrt(1500), "each block has its own draw inside its part"


# --- how blocks share their draws ------------------------------------------------------------------------------------------


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])


def correlation_with_position(noise: Noise, blocks: int = 8, samples: int = 200) -> float:
    """Pearson's, over all blocks of samples drawn one by one."""
    t = over_samples(noise, blocks, samples)
    return correlation(t, torch.arange(blocks, dtype=torch.float64).expand(samples, blocks))


@pytest.mark.parametrize("draws", DRAWS)
@pytest.mark.parametrize("schedule", ["uniform", "clamp", "beta"])
def test_t_does_not_depend_on_position(schedule: str, draws: Any):
    bounds = {"t_min": 0.1, "t_max": 0.8} if schedule == "clamp" else {}
    noise = TypeAdapter(Noise).validate_python({"schedule": schedule, "draws": draws, **bounds})
    assert abs(correlation_with_position(noise)) < 3.3 / math.sqrt(8 * 200)


def test_the_correlation_with_position_can_be_seen():
    """With the ramp, and with stratified draws left in order: both are the public DiffusionVL code's t."""
    # t = (k + v) / N: the squared correlation is the share of the strata in the variance, 1 - 1 / N^2.
    assert correlation_with_position(RampNoise(t_min=1e-12)) == pytest.approx(math.sqrt(1 - 1 / 64), abs=2e-3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda count, generator: torch.arange(count))
        assert correlation_with_position(UniformNoise(draws="stratified")) > 0.98


def two_way(t: torch.Tensor, law: Law, cells: int = 4) -> float:
    """Chi-square of the table of two blocks' quantiles against independence, (cells - 1)^2 degrees of freedom."""
    place = (law(t) * cells).long().clamp(0, cells - 1)
    table = torch.zeros(cells, cells, dtype=torch.float64)
    table.index_put_((place[:, 0], place[:, 1]), torch.ones(len(t), dtype=torch.float64), accumulate=True)
    expected = table.sum(0)[None] * table.sum(1)[:, None] / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("name", ["uniform(0.2, 0.7)", "beta(1.6, 0.4)"])
def test_asynchronous_draws_are_independent_between_blocks(name: str):
    """SDAR-VL Eq. 3: t_b is i.i.d. over the blocks of a sample."""
    make, law = LAWS[name]
    samples, one_percent = 2000, 21.67  # of chi-square with 9 degrees of freedom
    independent = over_samples(make("independent"), 5, samples)
    for pair in ((0, 1), (0, 4), (2, 3)):
        assert two_way(independent[:, pair], law) < one_percent
        assert abs(correlation(independent[:, pair[0]], independent[:, pair[1]])) < 3.3 / math.sqrt(samples)
    for draws in ("stratified", "synchronous"):
        assert two_way(over_samples(make(draws), 5, samples)[:, (0, 1)], law) > 100


def test_synchronous_draws_are_one_per_sample():
    t = over_samples(UniformNoise(draws="synchronous"), 6, 50)
    assert (t == t[:, :1]).all() and len(t[:, 0].unique()) == 50


def test_stratified_draws_are_spread_and_their_correlation_is_that_of_a_permutation():
    """u = (stratum + v) / K, strata without repetition: the correlation of two blocks is -(K + 1) / K^2."""
    t = over_samples(UniformNoise(t_min=1e-12, draws="stratified"), 4, 2000)
    assert torch.equal((t * 4).floor().sort(1).values, torch.arange(4, dtype=torch.float64).expand(2000, 4))
    # The standard error of a correlation r is (1 - r^2) / sqrt(n).
    assert correlation(t[:, 0], t[:, 2]) == pytest.approx(-5 / 16, abs=3.3 * (1 - (5 / 16) ** 2) / math.sqrt(2000))


# --- the curriculum ------------------------------------------------------------------------------------------------------


def moving(**settings: Any) -> BetaNoise:
    """Mean 0.5 to 0.7, concentration 4 to 25."""
    ends = {"mean_start": 0.5, "mean_end": 0.7, "concentration_start": 4.0, "concentration_end": 25.0}
    return BetaNoise.model_validate({**ends, **settings})


def test_curriculum():
    noise = moving()
    assert beta_curriculum(noise, 0.0) == (0.5, 4.0)
    assert beta_curriculum(noise, 1.0) == pytest.approx((0.7, 25.0), abs=1e-12)
    assert beta_curriculum(noise, 0.5) == pytest.approx((0.6, 14.5), abs=1e-12)
    assert beta_curriculum(noise, -1.0) == beta_curriculum(noise, 0.0)
    assert beta_curriculum(noise, 2.0) == beta_curriculum(noise, 1.0)


def test_curriculum_along_a_cosine_and_until_a_point():
    wave = moving(curve="cosine")
    assert beta_curriculum(wave, 0.0) == (0.5, 4.0) and beta_curriculum(wave, 1.0) == pytest.approx((0.7, 25.0), abs=1e-12)
    assert beta_curriculum(wave, 0.5) == pytest.approx((0.6, 14.5), abs=1e-12)
    quarter = (1 - math.sqrt(0.5)) / 2  # slower than linear at the start
    assert beta_curriculum(wave, 0.25) == pytest.approx((0.5 + 0.2 * quarter, 4 + 21 * quarter), abs=1e-12)
    early = moving(until=0.4)
    assert beta_curriculum(early, 0.1) == pytest.approx((0.55, 9.25), abs=1e-12)
    assert beta_curriculum(early, 0.4) == beta_curriculum(early, 0.9) == pytest.approx((0.7, 25.0), abs=1e-12)


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_the_draws_follow_the_curriculum(progress: float):
    """Mean and variance of Beta(mu C, (1 - mu) C) are mu and mu (1 - mu) / (C + 1) with mu and C interpolated."""
    mean, concentration = 0.5 + 0.2 * progress, 4 + 21 * progress
    t = ratios(moving(), MANY, progress)
    deviation = math.sqrt(mean * (1 - mean) / (concentration + 1))
    assert float(t.mean()) == pytest.approx(mean, abs=3.3 * deviation / math.sqrt(MANY))
    assert float(t.std()) == pytest.approx(deviation, rel=3.3 / math.sqrt(2 * MANY))
    law = beta_law(mean * concentration, (1 - mean) * concentration)
    assert kolmogorov_smirnov(t, law) > 0.01
    another = ratios(moving(), MANY, 0.0 if progress else 1.0)
    assert kolmogorov_smirnov(another, law) < 1e-6


def test_what_a_checkpoint_records_of_the_schedule():
    assert noise_state(moving(), 0.5) == pytest.approx({"mean": 0.6, "concentration": 14.5})
    assert noise_state(moving(until=0.5), 0.5) == pytest.approx({"mean": 0.7, "concentration": 25.0})
    for still in (UniformNoise(), ClampNoise(t_min=0.1, t_max=0.9), RampNoise(), FullNoise(), still_beta(2, 2)):
        assert noise_state(still, 0.5) == {}


# --- masks ---------------------------------------------------------------------------------------------------------------


def test_masked_tokens():
    p_R = torch.tensor([0.1, 0.9, 1.0, 0.5], dtype=torch.float64).repeat_interleave(MANY)
    eligible_R = torch.ones(4 * MANY, dtype=torch.bool)
    eligible_R[-MANY:] = False
    share = masked_tokens(p_R, eligible_R, generator()).view(4, MANY).double().mean(1).tolist()
    for block, p in enumerate((0.1, 0.9)):
        assert share[block] == pytest.approx(p, abs=3.3 * math.sqrt(p * (1 - p) / MANY))
    assert share[2:] == [1.0, 0.0]


# Blocks of 4 (the first with a prompt token in front), 1, 0 of 2, 6 and 3 eligible tokens.
BLOCK_R = torch.tensor([0] * 5 + [1] + [2] * 2 + [3] * 6 + [4] * 3)
ELIGIBLE_R = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0] + [1] * 9).bool()
T_K = torch.tensor([0.3, 0.6, 0.5, 0.02, 1.0], dtype=torch.float64)


def test_without_a_bias_every_token_has_t_of_its_block():
    assert torch.equal(mask_probabilities(T_K, BLOCK_R, ELIGIBLE_R, 0.0), T_K[BLOCK_R])


@pytest.mark.parametrize("bias", [8.0, 2.5, -0.5, -8.0])
def test_position_bias(bias: float):
    """The mean over a block's eligible tokens is t, and the log-odds rise by the bias from the first to the last of them."""
    p = mask_probabilities(T_K, BLOCK_R, ELIGIBLE_R, bias)
    assert p.dtype == torch.float64
    assert torch.equal(p[~ELIGIBLE_R], T_K[BLOCK_R][~ELIGIBLE_R])
    for block, t in enumerate(T_K.tolist()):
        inside = p[(block == BLOCK_R) & ELIGIBLE_R]
        if len(inside):
            assert float(inside.mean()) == pytest.approx(t, rel=1e-13)
        if len(inside) > 1 and t < 1:
            odds = torch.logit(inside)
            assert (odds.diff() * (len(inside) - 1)).tolist() == pytest.approx([bias] * (len(inside) - 1), rel=1e-9)
            assert float(inside.max()) < 1.0
    assert mask_probabilities(torch.ones(0), torch.zeros(0, dtype=torch.long), torch.zeros(0).bool(), bias).shape == (0,)


def test_position_bias_masks_the_end_of_a_block_more_often():
    still = {"schedule": "uniform", "t_min": 0.4, "t_max": 0.4}
    settings = objective(block_size=8, grid="response", position_bias=4.0, noise=still)
    answer = torch.zeros(1, 8 * 500, dtype=torch.long)
    answer[0, :] = 1
    stream = noisy_stream(answer, block_index(answer, 8, "response"), 8, "response")
    drawn = first_copy(stream, settings, Draw(0, 0, 0.0), torch.tensor([0]))
    masked, p = drawn.masked.view(500, 8).double().mean(0), drawn.p.view(500, 8)
    assert torch.equal(p, p[:1].expand(500, 8)) and (p[0].diff() > 0.04).all()
    assert ((masked - p[0]).abs() < 3.3 * (p[0] * (1 - p[0]) / 500).sqrt()).all()


# --- determinism -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("draws", DRAWS)
def test_a_samples_noise_does_not_depend_on_its_batch(draws: str):
    """Nor on padding: only on (seed, step, sample), and for the curriculum on progress."""
    settings = objective(position_bias=1.0, noise={"schedule": "beta", "draws": draws})
    answer = torch.zeros(3, 30, dtype=torch.long)
    answer[0, 4:27], answer[1, 3:12], answer[2, 3:14] = 1, 1, 1
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")
    together = first_copy(stream, settings, Draw(3, 5, 0.4), torch.tensor([10, 11, 12]))
    assert not together.masked[~stream.eligible].any()
    for row, index in ((1, 11), (2, 12)):
        short = answer[row : row + 1, :20]
        one = noisy_stream(short, block_index(short, 4, "absolute"), 4, "absolute")
        alone = first_copy(one, settings, Draw(3, 5, 0.4), torch.tensor([index]))
        length = one.valid.shape[1]
        assert torch.equal(alone.masked[0], together.masked[row, :length])
        assert torch.equal(alone.p[0], together.p[row, :length])
    for draw in (Draw(4, 5, 0.4), Draw(3, 6, 0.4), Draw(3, 5, 0.9)):
        assert not torch.equal(first_copy(stream, settings, draw, torch.tensor([10, 11, 12])).p, together.p)
    assert not torch.equal(first_copy(stream, settings, Draw(3, 5, 0.4), torch.tensor([10, 11, 13])).p[2], together.p[2])


def test_a_resumed_run_draws_what_the_uninterrupted_one_would():
    """Curriculum and noise are functions of (seed, step, sample, progress), not of what was drawn before."""
    settings = objective(noise={"schedule": "beta", "curve": "cosine", "until": 0.8})
    answer = torch.ones(1, 40, dtype=torch.long)
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")

    def run(first: int) -> list[Corruption]:
        torch.manual_seed(first)  # of the process, which differs after a restart
        torch.rand(first)
        return [first_copy(stream, settings, Draw(0, step, step / 10), torch.tensor([step % 3])) for step in range(first, 10)]

    whole, resumed = run(0), run(6)
    for before, after in zip(whole[6:], resumed, strict=True):
        assert torch.equal(before.masked, after.masked) and torch.equal(before.p, after.p)
    assert not torch.equal(whole[0].p, whole[3].p), "the same sample at another step has other noise"


def test_t_is_one_number_per_block():
    settings = objective(block_size=4)
    answer = torch.zeros(1, 24, dtype=torch.long)
    answer[0, 3:23] = 1
    stream = noisy_stream(answer, block_index(answer, 4, "absolute"), 4, "absolute")
    t = first_copy(stream, settings, Draw(0, 0, 0.0), torch.tensor([0])).p[0]
    values = [t[stream.block[0] == block].unique() for block in stream.block[0].unique()]
    assert [len(value) for value in values] == [1] * 6
    assert len(torch.cat(values).unique()) == 6
