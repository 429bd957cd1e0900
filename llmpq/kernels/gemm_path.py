"""Which of two routes a GPU takes for a product: the fused kernel, or dequantizing and cuBLAS.

The fused kernel reads the packed weights alone and wins while reading weights is what takes the time. cuBLAS multiplies
faster, but first all weights must be dequantized, which pays once there are many rows. Where the routes cross is
measured on each device by `llmpq profile` and kept in the cache; before that, it is estimated.

LLMPQ_BATCH_INVARIANT=1 takes the fused kernel always, and of the CUDA backend's the one that is there for all m: there
the bits of a row never depend on m. With cuBLAS they do, and with Hopper's own kernels beyond 16 rows.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from llmpq.cache import find_record
from llmpq.kernels.registry import version
from llmpq.spec import Precision, Record
from llmpq.spec.ranges import Size
from llmpq.spec.record import check

KIND = "routes"  # in the cache
ROW_TILE = 64  # rows of x for which a fused kernel reads the weights once; fewer count as the next power of two
_always_fused = ContextVar("_always_fused", default=False)
LEAST_M = 16  # below, no device dequantizes: it is where measuring begins, and decoding need not look anything up


@dataclass(frozen=True, slots=True)
class GemmPath(Record):
    """What was measured of one weight shape: from which m on dequantizing is faster; None: at no m."""

    backend: str
    bits: int
    group_size: int | None  # None: the whole row
    n: Size
    k: Size
    dequantize_min_rows: int | None

    def validate(self) -> None:
        m = self.dequantize_min_rows
        check(m is None or m >= LEAST_M, "dequantize_min_rows", f"is {m}, expected at least {LEAST_M}")


@dataclass(frozen=True)
class GemmPathTable(Record):
    """All that was measured on one kind of device, in a 16-bit dtype."""

    SCHEMA = "llmpq.routes/1"

    device: str  # the name that its driver gives it
    capability: tuple[int, int]  # CUDA compute capability
    kernels: str  # versions of what was measured
    torch: str
    date: str
    rows: tuple[GemmPath, ...]

    def find(self, backend: str, precision: Precision, n: int, k: int) -> GemmPath | None:
        """The route of the nearest shape that was measured, by ratios of n and k; None if there is none.

        Of two that are equally near, the smaller counts.
        """
        key = (backend, precision.bits, precision.group_size)
        rows = [row for row in self.rows if (row.backend, row.bits, row.group_size) == key]
        return min(
            rows, key=lambda row: (abs(math.log(row.n / n)) + abs(math.log(row.k / k)), row.n, row.k), default=None
        )


def has_tensor_cores(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether the fused kernels multiply x of this dtype by tensor cores."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and capability >= (8, 0))


def default_threshold(capability: tuple[int, int], dtype: torch.dtype) -> int:
    """The m from which dequantizing is assumed to be faster where nothing was measured: an estimate.

    By an H100's limits of bandwidth and multiplication, dequantizing a weight of 8192 x 8192 and cuBLAS together reach
    0.43 of the speed of a plain 16-bit product at m = 256, 0.60 at 512 and 0.75 at 1024. The fused kernel goes through
    all weights anew for every 64 rows, or 128 on Hopper; with 1 / 2.3 of the plain product's time for the first 64, it
    would be as fast at about 400. Without tensor cores it is far behind cuBLAS from the first rows on.
    """
    return 512 if has_tensor_cores(capability, dtype) else LEAST_M


def dequantize_min_rows(
    table: GemmPathTable | None,
    capability: tuple[int, int],
    dtype: torch.dtype,
    backend: str,
    precision: Precision,
    n: int,
    k: int,
) -> float:
    """The least m at which such a weight is dequantized, for x of `dtype`: as measured, else the default threshold."""
    route = table.find(backend, precision, n, k) if table is not None and has_tensor_cores(capability, dtype) else None
    if route is None:
        return default_threshold(capability, dtype)
    return math.inf if route.dequantize_min_rows is None else route.dequantize_min_rows


def table_key(device: torch.device) -> str:
    """The name in the cache of a device's table, by all that it depends on: its name, our kernels and torch's."""
    name = "-".join(torch.cuda.get_device_name(device).split()).replace("/", "-")
    return f"{name}-{version()}-{torch.__version__}"


@functools.cache
def find_table(device: torch.device) -> GemmPathTable | None:
    """What was measured on a device, if anything."""
    return find_record(KIND, table_key(device), GemmPathTable)


@functools.cache
def _dequantize_from(
    device: torch.device, dtype: torch.dtype, backend: str, precision: Precision, n: int, k: int
) -> float:
    if device.type == "cpu":  # triton's interpreter: what is fast there is nothing to go by
        return math.inf
    capability = torch.cuda.get_device_capability(device)
    return dequantize_min_rows(find_table(device), capability, dtype, backend, precision, n, k)


def forget() -> None:
    """Have tables looked up again."""
    find_table.cache_clear()
    _dequantize_from.cache_clear()


@contextmanager
def always_fused() -> Iterator[None]:
    """Products in the block take the fused kernel at every m, whichever is the fastest of its backend's."""
    token = _always_fused.set(True)
    try:
        yield
    finally:
        _always_fused.reset(token)


def is_batch_invariant() -> bool:
    """Whether the environment asks for the fused kernel at every m, and for bits of a row that do not depend on m."""
    return os.environ.get("LLMPQ_BATCH_INVARIANT") == "1"


def is_fused(
    device: torch.device, backend: str, precision: Precision, m: int, n: int, k: int, dtype: torch.dtype
) -> bool:
    """Whether y [m, n] = x [m, k] @ w.T, with x of `dtype`, is the fused kernel's.

    It is asked at every product, and looks at files once for each kind of device.
    """
    if m < LEAST_M or is_batch_invariant() or _always_fused.get():
        return True
    return m < _dequantize_from(device, dtype, backend, precision, n, k)
