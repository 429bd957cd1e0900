"""This project's kernels: one weight, and a contender for each way to multiply activations with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch

from bench.kernels.rivals import Contender, Problem
from bench.markdown import product
from llmpq.kernels import PreparedWeight, gemm, prepare
from llmpq.spec.precision import ACTIVATION_MODES, ZeroKind

BITS = (3, 4, 8)
WEIGHTS: tuple[tuple[int, ZeroKind], ...] = tuple((bits, "sym") for bits in BITS)  # bits, zeros
ZEROS: tuple[tuple[int, ZeroKind], ...] = tuple((4, zero) for zero in get_args(ZeroKind))
GPU_BACKENDS = ("cuda", "triton")


def name(bits: int, activations: str, zero: ZeroKind = "sym") -> str:
    """On the CPU."""
    return "llmpq " + product({"bits": bits, "zero": zero, "activations": activations})


def gpu_name(bits: int, backend: str) -> str:
    return f"llmpq {backend} int{bits}"


def contenders(problem: Problem, bits: int, zero: ZeroKind = "sym") -> dict[str, Contender]:
    """Every mode there is on the CPU, all on the same copies of the weight."""
    weights = prepared(problem, bits, "cpu", zero)
    return {name(bits, mode, zero): _contender(problem, bits, weights, mode, zero) for mode in ACTIVATION_MODES}


def gpu_contender(problem: Problem, bits: int, backend: str) -> Contender:
    """Raises ValueError where the backend is not available."""
    return _contender(problem, bits, prepared(problem, bits, backend), "a16")


def prepared(problem: Problem, bits: int, backend: str, zero: ZeroKind = "sym") -> list[PreparedWeight]:
    """The problem's weight on a backend, in as many copies as there are to be. Raises ValueError."""
    quantized = problem.quantized(bits, zero)
    first = prepare(quantized, problem.weight.device, backend=backend)
    others = range(problem.copies(first.nbytes) - 1)
    return [first, *(prepare(quantized, problem.weight.device, backend=backend) for _ in others)]


def _contender(
    problem: Problem, bits: int, weights: list[PreparedWeight], activations: str, zero: ZeroKind = "sym"
) -> Contender:
    return Contender(
        weights[0].nbytes,
        len(weights),
        problem.quantized(bits, zero).dequantize,
        lambda x: _bind(x, weights, activations),
        lambda x: gemm(x, weights[0], activations=activations),
    )


def _bind(x: torch.Tensor, weights: list[PreparedWeight], activations: str) -> Callable[[], torch.Tensor]:
    first, *others = weights
    y, other_y = x.new_empty(len(x), first.n), x.new_empty(len(x), first.n)

    def sweep() -> torch.Tensor:
        gemm(x, first, activations=activations, out=y)
        for w in others:
            gemm(x, w, activations=activations, out=other_y)
        return y

    return sweep
