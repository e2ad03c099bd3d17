"""The results of the study: one small JSON file for each run, of which the page is made, and what a run's curves say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffvl.errors import DataError, UsageError
from diffvl.store.files import read_json, replace_text
from diffvl.store.metrics import measures_of, read_json_lines

Curve = list[tuple[int, float]]
Origin = tuple[int, str]  # seed and start
PILOT_FILE = "pilot.json"
ENCODED, CALL = "from the encoded picture on", "whole calls"  # what times are of


@dataclass(frozen=True)
class Decoded:
    """A run under one way to decode. exact: right or wrong, of each test question in order."""

    exact: list[int]
    similarity: float
    tokens_per_forward: float

    @property
    def match(self) -> float:
        return sum(self.exact) / len(self.exact)


@dataclass(frozen=True)
class Result:
    """A finished run. exact_match, masked_loss: at the evaluations; the latter is empty for an AR run. ways: its own way first.
    speeds: tokens per second of each way, and of the AR twin of the same seed, timed by turns; none where there was no twin.
    settings: what all runs of a study share. seconds: of training and measuring. clock: what the times behind `speeds` are of.
    start: a digest of the align checkpoint's weights; older results did not note it, and each machine had one of its own."""

    variant: str
    seed: int
    steps: int
    exact_match: Curve
    masked_loss: Curve
    gradient_noise: float
    ways: dict[str, Decoded]
    speeds: dict[str, float]
    settings: dict[str, Any]
    machine: dict[str, Any]
    seconds: float
    clock: str = ENCODED
    start: str = ""

    @property
    def origin(self) -> Origin:
        """Seed and start: runs that share both differ by their variant alone."""
        return self.seed, self.start or f"{self.machine['cpu']}, {self.machine['date']}"

    @property
    def own(self) -> Decoded:
        return next(iter(self.ways.values()))


@dataclass(frozen=True)
class Pilot:
    """A run of a few steps, for what it costs. step, align_step, answer: the processor's seconds of each, the last in batches."""

    variant: str
    align_step: float
    step: float
    answer: float
    ways: int
    machine: dict[str, Any] = field(default_factory=dict)


def write_result(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(result_file(folder, result.variant, result.seed, result.start), json.dumps(asdict(result)) + "\n")


def result_file(folder: Path, variant: str, seed: int, start: str = "") -> Path:
    return folder / (f"{variant}-{seed}-{start}.json" if start else f"{variant}-{seed}.json")


def read_results(folder: Path) -> list[Result]:
    """Reads all results, by variant and seed.

    Raises:
        DataError: one was made with other settings than the others, so that they cannot be compared.
    """
    results = []
    for file in sorted(folder.glob("?-*.json")):
        tree = read_json(file)
        tree["ways"] = {name: Decoded(**way) for name, way in tree["ways"].items()}
        for name in ("exact_match", "masked_loss"):
            tree[name] = [(int(step), float(value)) for step, value in tree[name]]
        results.append(Result(**tree))
    results.sort(key=lambda one: (one.variant, *one.origin))
    for one in results:
        if changed := _changed(one.settings, results[0].settings):
            first = results[0]
            raise DataError(
                f"{result_file(folder, one.variant, one.seed, one.start)} was made with other settings than "
                f"{result_file(folder, first.variant, first.seed, first.start).name} ({changed}): keep the results of each "
                "study in a folder of their own"
            )
    return results


def require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UsageError if a folder has results of another study, with which those of this one would be mixed."""
    for file in sorted(folder.glob("?-*.json")):
        if changed := _changed(read_json(file)["settings"], settings):
            raise UsageError(
                f"{file} was made with other settings ({changed}), and nothing was run: give each study an --out and a --page of "
                "its own (`make study` names docs; call python -m tools.study)"
            )


def _changed(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)))


def read_pilot(folder: Path) -> Pilot | None:
    file = folder / PILOT_FILE
    return Pilot(**read_json(file)) if file.is_file() else None


def write_pilot(pilot: Pilot, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / PILOT_FILE, json.dumps(asdict(pilot), indent=1) + "\n")


# --- from the curves -------------------------------------------------------------------------------------------------------


def curves_of(directory: Path) -> tuple[Curve, Curve, float, float]:
    """Reads a stage directory's metrics: exact match, masked loss, gradient noise, seconds."""
    lines = read_json_lines(directory / "metrics.jsonl")
    measures = measures_of(lines)

    def points(key: str) -> Curve:
        return list(measures[key].points) if key in measures else []

    norms = [value for _, value in points("grad_norm")]
    seconds = max(line["seconds"] for line in lines)
    return points("eval_exact_match"), points("eval_masked_loss"), gradient_noise(norms), seconds


def gradient_noise(norms: Sequence[float]) -> float:
    """Computes the variance of the gradient's norm over its squared mean, in the second half of a run.

    Of the differences between neighbouring steps, so that a slow change of the norm does not count: half their mean square is the
    variance of independent draws around it.
    """
    half = list(norms[len(norms) // 2 :])
    if len(half) < 2:
        return 0.0
    squares = [(one - other) ** 2 for one, other in zip(half, half[1:], strict=False)]
    return sum(squares) / (2 * len(squares)) / (sum(half) / len(half)) ** 2


def exact(run: Result) -> Curve:
    return run.exact_match


def masked(run: Result) -> Curve:
    return run.masked_loss


def mean_after_start(curve: Curve) -> float:
    """Computes the mean over the evaluations after step 0: the higher an increasing figure's, the sooner it has risen."""
    values = [value for step, value in curve if step]
    return sum(values) / len(values)


def steps_to(curve: Curve, level: float, rising: bool) -> float | None:
    """Finds the step at which a curve first reaches a level, straight between two evaluations; None where it does not."""
    sign = 1 if rising else -1
    before: tuple[int, float] | None = None
    for step, value in curve:
        if sign * (value - level) >= 0:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (level - before[1]) / (value - before[1])
        before = (step, value)
    return None


Sorted = Mapping[str, Mapping[Origin, Result]]  # by variant


def by_variant(results: Sequence[Result]) -> Sorted:
    """Sorts results by variant and origin."""
    found: dict[str, dict[Origin, Result]] = {}
    for result in results:
        found.setdefault(result.variant, {})[result.origin] = result
    return found
