"""Files in memory: what of them is read from storage, and when."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_madvise = getattr(ctypes.CDLL(None), "madvise", None)
_WILL_NEED = getattr(mmap, "MADV_WILLNEED", None)


def map_file(path: Path) -> Bytes:
    """All bytes of a file, each read when it is first touched. Raises OSError, or ValueError for an empty file."""
    return np.memmap(path, np.uint8, "r").view(np.ndarray)  # a plain array: slices of it cost less


def fetch(mapped: Bytes) -> None:
    """Let the system begin to read these bytes and no others.

    A byte that is touched before would take with it all that the system reads around it: with some disks 8 MiB, most of
    it perhaps another stage's.
    """
    if _madvise is None or _WILL_NEED is None or not mapped.size:
        return
    address = mapped.ctypes.data
    start = address - address % mmap.PAGESIZE
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + mapped.nbytes - start), _WILL_NEED)
