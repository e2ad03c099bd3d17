"""What this project asks of its own speed: the figures of a run of `diffvl bench` against its targets.

    diffvl bench train --json > train.json && python -m tools.targets train.json
    diffvl bench decode --json > decode.json && python -m tools.targets decode.json

Prints each target of the run's kind of device, its limit, the figure, and whether it is met. Exits with 1 if one is not met; a
target that the run has no figures for is not measured, which is no failure.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvl.cli.output import print_table

Row = dict[str, Any]  # of a report, as `--json` prints it

# --- limits ----------------------------------------------------------------------------------------------------------------

TRAIN_SHAPE = "L3000-R300"
TRAIN = {  # device -> (figure, form, most of ours over that form)
    "cpu": (
        ("step_seconds", "published", 0.40),
        ("peak_bytes", "published", 0.45),
        ("step_seconds", "ar", 1.0),
        ("step_seconds", "ar_answer_logits", 1.2),
    ),
    "cuda": (("step_seconds", "published", 0.35), ("step_seconds", "ar", 1.0)),
}
FIGURES = {"step_seconds": "time", "peak_bytes": "peak memory"}

DECODE_BLOCK_SIZE = 8  # the targets of decoding speed are set for this one
TO_PUBLISHED = {"cpu": {8: 1.0, 4: 1.1, 2: 1.1}, "cuda": {4: 1.5}}  # steps -> least of ours / published, batch 1
TO_AR = {"cuda": {4: 2.0}}  # steps -> least of ours / ar_generate, batch 1
BATCH, BATCH_GAIN = 8, 1.8  # tokens/s of ours at this batch over batch 1, on a CPU
FLOOR_STEPS, OVER_FLOOR = 4, 1.5  # time per forward of ours over weight streaming, batch 1, on CUDA


@dataclass(frozen=True)
class Target:
    """One figure against its limit. relation: "=", ">=" or "<=", how `value` must stand to `limit`. value: None where the run
    does not have it."""

    text: str
    relation: str
    limit: float
    value: float | None

    @property
    def is_met(self) -> bool | None:
        """None where it was not measured."""
        if self.value is None:
            return None
        if self.relation == "=":
            return self.value == self.limit
        return self.value >= self.limit if self.relation == ">=" else self.value <= self.limit

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Text, limit, value, and whether it is met, as words."""
        met = {True: "met", False: "NOT met", None: "not measured"}[self.is_met]
        exact = self.relation == "="
        value = "-" if self.value is None else f"{self.value:{'.0f' if exact else '.3f'}}"
        return self.text, f"{self.relation} {self.limit:{'.0f' if exact else '.2f'}}", value, met


# --- training --------------------------------------------------------------------------------------------------------------


def train_targets(rows: Sequence[Row], device: str) -> list[Target]:
    """Holds the rows of `diffvl bench train` against every target of a kind of device ("cpu" or "cuda")."""
    targets = []
    for figure, form, limit in TRAIN[device]:
        values = {row["form"]: row[figure] for row in rows if row["shape"] == TRAIN_SHAPE}
        text = f"{FIGURES[figure]}, ours / {form}, {TRAIN_SHAPE}"
        targets.append(Target(text, "<=", limit, _ratio(values.get("ours"), values.get(form))))
    return targets


# --- decoding --------------------------------------------------------------------------------------------------------------


def decode_targets(rows: Sequence[Row], device: str, floor_seconds: float) -> list[Target]:
    """Holds the rows of `diffvl bench decode` against every target of a kind of device ("cpu" or "cuda").

    Args:
        floor_seconds: weights of a forward over the measured bandwidth.
    """
    compiled = device == "cuda"  # there `ours` is its compiled form, and AR transformers' generate without compiling
    targets = [_forwards(row) for row in rows if row["decoder"] != "ar_generate"]
    for steps, limit in TO_PUBLISHED[device].items():
        value = _ratio(_speed(rows, "ours", 1, steps, compiled), _speed(rows, "published", 1, steps))
        targets.append(Target(f"tokens/s, ours / published, {steps} steps, batch 1", ">=", limit, value))
    for steps, limit in TO_AR.get(device, {}).items():
        value = _ratio(_speed(rows, "ours", 1, steps, compiled), _speed(rows, "ar_generate", 1, None))
        targets.append(Target(f"tokens/s, ours / ar_generate, {steps} steps, batch 1", ">=", limit, value))
    if device == "cpu":
        for steps in TO_PUBLISHED["cpu"]:
            value = _ratio(_speed(rows, "ours", BATCH, steps), _speed(rows, "ours", 1, steps))
            targets.append(Target(f"tokens/s, ours, batch {BATCH} / batch 1, {steps} steps", ">=", BATCH_GAIN, value))
    else:
        row = _row(rows, "ours", 1, FLOOR_STEPS, compiled)
        value = None if row is None else _ratio(row["forward_seconds"], floor_seconds)
        text = f"time per forward, ours / weight streaming, {FLOOR_STEPS} steps, batch 1"
        targets.append(Target(text, "<=", OVER_FLOOR, value))
    return targets


def _forwards(row: Row) -> Target:
    """d forwards for d denoising steps; the published loop makes one more for every block. A prefill of its own is left out."""
    extra = row["blocks"] if row["decoder"] == "published" else 0
    compiled = " compiled" if row["compiled"] else ""
    text = f"forwards, {row['decoder']}{compiled}, {row['steps']} steps, batch {row['batch']}, {row['blocks']} blocks"
    return Target(text, "=", row["steps_due"] + extra, row["forwards"] - row["prefill_forwards"])


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _speed(rows: Sequence[Row], decoder: str, batch: int, steps: int | None, compiled: bool = False) -> float | None:
    """Tokens per second, at the block size that the targets are set for."""
    row = _row(rows, decoder, batch, steps, compiled)
    if row is None or (decoder != "ar_generate" and row["block_size"] != DECODE_BLOCK_SIZE):
        return None
    return row["tokens_per_second"]


def _row(rows: Sequence[Row], decoder: str, batch: int, steps: int | None, compiled: bool) -> Row | None:
    """The row of a decoder at a batch size; `steps` None takes any number (AR has one). `compiled`: its compiled form, where that
    was measured; else its plain one."""
    found = [row for row in rows if row["decoder"] == decoder and row["batch"] == batch and steps in (None, row["steps"])]
    wanted = [row for row in found if row["compiled"] == compiled]
    return (wanted or found or [None])[0]


# --- the program -----------------------------------------------------------------------------------------------------------


def check_report(report: Any) -> list[Target]:
    """Chooses the targets by what was measured. Raises ValueError for a report that there are none for."""
    rows: list[Row] = report.get("rows", []) if isinstance(report, dict) else []
    first, machine = (rows[0], report["machine"]) if rows else ({}, {})
    if "form" in first:
        return train_targets(rows, machine["device"])
    if "decoder" in first:
        return decode_targets(rows, machine["device"], machine["floor_seconds"])
    raise ValueError("there are targets for reports of `diffvl bench train` and of `diffvl bench decode` without --sweep only")


def main(arguments: list[str] | None = None) -> None:
    """Reads a report, prints a table, and exits with 1 if a target is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="what `diffvl bench train --json` or `diffvl bench decode --json` printed")
    given = parser.parse_args(arguments)
    try:
        targets = check_report(json.loads(given.report.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        parser.error(f"{given.report}: {error}")
    print_table(["target", "limit", "here", ""], [target.cells for target in targets])
    sys.exit(any(target.is_met is False for target in targets))


if __name__ == "__main__":
    main()
