"""The linears of a decoder: one whose weight a kernel backend holds, and one in plain torch."""

from __future__ import annotations

from collections.abc import Callable

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
