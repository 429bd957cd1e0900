"""What the Triton backend's launches need to know of where they run."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def is_interpreted() -> bool:
    """Whether triton was told to interpret when it made the kernels."""
    import triton

    from llmpq.kernels.backends.triton_kernel import gemm_kernel

    return not isinstance(gemm_kernel, triton.JITFunction)


@functools.cache
def describe(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; (0, 0) and 1 of the interpreter."""
    if device.type == "cpu":
        return (0, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def dtype_of(dtype: torch.dtype) -> Any:
    """Triton's name for a floating dtype."""
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
