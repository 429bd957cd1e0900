"""`llmpq::gemm`: the product as an operator, so that torch.compile has it as one node of a graph, for any m.

An operator takes tensors and plain values, so a weight goes in as the tensors that it consists of and what describes
them. Only compiled graphs call it: to an eager call, torch's dispatch would add as much time as a small product takes.
"""

from __future__ import annotations

import functools

import torch

from llmpq.kernels.weight import PreparedWeight
from llmpq.spec import Precision
from llmpq.spec.precision import ZeroKind

_precision = functools.lru_cache(Precision)
_library = torch.library.Library("llmpq", "DEF")
_library.define(
    "gemm(Tensor x, Tensor[] data, Tensor? bias, str backend, int n, int k, int bits, int? group_size, "
    "str zero, str activations) -> Tensor"
)


def _multiply(
    x: torch.Tensor,
    data: list[torch.Tensor],
    bias: torch.Tensor | None,
    backend: str,
    n: int,
    k: int,
    bits: int,
    group_size: int | None,
    zero: ZeroKind,
    activations: str,
) -> torch.Tensor:
    """What a graph runs: the product with a weight put together again, checks included."""
    from llmpq.kernels import gemm  # which itself stands on this file

    dtype = data[0 if bits == 16 else 1].dtype
    precision = _precision(bits, group_size, zero)
    w = PreparedWeight(backend, n, k, precision, dtype, data[0].device, tuple(data))
    return gemm(x, w, bias=bias, activations=activations)


def _describe(
    x: torch.Tensor, data: list[torch.Tensor], bias: torch.Tensor | None, backend: str, n: int, *_: object
) -> torch.Tensor:
    """What a graph is made with: a result without values."""
    return x.new_empty((*x.shape[:-1], n))


_library.impl("gemm", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("llmpq::gemm", _describe, lib=_library)


def gemm(x: torch.Tensor, w: PreparedWeight, bias: torch.Tensor | None, activations: str) -> torch.Tensor:
    """The node that stands for `llmpq.kernels.gemm` of these. What that would refuse is refused when the graph runs."""
    p = w.precision
    y: torch.Tensor = torch.ops.llmpq.gemm(
        x, list(w.data), bias, w.backend, w.n, w.k, p.bits, p.group_size, p.zero, activations
    )
    return y
