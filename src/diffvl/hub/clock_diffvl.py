"""Moments of a call, on the clock of the device that works."""

import time
from typing import Any

import torch


def moment(device: torch.device) -> Any:
    """A moment, on the device's own clock: on a GPU nobody waits for it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, second: Any) -> float:
    """The time between two moments."""
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1e3
