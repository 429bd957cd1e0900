"""What this machine can do at most, measured by ceilings.cpp, which is compiled when first needed."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

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
    for function in (loaded.ceilings_fp32_flop_per_s, loaded.ceilings_int8_op_per_s):
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_int,)
    return loaded


@cache
def buffer(nbytes: int) -> int:
    """Address of that much memory in huge pages, which is kept. Raises CeilingsMissingError."""
    address: int | None = library().ceilings_allocate(nbytes)
    if address is None:
        raise CeilingsMissingError(f"no {nbytes} bytes to read")
    return address


def measure(threads: int) -> dict[str, float]:
    """Bytes read, float32 and int8 operations per second (a multiply-add is two): the best of a few tries each.

    int8_op_per_s is 0 where the processor has no int8 dot product. Raises CeilingsMissingError.
    """
    functions, address = library(), buffer(_READ_BYTES)
    reads = [functions.ceilings_read_seconds(address, _READ_BYTES, threads) for _ in range(_REPEATS)]
    return {
        "read_bytes_per_s": _READ_BYTES / min(reads),
        "fp32_flop_per_s": max(functions.ceilings_fp32_flop_per_s(threads) for _ in range(_REPEATS)),
        "int8_op_per_s": max(functions.ceilings_int8_op_per_s(threads) for _ in range(_REPEATS)),
    }
