"""PyTorch's own on a GPU: cuBLAS on 16-bit weights, and int4 weights with bfloat16 activations."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bench.kernels.rivals import Contender, Problem, in_turn

_INNER_TILES = 8  # of 16 codes each along k that lie together; what torchao packs with


def contender(problem: Problem, kind: str) -> Contender:
    return {"cublas": _cublas, "int4pack": _int4pack}[kind](problem)


def _cublas(problem: Problem) -> Contender:
    weights = problem.rotated(problem.weight.to(problem.dtype))
    linears = [lambda x, w=w: F.linear(x, w) for (w,) in weights]
    return Contender(weights[0][0].nbytes, len(weights), lambda: weights[0][0], in_turn(linears))


def _int4pack(problem: Problem) -> Contender:
    """w = (code - 8) * scale + zero, with zero 0 here; of two codes in a byte the first is in the high nibble."""
    if problem.dtype != torch.bfloat16:
        raise ValueError(f"takes bfloat16 alone, not {problem.dtype}")
    codes, scales = problem.codes(4)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], _INNER_TILES)
    scales = scales.bfloat16()
    with_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    weights = problem.rotated(packed, with_zeros)
    linear, group_size = torch.ops.aten._weight_int4pack_mm, problem.group_size
    linears = [lambda x, w=w: linear(x, w[0], group_size, w[1]) for w in weights]
    nbytes = packed.nbytes + with_zeros.nbytes
    return Contender(nbytes, len(weights), problem.quantized(4).dequantize, in_turn(linears))
