"""What this machine is: its cores, processor and accelerator, what it computes with fast, and which versions are installed."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("diffvl", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def has_bf16() -> bool:
    """Tells whether the GPU, or the CPU where there is none, has instructions for bf16 (of CPUs those with AMX tiles or
    AVX512-BF16). Elsewhere bf16 is emulated, and slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def num_cores() -> int:
    """Counts the cores that this process may run on, where the system says; all of them elsewhere."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """Gives the name that the processor gives itself; Linux alone keeps it in a file."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def describe() -> str:
    """Names the hardware in a few words, for a file or a page."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def versions() -> dict[str, str]:
    """Gives the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
