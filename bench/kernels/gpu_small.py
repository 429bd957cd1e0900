"""Small products on every GPU backend, each checked.

    python -m bench.kernels.gpu_small [--backends cuda] [--few]

With --few there are so few that compute-sanitizer can look at every access:

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.kernels.gpu_small --few
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import get_args

import torch

from bench.kernels.rivals.command_line import one_of
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


def wrong(backend: str, device: str = "cuda", *, few: bool = False) -> list[str]:
    """The products whose error is too large, in words."""
    generator = torch.Generator().manual_seed(0)
    zeros, shapes, rows = (get_args(ZeroKind), SHAPES, ROWS) if not few else (("asym",), SHAPES[1::2], ROWS[::4])
    dtypes = (torch.float16, torch.bfloat16) if not few else (torch.bfloat16,)
    found = []
    for bits, zero, (n, k, group), dtype in itertools.product(BITS, zeros, shapes, dtypes):
        quantized = quantize(torch.randn(n, k, generator=generator), Precision(bits, group, zero), scale_dtype=dtype)
        weight = prepare(quantized, device, backend=backend)
        exact = quantized.dequantize().double()
        for m in rows:
            x = torch.randn(m, k, generator=generator).to(dtype)
            error = relative_error(gemm(x.to(device), weight).cpu(), x.double() @ exact.T)
            if not error < LARGEST_ERROR:
                found.append(f"{backend} {quantized.precision} {dtype} n = {n}, k = {k}, m = {m}: error {error:.1e}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", type=one_of(GPU_BACKENDS), default=list(GPU_BACKENDS), metavar="NAME,...")
    parser.add_argument("--few", action="store_true", help="12 products for each backend")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    reasons = available_backends()
    faults = []
    for backend in arguments.backends:
        found = [f"{backend}: {reason}"] if (reason := reasons[backend]) else wrong(backend, few=arguments.few)
        print(f"{backend}: {len(found)} faults", *found, sep="\n", flush=True)
        faults += found
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
