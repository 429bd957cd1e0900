"""Memory in pages of 2 MiB, where the system has them: a kernel that streams weights is a sixth faster with them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch

PAGE = 2 << 20
_LIBC = ctypes.CDLL(None)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, contiguous, not initialised: as torch's, but what is not small is in large pages, and zero.

    It becomes resident page by page, when it is first written. The end that fills no large page stays in small ones, so
    that little more is resident than was asked for.
    """
    return _mapped(shape, dtype) if _is_large(shape, dtype) else torch.empty(shape, dtype=dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """As `empty`, but zero, however small."""
    return _mapped(shape, dtype) if _is_large(shape, dtype) else torch.zeros(shape, dtype=dtype)


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _is_large(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return _nbytes(shape, dtype) >= PAGE


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In a mapping of its own, which begins with a large page."""
    nbytes = _nbytes(shape, dtype)
    mapped = mmap.mmap(-1, nbytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -data.data_ptr() % PAGE
    _make_read_only(data, 0, start)
    _make_read_only(data, start + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, len(mapped))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE, start, nbytes // PAGE * PAGE)
    return data[start : start + nbytes].view(dtype).view(shape)


def _make_read_only(data: torch.Tensor, start: int, end: int) -> None:
    """A limit on the data segment counts what can be written, so not bytes `start` to `end` (Linux)."""
    if start < end:
        _LIBC.mprotect(ctypes.c_void_p(data.data_ptr() + start), ctypes.c_size_t(end - start), mmap.PROT_READ)
