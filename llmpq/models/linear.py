"""The linears of a decoder: whose weights a kernel backend holds, one or one for each expert; and in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from llmpq import kernels
from llmpq.spec import ActivationMode


class Linear(nn.Module):
    """y [..., n] = x [..., k] @ weight.T + bias + residual, in x's dtype, written to `out` if that is given."""

    __call__: Callable[..., torch.Tensor]
    bias: torch.Tensor | None

    def __init__(self, n: int, k: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = n, k
        self.register_buffer("bias", bias)


class QuantLinear(Linear):
    """One that serves: the weight at any precision, 16 bit included."""

    def __init__(
        self, weight: kernels.PreparedWeight, bias: torch.Tensor | None = None, activations: ActivationMode = "a16"
    ) -> None:
        super().__init__(weight.n, weight.k, bias)
        self.weight = weight
        self.activations = weight.precision.multiplied(activations)

    def forward(
        self, x: torch.Tensor, out: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        return kernels.gemm(x, self.weight, bias=self.bias, residual=residual, out=out, activations=self.activations)

    def extra_repr(self) -> str:
        w = self.weight
        return f"n={w.n}, k={w.k}, {w.precision}, {w.backend}, bias={self.bias is not None}"


class ExpertLinear(nn.Module):
    """The same linear of every expert: row i * K + j of y [t * K, n] is that of token i's j-th expert.

    x is [t, k], or [t * K, k] where each expert has a row of its own; experts int32 [t, K].
    """

    __call__: Callable[..., torch.Tensor]
    biases: torch.Tensor | None  # [experts, n]

    def __init__(
        self,
        weights: Sequence[kernels.PreparedWeight],
        biases: torch.Tensor | None = None,
        activations: ActivationMode = "a16",
    ) -> None:
        super().__init__()
        self.register_buffer("biases", biases)
        self.weights = kernels.ExpertWeights(weights)
        self.out_features, self.in_features = weights[0].n, weights[0].k
        self.activations = weights[0].precision.multiplied(activations)

    def forward(self, x: torch.Tensor, experts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return kernels.grouped_gemm(x, self.weights, experts, biases=self.biases, out=out, activations=self.activations)

    def extra_repr(self) -> str:
        w, bias = self.weights[0], self.biases is not None
        return f"experts={len(self.weights)}, n={w.n}, k={w.k}, {w.precision}, {w.backend}, bias={bias}"


class DenseLinear(Linear):
    """One of a pass that looks at the model: a float32 weight [n, k], multiplied by torch."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.weight = weight

    def forward(
        self, x: torch.Tensor, out: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        y = torch.matmul(x, self.weight.T, out=out)
        y = y if self.bias is None else y.add_(self.bias)
        return y if residual is None else y.add_(residual)
