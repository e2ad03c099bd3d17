"""What a measurement ran on, so that a figure can be told apart from the same figure elsewhere."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

CPUINFO = Path("/proc/cpuinfo")


def describe() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GB (10^9 bytes), accelerator or None, versions, date."""
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


def usable_cores() -> int:
    """Cores that this process may run on, where the system says; all of them elsewhere."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The name that the processor gives itself; Linux alone keeps it in a file."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def load() -> float:
    """Processes that wanted to run over the last minute: above 0, somebody else works here."""
    return os.getloadavg()[0]
