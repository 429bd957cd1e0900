"""gemlite's Triton kernels, with the settings that it ships for the device, or else tunes at the first call."""

from __future__ import annotations

import torch
from gemlite import DType, GemLiteLinear

from bench.kernels.rivals import Contender, Problem, in_turn

_DTYPES = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}


def contender(problem: Problem, bits: int) -> Contender:
    """One zero for all weights: its symmetric format."""
    n, k = problem.shape
    codes, scales = problem.codes(bits)
    scales = scales.to(problem.dtype)
    dtype = _DTYPES[problem.dtype]

    def pack() -> GemLiteLinear:
        layer = GemLiteLinear(
            bits, group_size=problem.group_size, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype
        )
        return layer.pack(codes, scales, 2 ** (bits - 1))

    first = pack()
    nbytes = first.W_q.nbytes + first.scales.nbytes
    layers = [first, *(pack() for _ in range(problem.copies(nbytes) - 1))]
    return Contender(nbytes, len(layers), problem.quantized(bits).dequantize, in_turn(layers))
