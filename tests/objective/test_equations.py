"""The equations of docs/objective.md on a table model: expectations and variances against exact values.

A block of N tokens; the table gives, for each of its 2^N masks and each masked token, a loss and a gradient (component 0, and the
others). Every mask can be enumerated, so that the exact value of each estimate is known; the estimates themselves are drawn and
weighed by noise.py and loss.py. "near" is within 4 standard errors in every component, "far" beyond 10 in one.

Shapes: N tokens of a block, S = 2^N masks, K blocks drawn, C components, B blocks of a sample, T points on the axis of t.
"""

import math
from typing import Any

import pytest
import torch

from diffvl.config.objectives import BetaNoise, UniformNoise
from diffvl.objective.losses import block_weights
from diffvl.objective.noise import mask_probabilities, mask_ratios, masked_tokens
from diffvl.seeding import sample_generator

N, COMPONENTS = 4, 4
MASK_SN = torch.tensor([[(code >> i) & 1 for i in range(N)] for code in range(2**N)], dtype=torch.float64)
COUNT_S = MASK_SN.sum(1).long()


def table(seed: int = 3) -> torch.Tensor:
    """[S, N, C], zero where the token is visible. Tokens differ, and what they give grows with the number of masked ones."""
    generator = torch.Generator().manual_seed(seed)
    own, slope = torch.randn(2, N, COMPONENTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(2**N, N, COMPONENTS, generator=generator, dtype=torch.float64)
    values = 1 + own + (1 + slope.abs()) * COUNT_S[:, None, None] / N + 0.3 * noise
    return values * MASK_SN[:, :, None]


TABLE = table()


# --- exact values ----------------------------------------------------------------------------------------------------------


def probability_of_masks(p_TN: torch.Tensor) -> torch.Tensor:
    """[T, S]: of each mask, when token i is masked with p_i."""
    return torch.where(MASK_SN[None] > 0, p_TN[:, None], 1 - p_TN[:, None]).prod(-1)


def at_count(m: int) -> torch.Tensor:
    """The loss on a corruption with m of N tokens masked: N / m times the mean sum over such masks, [C]."""
    return N / m * TABLE[m == COUNT_S].sum(1).mean(0)


def nelbo() -> torch.Tensor:
    """Of a block, [C]. The integral of (1/t) E[sum over masked] over t in (0, 1) gives every number of masks from 1 to N the
    same weight."""
    return torch.stack([at_count(m) for m in range(1, N + 1)]).mean(0)


def weights_of(kind: str, t_T: torch.Tensor) -> torch.Tensor:
    """[T, S], written again for the table."""
    if kind == "1/t":
        return 1 / t_T[:, None].expand(-1, 2**N)
    row = torch.ones(2**N, dtype=torch.float64) if kind == "none" else N / COUNT_S.clamp_min(1)
    return row.expand(len(t_T), -1)


def axis(low: float, high: float, points: int = 4000) -> torch.Tensor:
    """Midpoints of equal steps: an average over them is one over U(low, high)."""
    return low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points


def moments(kind: str, t_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one block's weighted sum at each t: mean [T, C] and mean squared norm [T]."""
    share = probability_of_masks(t_T[:, None].expand(-1, N))
    weight, sums = weights_of(kind, t_T), TABLE.sum(1)
    return (share * weight) @ sums, (share * weight**2) @ (sums**2).sum(1)


# --- drawn estimates -----------------------------------------------------------------------------------------------------


def drawn(kind: str, t_K: torch.Tensor, bias: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and weighs one block for each t; returns its number of masks [K] and its weighted sum [K, C]."""
    blocks = len(t_K)
    block_R, eligible_R = torch.arange(blocks).repeat_interleave(N), torch.ones(blocks * N, dtype=torch.bool)
    p_R = mask_probabilities(t_K, block_R, eligible_R, bias)
    masked_R = masked_tokens(p_R, eligible_R, torch.Generator().manual_seed(seed))
    return masked_R.view(blocks, N).sum(1), weighed(kind, p_R, masked_R)


def weighed(kind: str, p_R: torch.Tensor, masked_R: torch.Tensor) -> torch.Tensor:
    """[K, C]: the weighted sums of blocks with these masks."""
    blocks = len(p_R) // N
    block_R = torch.arange(blocks).repeat_interleave(N)
    weight_R = block_weights(kind, p_R[None], masked_R[None], torch.ones_like(masked_R)[None], block_R[None])[0]
    code_K = (masked_R.view(blocks, N) * 2 ** torch.arange(N)).sum(1)
    return (TABLE[code_K] * (weight_R * masked_R).view(blocks, N, 1)).sum(1)


def uniform(blocks: int, t_min: float = 1e-3, t_max: float = 1.0, draws: Any = "independent", seed: int = 1) -> torch.Tensor:
    noise = UniformNoise(t_min=t_min, t_max=t_max, draws=draws)
    return mask_ratios(noise, torch.arange(blocks), blocks, 0.0, torch.Generator().manual_seed(seed))


def errors(estimates_KC: torch.Tensor, exact_C: torch.Tensor) -> torch.Tensor:
    """Distance of the mean from the exact value, in standard errors, [C]; rounding counts as one."""
    return (estimates_KC.mean(0) - exact_C).abs() / (estimates_KC.std(0) / math.sqrt(len(estimates_KC))).clamp_min(1e-9)


def near(estimates_KC: torch.Tensor, exact_C: torch.Tensor) -> bool:
    return float(errors(estimates_KC, exact_C).max()) < 4


def far(estimates_KC: torch.Tensor, exact_C: torch.Tensor) -> bool:
    return float(errors(estimates_KC, exact_C).max()) > 10


# --- weights ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", range(1, N + 1))
def test_on_the_realised_corruption_effective_is_unbiased_and_one_over_t_is_not(m: int):
    """SDAR-VL, Eq. 6 and 7, Lemmas 3 and 4. Given that m tokens of the block are masked, the loss is `at_count(m)`;
    1/t is off by the factor m / (N t)."""
    t = 0.4
    t_K = torch.full((40_000,), t, dtype=torch.float64)
    count, effective = drawn("effective", t_K)
    _, inverse = drawn("1/t", t_K)
    assert near(effective[count == m], at_count(m))
    assert near(inverse[count == m], m / (N * t) * at_count(m)) and far(inverse[count == m], at_count(m))


def test_one_over_t_is_unbiased_for_the_bound_under_uniform_noise():
    """BD3-LM, Eq. 8. The floor of 1e-3 under t moves the exact value by less than a thousandth."""
    mean_TC, _ = moments("1/t", axis(1e-3, 1.0))
    torch.testing.assert_close(mean_TC.mean(0), nelbo(), rtol=2e-3, atol=0.0)
    _, inverse = drawn("1/t", uniform(200_000))
    assert near(inverse, mean_TC.mean(0))
    _, plain = drawn("none", uniform(200_000))
    assert far(plain, nelbo()) and near(plain, moments("none", axis(1e-3, 1.0))[0].mean(0))


def test_effective_under_uniform_noise_is_the_bound_over_blocks_that_have_a_mask():
    """Every number of masks from 0 to N has probability 1 / (N + 1), and none gives nothing: so the estimate is N / (N + 1) of
    the bound, the same factor for every component, and exactly the bound over the blocks with a mask."""
    count, effective = drawn("effective", uniform(100_000, t_min=1e-9))
    assert near(effective, N / (N + 1) * nelbo()) and far(effective, nelbo())
    assert near(effective[count > 0], nelbo())


@pytest.mark.parametrize("shape", [(1.6, 0.4), (2.0, 2.0), (17.5, 7.5)])
def test_under_beta_noise_effective_weighs_the_numbers_of_masks_by_their_frequency(shape: tuple[float, float]):
    """Beta-binomial, so no longer the bound: under a high mean the few-masks-left case hardly counts."""
    a, b = shape

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    share = [math.comb(N, m) * math.exp(log_beta(a + m, b + N - m) - log_beta(a, b)) for m in range(N + 1)]
    assert sum(share) == pytest.approx(1.0)
    ends = {"mean_start": a / (a + b), "mean_end": a / (a + b), "concentration_start": a + b, "concentration_end": a + b}
    noise = BetaNoise.model_validate({**ends, "t_min": 1e-9})
    t_K = mask_ratios(noise, torch.arange(60_000), 60_000, 0.5, torch.Generator().manual_seed(2))
    count, effective = drawn("effective", t_K)
    for m in range(N + 1):
        assert abs(int((count == m).sum()) - 60_000 * share[m]) < 4 * math.sqrt(60_000 * share[m] * (1 - share[m]))
    exact = torch.stack([share[m] * at_count(m) for m in range(1, N + 1)]).sum(0)
    assert near(effective, exact) and far(effective, (1 - share[0]) * nelbo())


@pytest.mark.parametrize("bias", [3.0, -3.0])
def test_under_a_position_bias_one_over_p_counts_every_token_once(bias: float):
    """Horvitz-Thompson: the mean is the sum over tokens of E[value | the token is masked], while one over the block's t
    counts the favoured tokens more often."""
    t_K = torch.full((60_000,), 0.4, dtype=torch.float64)
    p_N = mask_probabilities(t_K[:1], torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=torch.bool), bias)
    exact = ((probability_of_masks(p_N[None])[0][:, None, None] * TABLE) / p_N[None, :, None]).sum((0, 1))
    _, inverse = drawn("1/t", t_K, bias)
    assert near(inverse, exact)
    masked_R = masked_tokens(p_N.repeat(60_000), torch.ones(60_000 * N, dtype=torch.bool), torch.Generator().manual_seed(0))
    assert far(weighed("1/t", t_K.repeat_interleave(N), masked_R), exact)
    # Where a token's value does not depend on what else is masked, this is the block's total whatever the bias: the bound.
    own_N = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    held = masked_R.view(-1, N) * own_N
    assert near((held / p_N).sum(1, keepdim=True), own_N.sum()[None])
    assert far((held / 0.4).sum(1, keepdim=True), own_N.sum()[None])


# --- variance --------------------------------------------------------------------------------------------------------------

BLOCKS, SAMPLES, T_MIN, T_MAX = 6, 6000, 0.1, 1.0
SIGNS_OPPOSED = torch.tensor([1.0, -1.0] * (BLOCKS // 2), dtype=torch.float64)


def per_sample(kind: str, draws: str, signs_B: torch.Tensor | None = None) -> torch.Tensor:
    """The summed estimate of each sample of B blocks, [samples, C]."""
    noise = UniformNoise(t_min=T_MIN, t_max=T_MAX, draws=draws)  # type: ignore[arg-type]
    index = torch.arange(BLOCKS)
    t = torch.stack([mask_ratios(noise, index, BLOCKS, 0.0, sample_generator(5, 0, sample)) for sample in range(SAMPLES)])
    values = drawn(kind, t.flatten())[1].view(SAMPLES, BLOCKS, COMPONENTS)
    return (values if signs_B is None else values * signs_B[:, None]).sum(1)


def predicted(kind: str) -> dict[str, float]:
    """Trace of the covariance of a sample's estimate, by enumeration. With V the variance over t of a block's mean mu(t), and W
    the mean over t of its variance given t: synchronous B^2 V + B W, asynchronous B V + B W (SDAR-VL, Lemma 2: per block
    (1 - 1/B) V less); stratified from the means of mu over the strata."""
    t_T = axis(T_MIN, T_MAX, 4002)
    mean_TC, square_T = moments(kind, t_T)
    mean_C = mean_TC.mean(0)
    between = float((mean_TC**2).sum(1).mean() - (mean_C**2).sum())
    within = float((square_T - (mean_TC**2).sum(1)).mean())
    strata_BC = mean_TC.view(BLOCKS, -1, COMPONENTS).mean(1)
    # Two blocks of a sample never share a stratum.
    together = (strata_BC.sum(0) ** 2).sum() - (strata_BC**2).sum()
    covariance = float(together / (BLOCKS * (BLOCKS - 1)) - (mean_C**2).sum())
    alone = BLOCKS * (between + within)
    return {
        "independent": alone,
        "synchronous": BLOCKS**2 * between + BLOCKS * within,
        "stratified": alone + BLOCKS * (BLOCKS - 1) * covariance,
        "opposed synchronous": BLOCKS * within,
    }


def trace(estimates: torch.Tensor) -> torch.Tensor:
    return estimates.var(-2).sum(-1)


def ratio_interval(above: torch.Tensor, below: torch.Tensor, resamples: int = 400) -> tuple[float, float]:
    """99 % bootstrap interval of the ratio of two variances."""
    generator = torch.Generator().manual_seed(11)
    ratios = []
    for _ in range(resamples):
        rows = torch.randint(len(above), (2, len(above)), generator=generator)
        ratios.append(trace(above[rows[0]]) / trace(below[rows[1]]))
    low, high = torch.quantile(torch.stack(ratios), torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    return low, high


@pytest.mark.parametrize("kind", ["none", "effective", "1/t"])
def test_asynchronous_draws_lower_the_variance_by_the_predicted_ratio(kind: str):
    """SDAR-VL, Lemma 2; and stratified draws lower it further, as the strata predict."""
    exact = predicted(kind)
    independent = per_sample(kind, "independent")
    low, high = ratio_interval(per_sample(kind, "synchronous"), independent)
    assert low < exact["synchronous"] / exact["independent"] < high and low > 1
    low, high = ratio_interval(independent, per_sample(kind, "stratified"))
    gain = exact["independent"] / exact["stratified"]
    assert low < gain < high
    # Under 1/t the mean of a block hardly depends on t, so that spreading t gains too little to be seen here.
    assert low > 1 if kind != "1/t" else 1 < gain < 1.1


def test_lemma_2_needs_blocks_that_agree():
    """Its difference is the covariance of the blocks' means over a common t: where blocks pull against each other,
    synchronous draws cancel and are the better ones."""
    exact = predicted("none")
    independent = per_sample("none", "independent", SIGNS_OPPOSED)
    low, high = ratio_interval(independent, per_sample("none", "synchronous", SIGNS_OPPOSED))
    assert low < exact["independent"] / exact["opposed synchronous"] < high and low > 1


def test_complementary_masks_lower_the_variance():
    """More than a second independent copy does: every token of the block is masked in exactly one of the two."""
    t_K = uniform(8_000, 0.1, 0.9)  # of which 1 - t has the same law
    p_R, everywhere = t_K.repeat_interleave(N), torch.ones(8_000 * N, dtype=torch.bool)
    first, second = (masked_tokens(p_R, everywhere, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    for kind in ("effective", "none", "1/t"):
        complementary = (weighed(kind, p_R, first) + weighed(kind, 1 - p_R, ~first)) / 2
        independent = (weighed(kind, p_R, first) + weighed(kind, p_R, second)) / 2
        assert ratio_interval(independent, complementary)[0] > 2
        assert float(errors(complementary - independent, torch.zeros(COMPONENTS, dtype=torch.float64)).max()) < 4
