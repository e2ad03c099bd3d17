"""What kind of fault it was that a call of a model raised: memory that ran out, or an accelerator that is lost."""

import torch


def is_of_memory(fault: BaseException) -> bool:
    """Tells whether memory ran out, of a GPU or of the machine, in whoever's words: libraries of CUDA have some beside torch's,
    and the allocator of CPUs has no type of error of its own."""
    words = str(fault)
    of_cuda = _is_of_cuda(fault) and ("out of memory" in words or "ALLOC_FAILED" in words)
    return of_cuda or isinstance(fault, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in words


def is_lasting(fault: BaseException) -> bool:
    """Tells whether all calls after this one will fail too: so it is with faults of CUDA, after which a process can use it no
    more."""
    return _is_of_cuda(fault) and not is_of_memory(fault)


def _is_of_cuda(fault: BaseException) -> bool:
    return isinstance(fault, torch.AcceleratorError) or (isinstance(fault, RuntimeError) and "CUDA error" in str(fault))
