"""The machine that a plan is for: this one, or another that `--for` describes."""

import os
import re
from dataclasses import dataclass

import torch

from diffvl.errors import UsageError
from diffvl.train.launch import local_processes, process_state

GIGABYTE = 10**9
_FOR = re.compile(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*gb", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """processes: of the run, one for each device. memory: bytes of a device, for one process. is_gpu: whether it has GPUs, on
    which training is in bf16 and attention in FlexAttention unless a recipe says otherwise."""

    processes: int
    memory: int
    is_gpu: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.is_gpu else "cpu")

    @property
    def told(self) -> str:
        kind = "GPU" if self.is_gpu else "CPU process"
        plural = "" if self.processes == 1 else "es" if kind.endswith("s") else "s"
        return f"{self.processes} {kind}{plural} with {self.memory / GIGABYTE:.0f} GB each"


def machine_of(text: str | None) -> Machine:
    """Gives the machine that --for describes; the one that this run is on where it is not given.

    Raises:
        UsageError: it is not of the form 8x80GB.
    """
    if text is None:
        return _this_machine()
    found = _FOR.fullmatch(text.strip())
    if found is None or int(found[1] or 1) < 1 or float(found[2]) <= 0:
        raise UsageError(f"--for {text}: expected GPUs and the memory of each, as in --for 8x80GB or --for 24GB")
    return Machine(int(found[1] or 1), int(float(found[2]) * GIGABYTE), is_gpu=True)


def _this_machine() -> Machine:
    processes = process_state().num_processes
    if torch.cuda.is_available():
        return Machine(processes, torch.cuda.mem_get_info()[1], is_gpu=True)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(processes, memory // local_processes(), is_gpu=False)
