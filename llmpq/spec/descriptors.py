"""Keeps from the user what compiled libraries print by themselves."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def silence() -> Iterator[None]:
    """What is written to the descriptors of standard output and error is lost, from whatever language and thread."""
    flush: Callable[[None], object] = bool
    if os.name == "posix":
        flush = ctypes.CDLL(None).fflush  # C keeps what it prints for a while
    kept = {}
    for fd in (1, 2):
        try:
            kept[fd] = os.dup(fd)
        except OSError:  # it is closed: nobody hears it anyway
            continue
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in kept:
        os.dup2(nowhere, fd)
    os.close(nowhere)
    try:
        yield
    finally:
        flush(None)
        for fd, before in kept.items():
            os.dup2(before, fd)
            os.close(before)
