"""auto-round-lib's weight-only product, exact: it multiplies in float32 at every width."""

from __future__ import annotations

from collections.abc import Callable

import auto_round_kernel
import torch

from bench.kernels.rivals import Contender, Problem


def contender(problem: Problem, bits: int) -> Contender:
    n, k = problem.shape
    codes, scales = problem.codes(bits)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).T.contiguous()
    types = ("fp32", f"int{bits}", "fp32")  # of the computation, the weight and the scales
    nothing = torch.empty(0)
    packed = auto_round_kernel.repack_quantized_weight(
        signed, scales.T.contiguous(), torch.empty(0, dtype=torch.int8), problem.group_size, *types, False
    )
    weights = [packed, *(packed.clone() for _ in range(problem.copies(packed.nbytes) - 1))]

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        ys = [torch.empty(len(x), n), *[torch.empty(len(x), n)] * (len(weights) - 1)]  # the first is kept

        def sweep() -> torch.Tensor:
            for w, y in zip(weights, ys):
                auto_round_kernel.woqgemm(x, w, nothing, n, k, problem.group_size, *types, False, out=y)
            return ys[0]

        return sweep

    return Contender(packed.nbytes, len(weights), lambda: problem.quantized(bits).dequantize(), bind)
