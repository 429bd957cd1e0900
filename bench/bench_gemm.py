"""One linear: every backend at every width and activation mode, beside torch's float32 and bfloat16 in the same group.

    pytest bench/bench_gemm.py --benchmark-columns=median,iqr,rounds [--device cuda] [--benchmark-json=FILE]

Weights are cold, as in a model: each call takes the next of several copies that together exceed the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.shapes import BITS, GROUP_SIZE, ROWS, SHAPES, SMALL_SHAPES
from llmpq.kernels import BACKENDS, available_backends, gemm, prepare
from llmpq.quant import quantize
from llmpq.spec import Precision
from llmpq.spec.precision import ACTIVATION_MODES

ROTATED_BYTES = 128 * 2**20
DENSE = {"torch-float32": torch.float32, "torch-bfloat16": torch.bfloat16}
# Only the CPU backend has more modes than a16.
OURS = {
    f"{backend}-w{bits}-{activations}": (backend, bits, activations)
    for backend in BACKENDS
    if backend != "reference"
    for bits in BITS
    for activations in (ACTIVATION_MODES if backend == "cpu" else ("a16",))
}
CONTENDERS = [*DENSE, *OURS]


def linears(contender: str, weight: torch.Tensor, timed: bool) -> tuple[list[Callable[..., torch.Tensor]], int]:
    """The contender's product with each copy of its weight, and the bytes of one copy."""

    def copies(size: int) -> range:
        return range(-(-ROTATED_BYTES // size) if timed else 1)

    if contender in DENSE:
        dense = weight.to(DENSE[contender])
        weights = [dense.clone() for _ in copies(dense.nbytes)]
        return [lambda x, w=w: F.linear(x, w) for w in weights], dense.nbytes
    backend, bits, activations = OURS[contender]
    if reason := available_backends()[backend]:
        pytest.skip(f"backend {backend} is not available: {reason}")
    quantized = quantize(weight, Precision(bits, GROUP_SIZE))
    try:
        first = prepare(quantized, weight.device, backend=backend)
    except ValueError as error:
        pytest.skip(str(error))
    prepared = [first, *(prepare(quantized, weight.device, backend=backend) for _ in copies(first.nbytes)[1:])]
    return [lambda x, w=w: gemm(x, w, activations=activations) for w in prepared], first.nbytes


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm_seconds(benchmark: Any, device: torch.device, timed: bool, shape: str, m: int, contender: str) -> None:
    """x is in the dtype that the contender computes in: bfloat16 for torch's, and for ours on a GPU."""
    if not timed and shape not in SMALL_SHAPES:
        pytest.skip("bodies are only run, and a small shape does for that")
    if contender.startswith("triton") and device.type == "cpu":
        pytest.skip("triton's interpreter is not for timing")
    n, k = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).to(device)
    functions, weight_bytes = linears(contender, weight, timed)
    dtype = DENSE.get(contender, torch.float32 if device.type == "cpu" else torch.bfloat16)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    rotation = cycle(functions)
    benchmark.group = f"{shape} n={n} k={k} m={m}"
    benchmark.extra_info.update(
        contender=contender,
        m=m,
        n=n,
        k=k,
        group_size=None if contender in DENSE else GROUP_SIZE,
        bytes=weight_bytes + x.nbytes + m * n * x.element_size(),
        flops=2 * m * n * k,
    )
    with torch.inference_mode():
        y = benchmark.pedantic(lambda: next(rotation)(x), rounds=30, iterations=3, warmup_rounds=2)
    assert y.shape == (m, n)
