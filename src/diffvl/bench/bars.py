"""What the figures are held against: ratios of `ours` to the other forms, per kind of device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SHAPE = "L3000-R300"


@dataclass(frozen=True)
class Bar:
    """`ours` over `form` in `figure` (a key of a row) must not exceed `limit`."""

    figure: str
    form: str
    limit: float


BARS = {
    "cpu": (
        Bar("step_seconds", "published", 0.40),
        Bar("peak_bytes", "published", 0.45),
        Bar("step_seconds", "ar", 1.0),
        Bar("step_seconds", "ar_answer_logits", 1.2),
    ),
    "cuda": (Bar("step_seconds", "published", 0.35), Bar("step_seconds", "ar", 1.0)),
}
NAMES = {"step_seconds": "time", "peak_bytes": "peak memory"}


@dataclass(frozen=True)
class Verdict:
    """value and met are None where the rows do not hold both figures."""

    text: str
    limit: float
    value: float | None
    met: bool | None


def verdicts(rows: Sequence[dict[str, Any]], device: str) -> list[Verdict]:
    """Every bar of a kind of device ("cpu" or "cuda") against the rows of a run."""
    found = []
    for bar in BARS[device]:
        value = ratio(rows, SHAPE, bar.figure, "ours", bar.form)
        met = None if value is None else value <= bar.limit
        found.append(Verdict(f"{NAMES[bar.figure]}, ours / {bar.form}, {SHAPE}", bar.limit, value, met))
    return found


def ratio(rows: Sequence[dict[str, Any]], shape: str, figure: str, form: str, other: str) -> float | None:
    """A figure of one form over that of another at a shape; None where one of them was not measured."""
    values = {row["form"]: row[figure] for row in rows if row["shape"] == shape}
    if values.get(form) is None or values.get(other) is None:
        return None
    return values[form] / values[other]
