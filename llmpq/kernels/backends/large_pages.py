"""Memory in pages of 2 MiB, where the system has them: a kernel that streams weights is a sixth faster with them."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

PAGE = 2 << 20


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, contiguous. What is not small becomes resident page by page, when it is first written.

    The end that fills no large page stays in small ones, so that little more is resident than was asked for.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < PAGE:
        return torch.zeros(shape, dtype=dtype)
    mapped = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -data.data_ptr() % PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE, start, nbytes // PAGE * PAGE)
    return data[start : start + nbytes].view(dtype).view(shape)
