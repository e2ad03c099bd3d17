"""What a measurement gives: facts about the machine and the run, and one typed row for each thing that was compared."""

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Generic, TypeVar


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of figures; in `--json` its fields are the keys."""

    tokens_per_second: float

    @property
    def json(self) -> dict[str, Any]:
        """The row as `--json` prints it: without the fields that this row has no use for, which are those with a default."""
        idle = {one.name for one in fields(self) if one.default is not MISSING and getattr(self, one.name) == one.default}
        return {name: value for name, value in asdict(self).items() if name not in idle}


@dataclass(frozen=True, kw_only=True)
class TrainRow(Row):
    """A training form at a shape, of `diffvl bench train`.

    step_seconds: median of `seconds`, one for each round; spread: slowest less fastest, over the median. tokens_per_second counts
    the L tokens of the sample once in every form. peak_bytes, bytes_before: None where memory cannot be measured. loss: of the
    first draw. ratio_to: step_seconds over those of each other form. top_kernels: where a step's time goes, if that was asked.
    """

    form: str
    shape: str
    step_seconds: float
    peak_bytes: int | None
    attention: str
    bytes_before: int | None
    spread: float
    seconds: list[float]
    loss: float
    model_flops: float
    mfu: float
    ratio_to: dict[str, float]
    top_kernels: list[dict[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class DecodeRow(Row):
    """A decoder at a number of steps and a batch size, of `diffvl bench decode`.

    forwards_per_token counts one sample's tokens, without a prefill that predicts nothing. first_token_seconds: until the first
    token has settled. forward_seconds: the rest of the time over the rest of the forwards, None where there is no rest. seconds:
    of each round, for all prompts. blocks, steps_due: what decoding in blocks must make. equal_to_plain: for a compiled form, the
    part of its tokens that are those of the plain form. ratio_to_...: of tokens per second, None where there is nothing to
    compare with.
    """

    decoder: str
    steps: int
    compiled: bool
    block_size: int
    batch: int
    forwards_per_token: float
    first_token_seconds: float
    tokens: int
    forwards: int
    prefill_forwards: int
    forward_seconds: float | None
    seconds: list[float]
    spread: float
    blocks: int | None = None
    steps_due: int | None = None
    equal_to_plain: float | None = None
    ratio_to_ar: float | None
    ratio_to_published: float | None

    @property
    def name(self) -> str:
        return self.decoder + (" compiled" if self.compiled else "")


@dataclass(frozen=True, kw_only=True)
class AnswersRow(Row):
    """A checkpoint's answers to the questions of a file at a `threshold` (`--sweep`) or in a `mode` (`diffvl bench modes`),
    summed over all answers. seconds: of `generate`; images' features are in it, reading their files is not."""

    threshold: float | None = None
    mode: str | None = None
    tokens_per_forward: float
    exact_match: float
    edit_similarity: float
    answers: int
    tokens: int
    forwards: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DraftRow(Row):
    """A way to draft at a batch size, of `diffvl bench drafts`, summed over all answers.

    equal: answers that are those of transformers' `generate` at this batch size; equal_to_single: at the first batch size, 1 as a
    rule. accepted_per_round: tokens of a draft that were kept; accepted_by_place: of the drafts that were right so far.
    expected_ratio: what the costs of forwards and what was accepted say of `ratio_to_ar`, None where nothing was fixed.
    """

    way: str
    batch: int
    answers: int
    equal: int
    equal_to_single: int
    accepted_per_round: float | None
    accepted_by_place: list[float]
    tokens: int
    forwards: int
    tokens_per_forward: float
    seconds: float
    ratio_to_ar: float
    expected_ratio: float | None


RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Comparison(Generic[RowT]):
    """What was measured, and on what. more: further parts of the JSON object."""

    machine: dict[str, Any]
    rows: list[RowT]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {"machine": self.machine, "rows": [row.json for row in self.rows], **self.more}
