"""zentorch's dynamic_qlinear, int8 per row of x: weights int8 per output channel, or int4 per group (its DA8W4)."""

from __future__ import annotations

import torch
import zentorch  # noqa: F401  (registers torch.ops.zentorch)

from bench.kernels.rivals import Contender, Problem, in_turn
from llmpq.quant import quantize
from llmpq.spec import Precision


def contender(problem: Problem, bits: int) -> Contender:
    if bits == 4:
        quantized = problem.quantized(4)
        codes, scales = problem.codes(4)
        signed = codes ^ 8
        fields = (signed[:, ::2] | signed[:, 1::2] << 4).view(torch.int8)
        scales, dtype = scales.T.contiguous(), torch.bfloat16  # of x: it takes no float32 here
    else:
        quantized = quantize(problem.weight, Precision(8))
        fields = (quantized.qweight.view(torch.uint8)[:, : problem.shape[1]] ^ 128).view(torch.int8).contiguous()
        scales, dtype = quantized.scales.float().ravel(), torch.float32
    nbytes = fields.nbytes + scales.nbytes
    weights = [fields.clone() for _ in range(problem.copies(nbytes))]
    linear = torch.ops.zentorch.zentorch_dynamic_qlinear
    linears = [lambda x, w=w: linear(x, w, scales) for w in weights]
    return Contender(nbytes, len(weights), quantized.dequantize, in_turn(linears, dtype))
