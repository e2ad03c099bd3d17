"""Faults of a model's calls are told apart: memory that ran out may be free again, a lost accelerator stays lost."""

import errno

import pytest
import torch

from diffvl.faults import is_lasting, is_of_memory


@pytest.mark.parametrize(
    ("fault", "of_memory", "lasting"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("unable to mmap 8 bytes from file <model.safetensors>: Cannot allocate memory (12)"), True, False),
        (MemoryError(), True, False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True, False),
        (OSError(errno.ENOSPC, "No space left on device"), False, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("shapes differ"), False, False),
        (ValueError("the prompt is longer than the memory of the model"), False, False),
    ],
)
def test_faults_are_told_apart(fault: Exception, of_memory: bool, lasting: bool):
    assert (is_of_memory(fault), is_lasting(fault)) == (of_memory, lasting)


def test_the_allocator_of_cpus_is_understood():
    """A real lack of memory, in the words of the installed torch."""
    with pytest.raises((RuntimeError, MemoryError)) as failed:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_of_memory(failed.value)
