"""CostTable: measured seconds of the operations a stage consists of, and the look-up the planner uses.

The planner sees only `seconds(...)`: a measured and an analytic device look alike. Between measured points it
interpolates linearly, in rows and in context; outside of them it refuses. Where products take rows in tiles, their
costs are a staircase: rows that were not measured count as those of the tiles they fill.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from dataclasses import dataclass
from typing import Annotated, Literal

from llmpq.spec.cluster import Link, check_links
from llmpq.spec.errors import NotMeasuredError
from llmpq.spec.model import KvBits
from llmpq.spec.precision import ActivationMode, Precision
from llmpq.spec.ranges import Bytes, Factor, Index, Parts, Range, Seconds, Slowdown
from llmpq.spec.record import Record, check

LEAST_S = 1e-12  # that an operation takes, if it takes any time: a solver cannot tell less from nothing
OpKind = Literal["linear", "experts", "attention", "layer_rest", "embedding", "head_rest", "step"]


@dataclass(frozen=True, slots=True)
class Op(Record):
    """What is timed. Meaning of the sizes, by kind:

    - linear: y[m, n] = x[m, k] @ w[n, k].T at `precision` in the mode `activations`, bias included.
    - experts: y[m, n] likewise, but each row by the weight of one of `context` experts, which are equally likely.
    - attention: one layer, m query tokens, each over `context` keys on average; n = heads * head_dim, k = kv heads *
      head_dim. Writing the cache is included.
    - layer_rest: a decoder layer without linears and attention, on m tokens; n = hidden_size, k = intermediate_size, of
      all experts of a token together; context = experts to choose from, with their router; 0: there are none.
    - embedding: m rows of a table [n, k] at `precision`.
    - head_rest: final norm and sampling (or scoring) of m rows over a vocabulary of n, without the head's linear.
    - step: what a stage spends once for each step, however many tokens.
    """

    kind: OpKind
    m: Index = 1
    n: Index = 0
    k: Index = 0
    context: Annotated[float, Range(0.0, 1e9)] = 0.0
    precision: Precision | None = None
    activations: ActivationMode = "a16"  # of a linear, and of experts
    kv_bits: KvBits = 16  # of the keys and values of attention


@dataclass(frozen=True, slots=True)
class CostRow(Record):
    """One measurement: an op under the conditions it will run in."""

    op: Op
    seconds: Annotated[float, Range(0.0, 1e6)]  # median
    backend: str
    dtype: str  # of the activations
    working_set_bytes: Bytes  # weights (or cache) rotated through while it was timed
    graphed: bool = False  # timed in replays of a CUDA graph, as a decode step is run

    def validate(self) -> None:
        measurable = self.seconds == 0 or self.seconds >= LEAST_S
        check(measurable, "seconds", f"is {self.seconds}, expected 0, or at least {LEAST_S}")


def _interpolate(points: list[tuple[float, float]], at: float) -> float | None:
    """Linear between the neighbours of `at` in points sorted by their first number; None outside of them."""
    if not points or not points[0][0] <= at <= points[-1][0]:
        return None
    i = bisect_left(points, (at, float("-inf")))
    (x1, y1) = points[i]
    if x1 == at:
        return y1
    (x0, y0) = points[i - 1]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def tiled_rows(m: int, tile: int) -> int:
    """m rows, filled up to whole tiles of `tile`, a power of two; if they are fewer, to the next power of two."""
    return -(-m // tile) * tile if m > tile else 1 << (m - 1).bit_length()


def _curve(op: Op) -> tuple[object, ...]:
    """All that tells operations apart but m and context. Who quantized a weight makes no difference."""
    return op.kind, op.precision and op.precision.layout, op.activations, op.kv_bits, op.n, op.k


@dataclass(frozen=True)
class CostTable(Record):
    """All measurements of one device."""

    device: str  # key: what the device is, its instruction set and its threads
    kernels: str  # version of the kernels that were timed
    threads: Parts
    isa: str | None
    overhead_bytes: Bytes  # memory of a working stage beyond weights, cache and buffers, above the idle worker
    rows: tuple[CostRow, ...]
    machine: str = ""  # processor or GPU, for readers
    date: str = ""
    scale: Factor = 1.0  # what the measured seconds of operations were multiplied by to fit runs (tuning/refitting.py)
    slowdown: Slowdown = 1.0  # of the device; all seconds include it
    message_s: Seconds = 0.0  # what a stage that is not alone spends on receiving and sending, for each step
    row_tile: Parts = 1  # rows of a product for which its weights are read once, a power of two; see tiled_rows

    def validate(self) -> None:
        check(self.row_tile & (self.row_tile - 1) == 0, "row_tile", f"is {self.row_tile}, expected a power of two")
        known: dict[Op, float] = {}
        for i, row in enumerate(self.rows):
            seconds = known.setdefault(row.op, row.seconds)
            check(seconds == row.seconds, f"rows[{i}].seconds", f"is {row.seconds}, but {seconds} in an earlier row")

    @functools.cached_property
    def _curves(self) -> dict[tuple[object, ...], dict[float, list[tuple[float, float]]]]:
        """`_curve` of an op -> m, rising -> points (context, seconds)."""
        curves: dict[tuple[object, ...], dict[float, list[tuple[float, float]]]] = {}
        for row in sorted(self.rows, key=lambda row: (row.op.m, row.op.context, row.seconds)):
            by_m = curves.setdefault(_curve(row.op), {})
            by_m.setdefault(row.op.m, []).append((row.op.context, row.seconds))
        return curves

    @functools.cached_property
    def _widths(self) -> dict[tuple[object, ...], set[int]]:
        """(kind, n, k) -> the bits it was measured in."""
        widths: dict[tuple[object, ...], set[int]] = {}
        for row in self.rows:
            if row.op.precision is not None:
                widths.setdefault((row.op.kind, row.op.n, row.op.k), set()).add(row.op.precision.bits)
        return widths

    @functools.cached_property
    def attention_backend(self) -> str | None:
        """The backend that attention was measured with, and so whatever is no product; None: it was not measured."""
        return next((row.backend for row in self.rows if row.op.kind == "attention"), None)

    def lacks(self, op: Op) -> bool:
        """Whether the device cannot run `op`, as its shape was measured in other widths and never in this one.

        In another form, such as other groups or another mode, it was measured; then `seconds` asks for a measurement.
        """
        widths = self._widths.get((op.kind, op.n, op.k))
        return op.precision is not None and widths is not None and op.precision.bits not in widths

    def seconds(self, op: Op) -> float:
        """Seconds of `op`. Raises NotMeasuredError outside the measured range."""
        by_m = self._curves.get(_curve(op), {})
        rows: float = op.m
        if self.row_tile > 1 and op.kind == "linear" and op.m > 0 and op.m not in by_m:
            rows = tiled_rows(op.m, self.row_tile)
        sizes = list(by_m)
        at = bisect_left(sizes, rows)
        # The neighbours are enough, unless this context was not measured at one of them.
        for near in (sizes[at : at + 1] if rows in by_m else sizes[max(0, at - 1) : at + 1], sizes):
            at_context = [(m, _interpolate(by_m[m], op.context)) for m in near]
            seconds = _interpolate([(m, s) for m, s in at_context if s is not None], rows)
            if seconds is not None:
                return seconds
        measured = f"m = {min(by_m)} to {max(by_m)} was measured" if by_m else "this shape was not measured"
        how = f"{op.precision or ''} in {op.activations}" if op.kv_bits == 16 else f"in a KV cache of {op.kv_bits} bits"
        raise NotMeasuredError(
            f"no cost of {op.kind} {how} m={op.m} n={op.n} k={op.k} "
            f"context={op.context:g} on {self.device}: {measured}; run `llmpq profile` for this model, "
            f"workload and {'quantizer' if op.kv_bits == 16 else f'--kv-bits {op.kv_bits}'}"
        )


@dataclass(frozen=True)
class Profile(Record):
    """What `llmpq profile` writes: a table for each device of a cluster, by the device's name, and its links."""

    SCHEMA = "llmpq.costs/2"

    tables: dict[str, CostTable]
    links: tuple[Link, ...]

    def validate(self) -> None:
        check_links(self.links)

    def link(self, source: str, target: str) -> Link:
        """The link from one named device to another. Raises NotMeasuredError."""
        if found := self._links.get((source, target)):
            return found
        raise NotMeasuredError(f"no link from {source} to {target} was measured; run `llmpq profile` for both devices")

    @functools.cached_property
    def _links(self) -> dict[tuple[str, str], Link]:
        """By its ends; of several the first."""
        return {(link.source, link.target): link for link in reversed(self.links)}

    def table(self, device: str) -> CostTable:
        """The table of a named device. Raises NotMeasuredError."""
        if device not in self.tables:
            raise NotMeasuredError(f"device {device} was not measured; run `llmpq profile` for it")
        return self.tables[device]
