"""`metrics.jsonl`: what was measured at which step, read back whole after a kill, and as one curve a key."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffvl.errors import CheckpointError

METRICS_FILE = "metrics.jsonl"
_PLACES = {"stage", "step", "seconds", "epoch"}  # keys of a line that say where it stands, not what was measured

Points = list[tuple[int, float]]  # (optimiser step, value)


@dataclass(frozen=True)
class Measure:
    """One key of `metrics.jsonl` over the steps; `lost` values were NaN or infinite and are not among the points."""

    key: str
    points: Points
    lost: int

    @property
    def window(self) -> int:
        """Logged points in the moving average: a twentieth of them, at most 100."""
        return min(max(len(self.points) // 20, 1), 100)

    def smoothed(self) -> Points:
        """Computes the mean of the last `window` points, from the first step that has as many."""
        values, size = [value for _, value in self.points], self.window
        return [(self.points[end - 1][0], sum(values[end - size : end]) / size) for end in range(size, len(values) + 1)]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON-lines file. A last line cut short by a killed process is left out; any other bad line is an
    error.

    Raises:
        CheckpointError: naming file and line.
    """
    objects = []
    lines = path.read_bytes().split(b"\n")
    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if count == len(lines):
                break
            raise CheckpointError(f"{path}:{count}: not valid JSON ({error}); correct or remove this line") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}:{count}: expected a JSON object, not {type(value).__name__}; correct or remove it")
        objects.append(value)
    return objects


def measures_of(lines: list[dict[str, Any]]) -> dict[str, Measure]:
    """Turns the lines of a `metrics.jsonl` into one curve a key. A step measured twice keeps its last value."""
    values: dict[str, dict[int, float | None]] = {}
    for line in lines:
        for key, value in line.items():
            if "step" in line and key not in _PLACES and (value is None or isinstance(value, (int, float))):
                values.setdefault(key, {})[line["step"]] = finite(value)
    measures = {}
    for key, by_step in values.items():
        points = sorted((step, value) for step, value in by_step.items() if value is not None)
        measures[key] = Measure(key, points, lost=len(by_step) - len(points))
    return measures


def finite(value: Any) -> Any:
    """Turns NaN and infinity, which have no JSON, into null; the report counts and names them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
