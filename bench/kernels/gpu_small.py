"""Small products on every GPU backend, each checked: few enough for compute-sanitizer to look at every access.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.kernels.gpu_small
"""

from __future__ import annotations

import itertools
import sys
from typing import get_args

import torch

from bench.kernels.rivals.ours import BITS, GPU_BACKENDS
from bench.kernels.rivals.timing import relative_error
from llmpq.kernels import available_backends, gemm, prepare
from llmpq.quant import quantize
from llmpq.spec import Precision
from llmpq.spec.precision import ZeroKind

ROWS = (1, 5, 16, 33, 70)
# n, k, group: whole and ragged panels, blocks and groups; and enough for blocks that use shared memory again and again
SHAPES = ((16, 32, 64), (70, 300, 64), (200, 576, 128), (100, 12000, 128), (100, 12000, 32))
LARGEST_ERROR = 1e-2


def wrong(backend: str, device: str = "cuda") -> list[str]:
    """The products whose error is too large, in words."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for bits, zero, (n, k, group), dtype in itertools.product(
        BITS, get_args(ZeroKind), SHAPES, (torch.float16, torch.bfloat16)
    ):
        quantized = quantize(torch.randn(n, k, generator=generator), Precision(bits, group, zero), scale_dtype=dtype)
        weight = prepare(quantized, device, backend=backend)
        exact = quantized.dequantize().double()
        for m in ROWS:
            x = torch.randn(m, k, generator=generator).to(dtype)
            error = relative_error(gemm(x.to(device), weight).cpu(), x.double() @ exact.T)
            if not error < LARGEST_ERROR:
                found.append(f"{backend} {quantized.precision} {dtype} n = {n}, k = {k}, m = {m}: error {error:.1e}")
    return found


def main() -> int:
    missing = {name: reason for name, reason in available_backends().items() if name in GPU_BACKENDS and reason}
    faults = [f"{name}: {reason}" for name, reason in missing.items()]
    for backend in GPU_BACKENDS:
        if backend not in missing:
            faults += wrong(backend)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
