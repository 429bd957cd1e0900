"""QuantLinear: a linear whose weight is held as a kernel backend wants it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from llmpq import kernels
from llmpq.spec import ActivationMode


class QuantLinear(nn.Module):
    """y [..., n] = x [..., k] @ weight.T + bias, in x's dtype; the weight at any precision, 16 bit included."""

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self, weight: kernels.PreparedWeight, bias: torch.Tensor | None = None, activations: ActivationMode = "a16"
    ) -> None:
        super().__init__()
        self.weight = weight
        self.activations = weight.precision.multiplied(activations)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return kernels.gemm(x, self.weight, bias=self.bias, out=out, activations=self.activations)

    def extra_repr(self) -> str:
        w = self.weight
        return f"n={w.n}, k={w.k}, {w.precision}, {w.backend}, bias={self.bias is not None}"
