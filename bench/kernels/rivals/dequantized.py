"""What no fused kernel should be slower than: our own dequantization to 16 bits, then cuBLAS."""

from __future__ import annotations

import torch

from bench.kernels.rivals import Contender, Problem, in_turn
from bench.kernels.rivals.ours import GPU_BACKENDS, prepared
from llmpq.kernels import PreparedWeight, available_backends
from llmpq.kernels.backends.dense import multiply_dequantized


def contender(problem: Problem, bits: int) -> Contender:
    """On the better of our backends. Raises ImportError if there is none."""
    reasons = available_backends()
    backend = next((name for name in GPU_BACKENDS if reasons[name] is None), None)
    if backend is None:
        raise ImportError("; ".join(f"{name}: {reasons[name]}" for name in GPU_BACKENDS))
    weights = prepared(problem, bits, backend)

    def linear(x: torch.Tensor, w: PreparedWeight) -> torch.Tensor:
        out = x.new_empty(len(x), w.n)
        multiply_dequantized(x, w, None, out, w.module.dequantize)
        return out

    linears = [lambda x, w=w: linear(x, w) for w in weights]
    return Contender(weights[0].nbytes, len(weights), problem.quantized(bits).dequantize, in_turn(linears))
