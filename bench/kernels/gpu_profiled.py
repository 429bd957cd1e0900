"""Three products on a GPU between cudaProfilerStart and cudaProfilerStop, for a profiler that waits for these:

ncu --clock-control none --profile-from-start off python -m bench.kernels.gpu_profiled [--backend cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.kernels.rivals.ours import GPU_BACKENDS
from llmpq.kernels import gemm, prepare
from llmpq.measure.random_layers import random_rows
from llmpq.spec import LinearShape, Precision

PRODUCTS = ((4, 1, 8192, 8192), (3, 1, 28672, 8192), (4, 64, 8192, 8192))  # bits, m, n, k
COLD_BYTES = 256 * 2**20  # more than an L2 cache holds: what is written takes the place of the weight


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=GPU_BACKENDS, default="cuda")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments, device = parse(argv), torch.device("cuda")
    other = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)
    for bits, m, n, k in PRODUCTS:
        with device:
            rows = random_rows(LinearShape(n, k), Precision(bits, 128), torch.bfloat16)
        weight = prepare(rows, device, backend=arguments.backend)
        x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
        y = gemm(x, weight)  # loads and compiles what there is to
        other.zero_()
        torch.cuda.synchronize()
        print(f"int{bits} m = {m}, n = {n}, k = {k}", flush=True)
        torch.cuda.profiler.start()
        gemm(x, weight, out=y)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
