"""This project's kernels: one weight, and a contender for each way to multiply activations with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.rivals import Contender, Problem
from llmpq.kernels import PreparedWeight, gemm, prepare
from llmpq.spec.precision import ACTIVATION_MODES

BITS = (3, 4, 8)


def name(bits: int, activations: str) -> str:
    return f"llmpq int{bits} {activations}"


def contenders(problem: Problem, bits: int) -> dict[str, Contender]:
    """Every mode there is, all on the same copies of the weight."""
    quantized = problem.quantized(bits)
    first = prepare(quantized, backend="cpu")
    weights = [first, *(prepare(quantized, backend="cpu") for _ in range(problem.copies(first.nbytes) - 1))]
    return {
        name(bits, activations): Contender(
            first.nbytes, len(weights), quantized.dequantize, lambda x, a=activations: _bind(x, weights, a)
        )
        for activations in ACTIVATION_MODES
    }


def _bind(x: torch.Tensor, weights: list[PreparedWeight], activations: str) -> Callable[[], torch.Tensor]:
    first, *others = weights
    y, other_y = torch.empty(len(x), first.n), torch.empty(len(x), first.n)

    def sweep() -> torch.Tensor:
        gemm(x, first, activations=activations, out=y)
        for w in others:
            gemm(x, w, activations=activations, out=other_y)
        return y

    return sweep
