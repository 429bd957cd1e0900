"""Measures for the shapes of a model where the two routes of a GPU's products cross; see llmpq/kernels/gemm_path.py.

Both are timed as they run in a model: in its dtype, and on the weights of one layer after the other, so that the L2
cache holds no more of them than it will. They run in CUDA graphs: what is compared is the GPU's work, not how fast it
is launched.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date

import torch

from llmpq.cache import keep_record
from llmpq.kernels import PreparedWeight, version
from llmpq.kernels.backends.dense import multiply_dequantized
from llmpq.kernels.gemm_path import KIND, LEAST_M, GemmPath, GemmPathTable, always_fused, find_table, forget, table_key
from llmpq.kernels.registry import choose, load
from llmpq.measure.cases import cold_bytes
from llmpq.measure.operation_clock import Clock
from llmpq.measure.random_layers import random_weight
from llmpq.spec import LinearShape, ModelSpec, Precision

ROWS = tuple(LEAST_M << i for i in range(9))  # up to 4096
_VISITS = 7  # the routes take turns, so that a bad moment of the machine does not meet one alone

Times = Mapping[int, float]  # m -> seconds


def crossing(fused: Times, dequantized: Times) -> int | None:
    """The least m from which on the dequantized route is faster at every m; None if it is not at the largest."""
    least = None
    for m in sorted(fused, reverse=True):
        if dequantized[m] >= fused[m]:
            break
        least = m
    return least


def missing(
    table: GemmPathTable, spec: ModelSpec, precisions: Sequence[Precision], backend: Callable[[Precision], str]
) -> list[tuple[Precision, LinearShape]]:
    """The products of a layer that the table lacks, of those that have two routes on their `backend`.

    The head is left out: it has a row for each sequence, not for each token.
    """
    known = {(row.backend, row.bits, row.group_size, row.n, row.k) for row in table.rows}
    shapes = {
        (shape.n, shape.k): shape for kind in spec.layer_kinds for shape in spec.linears_of(kind).values()
    }.values()
    return [
        (precision, shape)
        for precision in precisions
        if precision.quantized and hasattr(load(backend(precision)), "dequantize")
        for shape in shapes
        if (backend(precision), precision.bits, precision.group_size, shape.n, shape.k) not in known
    ]


@torch.inference_mode()
def measure_routes(spec: ModelSpec, precisions: Sequence[Precision], device: torch.device) -> None:
    """Add what is missing for a model to a CUDA device's table in the cache."""
    forget()  # what another process has added
    table = find_table(device) or GemmPathTable(
        device=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        kernels=version(),
        torch=torch.__version__,
        date=date.today().isoformat(),
        rows=(),
    )
    stored: torch.dtype = getattr(torch, spec.dtype)
    wanted = missing(table, spec, precisions, lambda precision: choose(device, precision, stored))
    if not wanted:
        return
    dtype: torch.dtype = getattr(torch, spec.compute_dtype(device.type))
    rows = [
        _route(random_weight(shape, precision, spec, device), spec.num_layers, dtype) for precision, shape in wanted
    ]
    torch.cuda.empty_cache()
    keep_record(KIND, table_key(device), replace(table, rows=(*table.rows, *rows)))
    forget()


def _route(w: PreparedWeight, layers: int, dtype: torch.dtype) -> GemmPath:
    """What is measured of a weight that each of `layers` has one of."""
    count = min(layers, -(-cold_bytes(w.device) // w.nbytes))
    copies = [w, *(replace(w, data=tuple(tensor.clone() for tensor in w.data)) for _ in range(count - 1))]
    fused, dequantized = zip(*(_seconds(copies, m, dtype) for m in ROWS), strict=True)
    least = crossing(dict(zip(ROWS, fused, strict=True)), dict(zip(ROWS, dequantized, strict=True)))
    return GemmPath(w.backend, w.precision.bits, w.precision.group_size, w.n, w.k, least)


def _seconds(copies: Sequence[PreparedWeight], m: int, dtype: torch.dtype) -> tuple[float, float]:
    """Of the fused and of the dequantized route for m rows, through all copies of a weight."""
    device = copies[0].device
    x = torch.randn(m, copies[0].k, dtype=dtype, device=device)
    out = torch.empty(m, copies[0].n, dtype=dtype, device=device)

    def fused(w: PreparedWeight) -> None:
        w.module.gemm(x, w, None, out, "a16")

    def dequantized(w: PreparedWeight) -> None:
        multiply_dequantized(x, w, None, out, w.module.dequantize)

    with always_fused():
        graphs = [_graph(fused, copies)]
    graphs.append(_graph(dequantized, copies))
    clock = Clock(device)
    visits = [[sum(clock.timed(graph.replay)) for graph in graphs] for _ in range(_VISITS)]
    first, second = map(statistics.median, zip(*visits, strict=True))
    return first, second


def _graph(call: Callable[[PreparedWeight], None], copies: Sequence[PreparedWeight]) -> torch.cuda.CUDAGraph:
    """A graph of one call for each copy of a weight."""
    call(copies[0])  # compiles, and has libraries make their workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in copies:
            call(each)
    return graph
