"""The guard of the doors through which others' files come in: the model, and its tokenizer with its template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmpq.spec import LlmpqError, UsageError


@contextmanager
def refusing(problem: str) -> Iterator[None]:
    """Whatever is raised inside becomes a UsageError: `problem`, a colon, and what the library said.

    Libraries raise all kinds of exceptions on what they do not expect in a file; those in Rust panic with one that is
    no Exception.
    """
    try:
        yield
    except (LlmpqError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UsageError(f"{problem}: {where}{error.strerror or error}") from error
    except BaseException as error:
        said = str(error)
        if isinstance(error, RecursionError):
            said = "it is nested too deeply"
        elif isinstance(error, MemoryError):
            said = "it needs more memory than there is"
        elif isinstance(error, KeyError):
            said = f"it has no {said}"
        elif "trust_remote_code" in said:
            said = "it needs code from its own folder, which is never run"
        raise UsageError(f"{problem}: {said or type(error).__name__}") from error


class _TooSlow(BaseException):
    """A time limit is over."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End others' Python code that takes longer, in whatever thread it runs. Raises TimeoutError."""
    thread, lock, inside = threading.get_ident(), threading.Lock(), True

    def interrupt() -> None:
        with lock:
            if inside:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooSlow))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:  # what was sent before comes inside the outer block
                inside = False
            timer.cancel()
    except _TooSlow:
        raise TimeoutError(f"it takes longer than {seconds:g} s") from None
