"""PyTorch's own: floating-point linears, int4 weights with bfloat16 activations, int8 weights and activations."""

from __future__ import annotations

import warnings

import torch
from torch.nn import functional as F

from bench.kernels.rivals import Contender, Problem, in_turn


def contender(problem: Problem, kind: str) -> Contender:
    make = {"int4pack": _int4pack, "dynamic": _dynamic}
    return make[kind](problem) if kind in make else _dense(problem, getattr(torch, kind))


def _dense(problem: Problem, dtype: torch.dtype) -> Contender:
    weight = problem.weight.to(dtype)
    weights = [weight.clone() for _ in range(problem.copies(weight.nbytes))]
    linears = [lambda x, w=w: F.linear(x, w) for w in weights]
    return Contender(weight.nbytes, len(weights), lambda: weight, in_turn(linears, dtype))


def _int4pack(problem: Problem) -> Contender:
    """w = (code - 8) * scale + zero, with zero 0 here."""
    k = problem.shape[1]
    codes, scales = problem.codes(4)
    scales = scales.bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    with_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()
    nbytes = packed.nbytes + with_zeros.nbytes
    linear, group_size = torch.ops.aten._weight_int4pack_mm_for_cpu, problem.group_size
    weights = [(packed.clone(), with_zeros.clone()) for _ in range(problem.copies(nbytes))]
    linears = [lambda x, w=w: linear(x, w[0], group_size, w[1]) for w in weights]

    def weight() -> torch.Tensor:
        return (codes.float() - 8) * scales.float().repeat_interleave(group_size, 1)[:, :k]

    return Contender(nbytes, len(weights), weight, in_turn(linears, torch.bfloat16))


def _dynamic(problem: Problem) -> Contender:
    """Per output channel; the activations per tensor."""
    scales = problem.weight.abs().amax(1).double() / 127
    zeros = torch.zeros(problem.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that such tensors will be removed one day
        quantized = torch.quantize_per_channel(problem.weight, scales, zeros, 0, torch.qint8)
    nbytes = quantized.numel() + 4 * len(scales)
    copies = problem.copies(nbytes)
    packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(copies)]
    linears = [lambda x, w=w: torch.ops.quantized.linear_dynamic(x, w) for w in packed]
    return Contender(nbytes, copies, quantized.dequantize, in_turn(linears, torch.float32))
