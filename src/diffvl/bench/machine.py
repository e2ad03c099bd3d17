"""The machine of a measurement: what it is, what it runs on, and the speed of its arithmetic and its memory."""

import datetime
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from diffvl.errors import UsageError

CPUINFO = Path("/proc/cpuinfo")
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
BUFFER_BYTES = {"cpu": 2**28, "cuda": 2**32}
ROUNDS = 10  # of which the fastest counts


def describe_machine() -> dict[str, Any]:
    """Describes the hardware and the software: CPU model, cores that this process may use, memory in GB (10^9 bytes), accelerator
    or None, versions, date."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
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


def usable_cores() -> int:
    """Counts the cores that this process may run on, where the system says; all of them elsewhere."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """Reads the processor's name for itself; Linux alone keeps it in a file."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


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
