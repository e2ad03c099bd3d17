"""The machine of a measurement: what it is, what it runs on, and the speed of its arithmetic and its memory."""

import datetime
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from diffvl.errors import UsageError
from diffvl.machine import cpu_model, num_cores, versions

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
BUFFER_BYTES = {"cpu": 2**28, "cuda": 2**32}
ROUNDS = 10  # of which the fastest counts


def describe_machine() -> dict[str, Any]:
    """Describes the hardware and the software: CPU model, cores that this process may use, memory in GB (10^9 bytes), accelerator
    or None, versions, date."""
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: versions()[name] for name in ("torch", "transformers", "python")},
        "date": datetime.date.today().isoformat(),
    }


def describe_run(device: torch.device, dtype: torch.dtype, load_before: float) -> dict[str, Any]:
    """Describes the machine and what a comparison runs on. load_before: `load_average` before it began."""
    return describe_machine() | {
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "load_before": load_before,
    }


def load_average() -> float:
    """Returns how many processes wanted to run over the last minute: above 0, other work is going on."""
    return round(os.getloadavg()[0], 2)


# --- the device ------------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """Returns the device that auto, cpu or cuda stands for. Raises UsageError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; take --device cpu, or a machine that has one")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def synchronize(device: torch.device) -> None:
    """Waits until the device has done its work; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what it reaches -------------------------------------------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measures FLOPs per second of large square matrix products."""
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: torch.mm(left, right), device)


def memory_bandwidth(device: torch.device) -> float:
    """Measures bytes per second: the faster of reading a large buffer (a sum) and of copying it (counted twice)."""
    source = torch.ones(BUFFER_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = source.numel() * source.element_size()
    reading = size / _fastest(source.sum, device)
    copying = 2 * size / _fastest(lambda: target.copy_(source), device)
    return max(reading, copying)


def _fastest(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest round."""
    best = float("inf")
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
