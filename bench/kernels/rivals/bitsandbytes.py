"""bitsandbytes' NF4: sixteen levels that suit a normal distribution, and a float32 scale for each group."""

from __future__ import annotations

import copy

from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from bench.kernels.rivals import Contender, Problem, in_turn


def contender(problem: Problem) -> Contender:
    packed, state = quantize_4bit(problem.weight, blocksize=problem.group_size, quant_type="nf4")
    nbytes = packed.nbytes + state.absmax.nbytes
    weights = [(packed, state)]
    for _ in range(problem.copies(nbytes) - 1):
        other = copy.copy(state)
        other.absmax = state.absmax.clone()
        weights.append((packed.clone(), other))
    linears = [lambda x, w=w: matmul_4bit(x, w[0], w[1]) for w in weights]
    return Contender(nbytes, len(weights), lambda: dequantize_4bit(packed, state), in_turn(linears))
