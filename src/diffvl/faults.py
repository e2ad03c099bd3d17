"""What kind of fault it was that a call of a model raised: memory that ran out, or an accelerator that is lost."""

import errno
import os

import torch


def is_of_memory(fault: BaseException) -> bool:
    """Tells whether memory ran out, of a GPU or of the machine, in whoever's words: libraries of CUDA have some beside torch's,
    the allocator of CPUs has no type of error of its own, and the system says it of a process or a file's pages."""
    words = str(fault)
    of_cuda = _is_of_cuda(fault) and ("out of memory" in words or "ALLOC_FAILED" in words)
    of_cpu = "DefaultCPUAllocator" in words or (isinstance(fault, RuntimeError) and os.strerror(errno.ENOMEM) in words)
    of_system = isinstance(fault, OSError) and fault.errno == errno.ENOMEM
    return of_cuda or of_cpu or of_system or isinstance(fault, MemoryError | torch.OutOfMemoryError)


def is_lasting(fault: BaseException) -> bool:
    """Tells whether all calls after this one will fail too: so it is with faults of CUDA, after which a process can use it no
    more."""
    return _is_of_cuda(fault) and not is_of_memory(fault)


def _is_of_cuda(fault: BaseException) -> bool:
    return isinstance(fault, torch.AcceleratorError) or (isinstance(fault, RuntimeError) and "CUDA error" in str(fault))
