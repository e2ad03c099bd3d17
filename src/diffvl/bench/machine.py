"""What a measurement ran on, so that a figure can be told apart from the same figure elsewhere."""

import datetime
import os
from typing import Any

import torch

from diffvl.machine import cpu_model, num_cores, versions


def describe() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in GB (10^9 bytes), accelerator or None, versions, date."""
    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: versions()[name] for name in ("torch", "transformers", "python")},
        "date": datetime.date.today().isoformat(),
    }


def load() -> float:
    """Processes that wanted to run over the last minute: above 0, somebody else works here."""
    return os.getloadavg()[0]
