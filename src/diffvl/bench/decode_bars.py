"""What the figures of `diffvl bench decode` are held against: forwards exactly, ratios of tokens per second, time per forward."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_SIZE = 8  # the bars of speed are set for this one
TO_PUBLISHED = {"cpu": {8: 1.0, 4: 1.1, 2: 1.1}, "cuda": {4: 1.5}}  # steps -> ours / published, batch 1
TO_AR = {"cuda": {4: 2.0}}  # steps -> ours / ar_generate, batch 1
BATCH, BATCH_GAIN = 8, 1.8  # tokens/s of ours at this batch over batch 1, on a CPU
FLOOR_STEPS, OVER_FLOOR = 4, 1.5  # time per forward of ours over weight streaming, batch 1, on CUDA

Row = dict[str, Any]


@dataclass(frozen=True)
class DecodeVerdict:
    """relation: "=", ">=" or "<=", how `value` must stand to `limit`. value and met are None where the rows do not hold it."""

    text: str
    relation: str
    limit: float
    value: float | None

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        if self.relation == "=":
            return self.value == self.limit
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit


def decode_verdicts(rows: Sequence[Row], device: str, floor_seconds: float) -> list[DecodeVerdict]:
    """Every bar of a kind of device ("cpu" or "cuda") against the rows of a run.

    Args:
        floor_seconds: weights of a forward over the measured bandwidth.
    """
    best = device == "cuda"  # there `ours` is its compiled form, and AR transformers' generate as it comes
    found = [_forwards(row) for row in rows if row["decoder"] != "ar_generate"]
    for steps, limit in TO_PUBLISHED[device].items():
        own, other = _speed(rows, "ours", 1, steps, best), _speed(rows, "published", 1, steps)
        found.append(_ratio(f"tokens/s, ours / published, {steps} steps, batch 1", limit, own, other))
    for steps, limit in TO_AR.get(device, {}).items():
        own, other = _speed(rows, "ours", 1, steps, best), _speed(rows, "ar_generate", 1, None)
        found.append(_ratio(f"tokens/s, ours / ar_generate, {steps} steps, batch 1", limit, own, other))
    if device == "cpu":
        for steps in TO_PUBLISHED["cpu"]:
            many, one = _speed(rows, "ours", BATCH, steps), _speed(rows, "ours", 1, steps)
            found.append(_ratio(f"tokens/s, ours, batch {BATCH} / batch 1, {steps} steps", BATCH_GAIN, many, one))
    else:
        row = row_of(rows, "ours", 1, FLOOR_STEPS, best)
        value = None if row is None or row["forward_seconds"] is None else row["forward_seconds"] / floor_seconds
        text = f"time per forward, ours / weight streaming, {FLOOR_STEPS} steps, batch 1"
        found.append(DecodeVerdict(text, "<=", OVER_FLOOR, value))
    return found


def _forwards(row: Row) -> DecodeVerdict:
    """d forwards for d denoising steps; the published loop makes one more for every block. A prefill of its own is left out."""
    extra = row["blocks"] if row["decoder"] == "published" else 0
    compiled = " compiled" if row["compiled"] else ""
    text = f"forwards, {row['decoder']}{compiled}, {row['steps']} steps, batch {row['batch']}, {row['blocks']} blocks"
    return DecodeVerdict(text, "=", row["steps_due"] + extra, row["forwards"] - row["prefill_forwards"])


def _ratio(text: str, limit: float, one: float | None, other: float | None) -> DecodeVerdict:
    return DecodeVerdict(text, ">=", limit, None if one is None or other is None else one / other)


def _speed(rows: Sequence[Row], decoder: str, batch: int, steps: int | None, compiled: bool = False) -> float | None:
    """Tokens per second at block size 8."""
    row = row_of(rows, decoder, batch, steps, compiled)
    if row is None or (decoder != "ar_generate" and row["block_size"] != BLOCK_SIZE):
        return None
    return row["tokens_per_second"]


def row_of(rows: Sequence[Row], decoder: str, batch: int, steps: int | None, compiled: bool = False) -> Row | None:
    """The row of a decoder at a batch size; `steps` None takes whatever it has (AR has one). `compiled`: its compiled form, where
    that was measured; else its plain one."""
    found = [row for row in rows if row["decoder"] == decoder and row["batch"] == batch and steps in (None, row["steps"])]
    wanted = [row for row in found if row["compiled"] == compiled]
    return (wanted or found or [None])[0]
