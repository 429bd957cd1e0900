"""One linear: every backend at every width and activation mode, beside torch's floating-point ones in the same group.

    pytest bench/kernels/bench_gemm.py --benchmark-columns=median,iqr,rounds [--device cuda] [--benchmark-json=FILE]

Weights are cold, as in a model: each call takes the next of several copies that together exceed the caches. On a GPU
the clock waits for the device, calls are queued as many as a round has, and shapes and numbers of rows are larger; what
the host does for each call counts there where the device is faster. `python -m bench.kernels.rivals_gpu` leaves that
out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.conftest import synced_clock
from bench.kernels.rivals.measure_gpu import rotated_bytes
from bench.kernels.shapes import BITS, GPU_ROWS, GPU_SHAPES, GROUP_SIZE, ROWS, SHAPES, SMALL_SHAPES
from llmpq.kernels import BACKENDS, available_backends, gemm, prepare
from llmpq.quant import quantize
from llmpq.spec import Precision
from llmpq.spec.precision import ACTIVATION_MODES

CPU_ROTATED_BYTES = 128 * 2**20
CPU_CALLS, GPU_CALLS = 3, 24  # in a round
DENSE = {"torch-float32": torch.float32, "torch-bfloat16": torch.bfloat16, "torch-float16": torch.float16}
# Only the CPU backend has more modes than a16.
OURS = {
    f"{backend}-w{bits}-{activations}": (backend, bits, activations)
    for backend in BACKENDS
    if backend != "reference"
    for bits in BITS
    for activations in (ACTIVATION_MODES if backend == "cpu" else ("a16",))
}


def contenders(on_gpu: bool) -> list[str]:
    """Those that run there; not triton's interpreter on the CPU, which is not for timing."""
    dense = ("torch-bfloat16", "torch-float16") if on_gpu else ("torch-float32", "torch-bfloat16")
    return [*dense, *(name for name, (backend, _, _) in OURS.items() if (backend == "cpu") != on_gpu)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    on_gpu = metafunc.config.getoption("--device").startswith("cuda")
    metafunc.parametrize("shape", GPU_SHAPES if on_gpu else SHAPES)
    metafunc.parametrize("m", GPU_ROWS if on_gpu else ROWS)
    metafunc.parametrize("contender", contenders(on_gpu))


def enough_bytes(device: torch.device) -> int:
    """That the copies of a weight have together at least, so that each is cold when its turn comes."""
    if device.type == "cpu":
        return CPU_ROTATED_BYTES
    return rotated_bytes(torch.cuda.get_device_properties(device).L2_cache_size)


def linears(contender: str, weight: torch.Tensor, timed: bool) -> tuple[list[Callable[..., torch.Tensor]], int]:
    """The contender's product with each copy of its weight, and the bytes of one copy."""

    def copies(size: int) -> range:
        return range(-(-enough_bytes(weight.device) // size) if timed else 1)

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


@pytest.mark.benchmark(timer=synced_clock)
def test_gemm_seconds(benchmark: Any, device: torch.device, timed: bool, shape: str, m: int, contender: str) -> None:
    """x is in the dtype that the contender computes in: the one in torch's name, for ours bfloat16 on a GPU."""
    if not timed and shape not in SMALL_SHAPES:
        pytest.skip("bodies are only run, and a small shape does for that")
    on_gpu = device.type != "cpu"
    n, k = GPU_SHAPES[shape] if on_gpu else SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(n, k, generator=generator, device=device) / k**0.5
    functions, weight_bytes = linears(contender, weight, timed)
    dtype = DENSE.get(contender, torch.bfloat16 if on_gpu else torch.float32)
    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
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
    calls = GPU_CALLS if on_gpu else CPU_CALLS
    with torch.inference_mode():
        y = benchmark.pedantic(lambda: next(rotation)(x), rounds=30, iterations=calls, warmup_rounds=2)
    assert y.shape == (m, n)
