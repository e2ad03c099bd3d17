"""Which number formats this machine computes with fast."""

import torch


def has_bf16() -> bool:
    """Whether the GPU, or the CPU where there is none, has instructions for bf16 (of CPUs those with AMX tiles or AVX512-BF16).
    Elsewhere bf16 is emulated, and slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
