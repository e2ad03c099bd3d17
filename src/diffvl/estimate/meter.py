"""The peak memory of one step: the device's own count on CUDA, the process's high-water mark on Linux.

On a CPU the kernel keeps the largest resident size a process ever had (VmHWM); writing 5 to /proc/self/clear_refs sets it
back to the size of now, so that each form gets its own peak. What is freed must leave the process: `release` collects garbage
and makes glibc hand its free pages back, and while a peak is measured every large block has pages of its own. Without that,
blocks of up to 32 MB come from a heap full of holes, and a form's peak depends on the forms before it. The peak on a CPU holds
the interpreter and its libraries too, on CUDA it holds tensors alone; both hold the weights and their gradients.
"""

import ctypes
import gc
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # man proc_pid_clear_refs

# mallopt(3): blocks from the first limit on are mapped one by one; the second is how much may stay free at the heap's end.
# glibc itself moves the first from 128 KB up to 32 MB as blocks are freed, which the timed rounds go back to, and keeps the
# second at twice the first.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
MAPPED_ALONE, MAPPED_USUALLY = 64 * 1024, 32 * 1024 * 1024

CUDA_METHOD = "torch.cuda.max_memory_allocated"
LINUX_METHOD = "VmHWM of /proc/self/status, set back by writing 5 to /proc/self/clear_refs, freed blocks given back at once"


@dataclass(frozen=True)
class MemoryMeter:
    """Bytes of one device. `method` says how they are counted; `works` is False where they cannot be, and `method` says why."""

    device: torch.device
    method: str
    works: bool

    def start(self) -> int | None:
        """Frees what nobody holds, sets the peak back, and returns the bytes in use now."""
        release(self.device)
        if not self.works:
            return None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        set_mapping_limit(MAPPED_ALONE)
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
        return status_bytes("VmRSS")

    def peak(self) -> int | None:
        """Returns the most bytes in use since `start`."""
        if not self.works:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        set_mapping_limit(MAPPED_USUALLY)
        return status_bytes("VmHWM")


def memory_meter(device: torch.device) -> MemoryMeter:
    """Makes the meter of a device; one that does not work here says why in its `method`."""
    if device.type == "cuda":
        return MemoryMeter(device, CUDA_METHOD, works=True)
    if platform.system() != "Linux":
        return MemoryMeter(device, f"not measured: {platform.system()} has no peak of memory that can be set back", works=False)
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError as error:
        return MemoryMeter(device, f"not measured: {CLEAR_REFS} cannot be written ({error.strerror})", works=False)
    return MemoryMeter(device, LINUX_METHOD, works=True)


def release(device: torch.device) -> None:
    """Collects garbage and gives free pages back to the system (glibc keeps them, and they would count for the next form)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def set_mapping_limit(size: int) -> None:
    """Gives blocks of `size` bytes and more pages of their own, which leave the process when they are freed. Other allocators
    than glibc's are left as they are."""
    if has_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, size)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * size)


def has_glibc() -> bool:
    """Says whether memory comes from glibc."""
    return platform.libc_ver()[0] == "glibc"


def status_bytes(name: str) -> int:
    """Reads a size from /proc/self/status, in bytes."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"{STATUS} has no line {name}")
