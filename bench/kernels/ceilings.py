"""What this machine can do at most, measured by ceilings.cpp, which is compiled when first needed."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from bench.machine import ROOT

_SOURCE = Path(__file__).with_suffix(".cpp")
_READ_BYTES = 512 * 2**20
_REPEATS = 5


class CeilingsMissingError(OSError):
    """The ceilings cannot be measured here; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """The compiled functions. Raises CeilingsMissingError without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ceilings.so"
        command = [
            "g++",
            "-O3",
            "-march=native",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-pthread",
            f"-I{ROOT / 'csrc'}",
            str(_SOURCE),
            "-o",
            path,
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise CeilingsMissingError("the ceilings need g++, which is not installed") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or ["no message"]
            raise CeilingsMissingError(f"g++ could not compile {_SOURCE.name}: {lines[0]}") from None
        loaded = ctypes.CDLL(path)
    loaded.ceilings_allocate.restype = ctypes.c_void_p
    loaded.ceilings_allocate.argtypes = (ctypes.c_size_t,)
    loaded.ceilings_read_seconds.restype = ctypes.c_double
    loaded.ceilings_read_seconds.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for name in ("fp32_flop_per_s", "fp32_flop_per_s_now", "int8_op_per_s", "tile_op_per_s"):
        function = getattr(loaded, f"ceilings_{name}")
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_int,)
    loaded.ceilings_tile_op_per_s_now.restype = ctypes.c_double
    return loaded


@cache
def buffer(nbytes: int) -> int:
    """Address of that much memory in huge pages, which is kept. Raises CeilingsMissingError."""
    address: int | None = library().ceilings_allocate(nbytes)
    if address is None:
        raise CeilingsMissingError(f"no {nbytes} bytes to read")
    return address


def pace_of_tiles() -> Callable[[], float]:
    """A function that tells how many operations per second one thread makes in tiles of AMX now; 0 without AMX."""
    try:
        now: Callable[[], float] = library().ceilings_tile_op_per_s_now
    except CeilingsMissingError:
        return lambda: 0.0
    return now


def pace_of_threads(threads: int) -> Callable[[], float]:
    """A function that tells how many float32 operations per second so many threads make now; 0 without a compiler.

    It falls by a third while the host of a virtual machine runs two of its processors on one core.
    """
    try:
        now = library().ceilings_fp32_flop_per_s_now
    except CeilingsMissingError:
        return lambda: 0.0
    return lambda: float(now(threads))


def measure(threads: int) -> dict[str, float]:
    """Bytes read, float32 and int8 operations per second (a multiply-add is two): the best of a few tries each.

    int8_op_per_s is that of AMX where there is AMX, of sums in 16 bits where there is AVX2 alone, and 0 where there is
    no product of bytes at all. Raises CeilingsMissingError.
    """
    functions, address = library(), buffer(_READ_BYTES)
    reads = [functions.ceilings_read_seconds(address, _READ_BYTES, threads) for _ in range(_REPEATS)]
    return {
        "read_bytes_per_s": _READ_BYTES / min(reads),
        "fp32_flop_per_s": max(functions.ceilings_fp32_flop_per_s(threads) for _ in range(_REPEATS)),
        "int8_op_per_s": max(
            function(threads)
            for function in (functions.ceilings_int8_op_per_s, functions.ceilings_tile_op_per_s)
            for _ in range(_REPEATS)
        ),
    }
