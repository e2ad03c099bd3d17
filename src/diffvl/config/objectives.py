"""What a stage minimises: noise schedules and objectives, as sections of a recipe.

Settings that only make sense together live in one variant, so that a setting without effect is an unknown key.
"""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from diffvl.config.section import Section

# --- noise: the law of t, the mask ratio of a block --------------------------------------------------------------------

# independent: asynchronous block-wise noise. stratified: one draw in each of K equal strata, then permuted over the K blocks.
# synchronous: one draw for all blocks, to reproduce references.
Draws = Annotated[
    Literal["independent", "stratified", "synchronous"], Field(description="how the blocks of one sample share their draws of t")
]


class _Bounded(Section):
    """Schedules whose t lies between two bounds."""

    schedule: str
    t_min: float = Field(default=1e-3, gt=0, le=1, description="lowest mask ratio")
    t_max: float = Field(default=1.0, gt=0, le=1, description="highest mask ratio")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.t_min > self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must not be above t_max ({self.t_max})")
        if self.t_min == self.t_max and getattr(self, "draws", "independent") != "independent":
            raise ValueError("draws has no effect when t_min and t_max are the same")
        return self


class UniformNoise(_Bounded):
    """t ~ U(t_min, t_max)."""

    schedule: Literal["uniform"] = "uniform"
    draws: Draws = "independent"


class ClampNoise(_Bounded):
    """t ~ U(0, 1), cut to [t_min, t_max], so that the bounds have point masses of t_min and 1 - t_max (SDAR's clamp)."""

    schedule: Literal["clamp"] = "clamp"
    draws: Draws = "independent"


class RampNoise(_Bounded):
    """DiffusionVL's draw, for parity only: block k of the N blocks of a whole sample has u = (k + U(0, 1)) / N and
    t = t_min + (t_max - t_min) u, so t grows along the sequence."""

    schedule: Literal["ramp"] = "ramp"


class BetaNoise(Section):
    """t ~ Beta(mean * C, (1 - mean) * C); mean and concentration C move with the stage's progress (SDAR-VL, PBNC)."""

    schedule: Literal["beta"] = "beta"
    mean_start: float = Field(default=0.5, gt=0, lt=1)
    mean_end: float = Field(default=0.7, gt=0, lt=1)
    concentration_start: float = Field(default=4.0, gt=0, le=1e4)
    concentration_end: float = Field(default=25.0, gt=0, le=1e4)
    curve: Literal["linear", "cosine"] = Field(default="linear", description="the way from start to end; cosine is half a wave")
    until: float = Field(default=1.0, gt=0, le=1, description="share of the stage after which the end values hold")
    t_min: float = Field(default=1e-3, gt=0, lt=1, description="draws below are raised to it, so that 1/t stays bounded")
    draws: Draws = "independent"

    @property
    def moves(self) -> bool:
        return self.mean_start != self.mean_end or self.concentration_start != self.concentration_end

    @model_validator(mode="after")
    def _curve_has_effect(self) -> Self:
        if not self.moves and (self.curve != "linear" or self.until != 1.0):
            raise ValueError("curve and until have no effect when mean and concentration end where they start")
        return self


class FullNoise(Section):
    """t = 1: every eligible token is masked."""

    schedule: Literal["full"] = "full"


Noise = Annotated[UniformNoise | ClampNoise | RampNoise | BetaNoise | FullNoise, Field(discriminator="schedule")]


def _reaches_one(noise: Noise) -> bool:
    """Tells whether 1/(1 - t) has an infinite mean: uniform laws that end at 1, and Beta laws whose second shape is 1 or less."""
    if not isinstance(noise, BetaNoise):
        return noise.schedule != "full" and noise.t_max == 1.0
    ends = ((noise.mean_start, noise.concentration_start), (noise.mean_end, noise.concentration_end))
    return any((1 - mean) * concentration <= 1 for mean, concentration in ends)


# --- objectives --------------------------------------------------------------------------------------------------------


class ArObjective(Section):
    """Next-token cross-entropy on the answers."""

    kind: Literal["ar"] = "ar"


class _Blocks(Section):
    """Objectives whose blocks may grow in the course of a stage."""

    block_size: int = Field(default=8, ge=1, le=1024, description="tokens per block, in decoding and at the end of the stage")
    block_curriculum: dict[Annotated[float, Field(ge=0, lt=1)], Annotated[int, Field(ge=1, le=1024)]] = Field(
        default={}, description="share of the stage -> block size from there on, e.g. {0.0: 4, 0.5: 8} with block_size 8"
    )

    def block_size_at(self, progress: float) -> int:
        """Gives the block size at a point of the stage, 0 to 1."""
        reached = [share for share in self.block_curriculum if share <= progress]
        return self.block_curriculum[max(reached)] if reached else self.block_size

    @property
    def largest_block(self) -> int:
        return max([self.block_size, *self.block_curriculum.values()])

    @model_validator(mode="after")
    def _curriculum_ends_at_block_size(self) -> Self:
        if not self.block_curriculum:
            return self
        shares = sorted(self.block_curriculum)
        sizes = [self.block_curriculum[share] for share in shares]
        if shares[0] != 0:
            raise ValueError(f"block_curriculum must begin at share 0.0 (it begins at {shares[0]:g})")
        if sizes[-1] != self.block_size:
            raise ValueError(
                f"block_curriculum ends with {sizes[-1]}, but block_size, with which the checkpoint decodes, is {self.block_size}"
            )
        if any(one == other for one, other in itertools.pairwise(sizes)) or len(sizes) == 1:
            raise ValueError("block_curriculum has an entry without effect: neighbouring block sizes must differ")
        return self


class BlockDiffusionObjective(_Blocks):
    """Masked-token cross-entropy on noised answer blocks (BD3-LM, SDAR-VL, DiffusionVL)."""

    kind: Literal["block_diffusion"] = "block_diffusion"
    context: Literal["block", "causal"] = Field(default="block", description="attention among clean tokens")
    grid: Literal["absolute", "response"] = Field(default="absolute", description="where the block grid has its origin")
    target: Literal["same", "shift"] = Field(default="same", description="position i predicts token i, or i-1 predicts i")
    weight: Literal["1/t", "effective", "none"] = "1/t"
    pad_weight: float = Field(default=1.0, ge=0, description="loss weight of the stop tokens that fill an answer's last block")
    normaliser: Literal["tokens", "samples"] = Field(
        default="tokens", description="what counts alike in a step: every answer token, or every sample, to reproduce a reference"
    )
    ar_weight: float = Field(default=0.0, ge=0, description="weight of a next-token loss on the clean stream")
    position_bias: float = Field(
        default=0.0, ge=-8, le=8, description="log-odds by which the last token of a block is masked more than the first"
    )
    noise: Noise = UniformNoise()
    complementary: bool = Field(
        default=False, description="a second noisy copy with the complementary masks, so that every answer token is predicted"
    )

    @model_validator(mode="after")
    def _complement_has_effect(self) -> Self:
        if self.complementary and isinstance(self.noise, FullNoise):
            raise ValueError("complementary has no effect with the schedule full: its complement masks nothing")
        if self.complementary and self.weight == "1/t" and _reaches_one(self.noise):
            raise ValueError(
                "complementary with weight 1/t needs noise that stays below t = 1: the second copy weighs 1/(1 - t), whose "
                "variance is infinite; use weight: effective, or t_max: 0.999"
            )
        return self

    @model_validator(mode="after")
    def _ar_needs_causal(self) -> "BlockDiffusionObjective":
        if self.ar_weight > 0 and self.context != "causal":
            raise ValueError("ar_weight needs context: causal (a block-causal clean stream sees the tokens it would predict)")
        if self.ar_weight > 0 and self.normaliser != "tokens":
            raise ValueError("ar_weight needs normaliser: tokens (no reference that counts by samples has a next-token loss)")
        return self

    @model_validator(mode="after")
    def _bias_has_effect(self) -> "BlockDiffusionObjective":
        if self.position_bias and self.noise.schedule == "full":
            raise ValueError("position_bias has no effect with noise.schedule: full, which masks every token")
        if self.position_bias and self.largest_block == 1:
            raise ValueError("position_bias has no effect with block_size: 1, where a block has one token")
        return self


class FullDiffusionObjective(Section):
    """Masked-token cross-entropy on answers that are noised in their place, with attention both ways (LLaDA, arXiv 2502.09992;
    Dream): the loss of diffusion language models, to which a connector is aligned."""

    kind: Literal["full_diffusion"] = "full_diffusion"
    block_size: int = Field(default=32, ge=1, le=1024, description="tokens per block in decoding; the loss knows no blocks")
    target: Literal["same", "shift"] = Field(default="same", description="position i predicts token i, or i-1 predicts i")
    weight: Literal["1/t", "effective", "none"] = "1/t"
    noise: Annotated[UniformNoise | ClampNoise | BetaNoise | FullNoise, Field(discriminator="schedule")] = Field(
        default=UniformNoise(), description="one t for each answer of a sample"
    )


# Settings of other objectives, and why a draft has no such choice.
_NO_CHOICE_OF_A_DRAFT = {
    "context": "drafts are checked by the parent, which is causal, so clean tokens always see the tokens before them",
    "ar_weight": "the parent never changes, so a next-token loss has nothing to teach",
    "target": "it is always shift: the parent itself says the first token of a draft, and no mask is spent on it",
    "grid": "a draft may begin anywhere, as in decoding",
    "noise": "every token of a draft is a mask, as in its one forward in decoding",
    "complementary": "every token of a draft is a mask, as in its one forward in decoding",
    "weight": "places are weighted by `decay`",
    "position_bias": "places are weighted by `decay`",
    "pad_weight": "nothing fills a draft up behind its answer",
}


DECAY = 0.9


class DraftObjective(_Blocks):
    """Drafts of the frozen parent's answers, by gated adapters (lossless conversion). `block_size` masks stand behind a token of
    an answer, and each is to say what the parent would say there."""

    kind: Literal["draft"] = "draft"
    block_size: int = Field(default=4, ge=1, le=64, description="masks of a draft, in decoding and at the end of the stage")
    drafts: int = Field(default=8, ge=1, le=1024, description="drafts of a sample in a step, at random places of its answers")
    decay: float = Field(default=DECAY, gt=0, le=1, description="loss weight of the k-th mask of a draft: decay ** k, k from 0")
    parent_weight: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the parent's own distribution in the loss (KL divergence); the rest is cross-entropy with the data",
    )
    forwards: Literal["auto", "one", "two"] = Field(
        default="auto",
        description="two: the clean tokens go first, without a graph, and the drafts see their keys and values. one: both in one "
        "forward. auto: two, where the trunk's cache allows it",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_such_choice(cls, given: Any) -> Any:
        found = [name for name in _NO_CHOICE_OF_A_DRAFT if isinstance(given, dict) and name in given]
        if found:
            told = "; ".join(f"{name}: {_NO_CHOICE_OF_A_DRAFT[name]}" for name in found)
            raise ValueError(f"a lossless conversion has no such setting: {told}. Leave it out")
        return given

    @model_validator(mode="after")
    def _decay_has_effect(self) -> Self:
        if self.largest_block == 1 and self.decay != DECAY:
            raise ValueError("decay has no effect with block_size: 1, where a draft has one place")
        return self


Objective = Annotated[
    ArObjective | BlockDiffusionObjective | FullDiffusionObjective | DraftObjective, Field(discriminator="kind")
]
