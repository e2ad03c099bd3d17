"""Time and peak memory of every form on one sample: interleaved rounds, so that what else the machine does hits all alike.

A first round, not timed, warms up (it compiles, where a form compiles) and measures the peak memory of each form by itself.
Then every round runs every form once, each round beginning with another form, on a draw of its own that the forms share. A
step is zeroed gradients, forward, backward; the optimiser's own step is left out, because it is the same for all forms.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from diffvl.bench.flops import synchronize
from diffvl.bench.forms import FORMS, Step, Work, choose_attention
from diffvl.bench.memory import MemoryMeter
from diffvl.objective.losses import Draw
from diffvl.terminal.bars import track

NUM_KERNELS = 8


@dataclass(frozen=True)
class Measured:
    """attention: the implementation it ran on. seconds of every round; peak and start in bytes, None where memory cannot be
    measured; loss of the first draw."""

    form: str
    attention: str
    seconds: list[float]
    peak_bytes: int | None
    start_bytes: int | None
    loss: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """From the fastest to the slowest round, as a part of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def draws(seed: int, rounds: int) -> list[Draw]:
    """The draw of every round."""
    return [Draw(seed=seed, step=number, progress=0.0) for number in range(rounds)]


def schedule(forms: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, form): every form once a round, the first one moving on by one from round to round."""
    for number in range(rounds):
        for place in range(len(forms)):
            yield number, forms[(place + number) % len(forms)]


def measure_forms(
    model: Any, work: Work, forms: Sequence[str], rounds: int, meter: MemoryMeter, seed: int, console: Console, text: str
) -> dict[str, Measured]:
    """Form -> its figures; `text` names the work in what the console shows."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    losses: dict[str, float] = {}
    attention: dict[str, str] = {}
    peaks: dict[str, tuple[int | None, int | None]] = {}
    all_draws = draws(seed, rounds)
    plan = [(-1, form) for form in forms] + list(schedule(forms, rounds))
    for number, form in track(console, plan, len(plan), text):
        attention[form] = choose_attention(model, form)
        step = FORMS[form](model, work, all_draws[max(number, 0)])
        model.zero_grad(set_to_none=True)
        start = meter.start() if number < 0 else None
        time_taken, loss = _run(model, step, meter.device)
        if number < 0:
            peaks[form], losses[form] = (meter.peak(), start), loss
        else:
            seconds[form].append(time_taken)
    model.zero_grad(set_to_none=True)
    return {form: Measured(form, attention[form], seconds[form], *peaks[form], losses[form]) for form in forms}


def _run(model: Any, step: Step, device: torch.device) -> tuple[float, float]:
    """One forward and backward into fresh gradients: its seconds and its loss."""
    model.zero_grad(set_to_none=True)
    synchronize(device)
    began = time.perf_counter()
    loss = step()
    loss.backward()
    synchronize(device)
    return time.perf_counter() - began, float(loss.detach())


def top_kernels(model: Any, work: Work, form: str, device: torch.device, seed: int) -> list[dict[str, Any]]:
    """What one step of a form spends its time on: kernels on CUDA, operators on a CPU, the longest first.

    Each entry: name, calls, seconds (of its own, without what it calls), share of the sum over all.
    """
    choose_attention(model, form)
    step = FORMS[form](model, work, draws(seed, 1)[0])
    _run(model, step, device)
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        _run(model, step, device)
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
