"""Times of training forms and of decoders: interleaved rounds, so that what else the machine does slows all of them alike.

A first round, not timed, warms up (it compiles, where a form compiles) and measures the peak memory of each training form by
itself. Then every round runs everything once, each round beginning with another form or decoder. Training forms share a draw of
noise for each round. A training step is zeroed gradients, forward, backward; the optimiser's own step is left out, because it is
the same for all forms.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from diffvl.bench.decoders import Case, Decoded, Prompts
from diffvl.bench.machine import synchronize
from diffvl.bench.training_forms import FORMS, Step, TrainingSample, choose_attention
from diffvl.estimate.meter import MemoryMeter
from diffvl.objective.losses import Draw
from diffvl.terminal.bars import track

WARM_UP = -1  # the number of the round that is not timed
NUM_KERNELS = 8

T = TypeVar("T")


def schedule(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Lists (round, name): every name once a round, the first one moving on by one from round to round."""
    return [(number, names[(place + number) % len(names)]) for number in range(rounds) for place in range(len(names))]


def schedule_with_warm_up(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Lists (round, name): every name in a WARM_UP round, then the `schedule`."""
    return [(WARM_UP, name) for name in names] + schedule(names, rounds)


def spread(seconds: Sequence[float]) -> float:
    """Measures from the fastest to the slowest round, as a part of the median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def _time_call(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Runs the work to its end on the device; returns its seconds and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


# --- training --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timer:
    """How training forms are timed: in how many rounds, on the device of `meter`, with draws of this seed."""

    rounds: int
    seed: int
    meter: MemoryMeter
    console: Console

    @property
    def device(self) -> torch.device:
        return self.meter.device

    @property
    def draws(self) -> list[Draw]:
        """The draw of every round."""
        return [Draw(seed=self.seed, step=number, progress=0.0) for number in range(self.rounds)]


@dataclass(frozen=True)
class StepTiming:
    """attention: the implementation that the form ran on. seconds of every round; peak and start in bytes, None where memory
    cannot be measured; loss of the first draw."""

    attention: str
    seconds: list[float]
    peak_bytes: int | None
    start_bytes: int | None
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_forms(model: Any, sample: TrainingSample, forms: Sequence[str], timer: Timer, text: str) -> dict[str, StepTiming]:
    """Measures every form; `text` names the work in what the console shows."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    losses: dict[str, float] = {}
    attention: dict[str, str] = {}
    memory: dict[str, tuple[int | None, int | None]] = {}
    plan, draws = schedule_with_warm_up(forms, timer.rounds), timer.draws
    for number, form in track(timer.console, plan, len(plan), text):
        is_first = number == WARM_UP
        attention[form] = choose_attention(model, form)
        step = FORMS[form](model, sample, draws[0 if is_first else number])
        model.zero_grad(set_to_none=True)
        start = timer.meter.start() if is_first else None
        taken, loss = _time_step(model, step, timer.device)
        if is_first:
            memory[form], losses[form] = (timer.meter.peak(), start), loss
        else:
            seconds[form].append(taken)
    model.zero_grad(set_to_none=True)
    return {form: StepTiming(attention[form], seconds[form], *memory[form], losses[form]) for form in forms}


def _time_step(model: Any, step: Step, device: torch.device) -> tuple[float, float]:
    """Runs one forward and backward into fresh gradients; returns its seconds and its loss."""
    model.zero_grad(set_to_none=True)

    def forward_and_backward() -> torch.Tensor:
        loss = step()
        loss.backward()
        return loss

    seconds, loss = _time_call(forward_and_backward, device)
    return seconds, float(loss.detach())


def top_kernels(model: Any, sample: TrainingSample, form: str, device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Profiles one step of a form: kernels on CUDA, operators on a CPU, the longest first.

    Each entry: name, calls, seconds (of its own, without what it calls), share of the sum over all.
    """
    choose_attention(model, form)
    step = FORMS[form](model, sample, Draw(seed=seed, step=0, progress=0.0))
    _time_step(model, step, device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        _time_step(model, step, device)
    model.zero_grad(set_to_none=True)
    entries = []
    for event in profiler.key_averages():
        # On CUDA the launching operators carry their kernels' time a second time.
        if on_cuda and str(event.device_type).rpartition(".")[2] != "CUDA":
            continue
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        entries.append((microseconds / 1e6, event.key, event.count))
    total = sum(seconds for seconds, _, _ in entries) or 1.0
    entries.sort(reverse=True)
    return [
        {"name": name, "calls": calls, "seconds": seconds, "share": seconds / total}
        for seconds, name, calls in entries[:NUM_KERNELS]
    ]


# --- decoding --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecodeTiming:
    """What a case decoded, group by group; for each round the seconds of all groups, and the mean of those until their first
    tokens had settled."""

    decoded: list[Decoded]
    seconds: list[float]
    first_seconds: list[float]


class FirstTokenError(Exception):
    """Ends a call when its first token has settled."""


def time_cases(
    model: Any,
    groups: Sequence[Prompts],
    cases: Sequence[Case],
    rounds: int,
    device: torch.device,
    console: Console,
) -> dict[Case, DecodeTiming]:
    """Decodes the groups of prompts with every case."""
    by_name = {case.name: case for case in cases}
    timings = {case: DecodeTiming([], [], []) for case in cases}
    plan = schedule_with_warm_up(list(by_name), rounds)
    for number, name in track(console, plan, len(plan), f"batch {len(groups[0].ids)}"):
        case = by_name[name]
        if number == WARM_UP:
            _warm_up(model, groups, case, device)
            continue
        first = [time_first(model, prompts, case, device) for prompts in groups]
        whole = [_time_call(partial(case.run, model, prompts), device) for prompts in groups]
        timings[case].first_seconds.append(statistics.fmean(first))
        timings[case].seconds.append(sum(seconds for seconds, _ in whole))
        timings[case].decoded[:] = [decoded for _, decoded in whole]
    return timings


def _warm_up(model: Any, groups: Sequence[Prompts], case: Case, device: torch.device) -> None:
    """Runs every kind of forward once. Two blocks hold them all; compiled ones need caches of the size that will be timed."""
    limit = min(groups[0].limit, 2 * model.config.block_size)
    for prompts in groups if case.compiled else groups[:1]:
        case.run(model, prompts if case.compiled or device.type == "cuda" else prompts.shortened(limit))


def time_first(model: Any, prompts: Prompts, case: Case, device: torch.device) -> float:
    """Measures the seconds until the first token has settled, in a call of its own that ends there: to watch for it would slow
    the timed calls down."""
    settled: list[float] = []

    def on_first() -> None:
        synchronize(device)
        settled.append(time.perf_counter())
        raise FirstTokenError

    synchronize(device)
    start = time.perf_counter()
    with suppress(FirstTokenError):
        case.run(model, prompts.shortened(1), on_first)
    return settled[0] - start
