"""What arithmetic a processor has: bf16 is missing on many CPUs, and slow on some that have it."""

from __future__ import annotations

import torch


def has_bf16(device: str) -> bool:
    """Tell whether networks can be run in bf16 on a ``cpu`` or ``cuda`` device: oneDNN needs AVX-512 or newer AVX."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_bf16(device: str) -> bool:
    """Tell whether bf16 is faster than fp32 there: without instructions of its own it is emulated."""
    if device == "cuda":
        return has_bf16(device)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
