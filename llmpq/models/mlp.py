"""The MLP of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from llmpq import kernels
from llmpq.models.arena import Arena
from llmpq.models.loading import UnitLoader
from llmpq.spec import ModelSpec, Precision


class MLP(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) with gate and up in one linear.

    `prefix` begins the names of its linears in ModelSpec.linears: "", or that of an expert that all tokens go through.
    """

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self, spec: ModelSpec, loader: UnitLoader, unit: str, precisions: Mapping[str, Precision], prefix: str = ""
    ) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated_mlp
        self.up, self.down = (loader.linear(unit, name, precisions[name]) for name in (f"{prefix}up", f"{prefix}down"))

    def forward(self, x: torch.Tensor, arena: Arena, residual: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """The MLP of x [t, hidden_size], added to `residual` if that is given, in `out`, which may be x."""
        up = self.up(x, arena.empty(len(x), self.up.out_features))
        return self.down(kernels.activate_(up, self.activation, self.gated), out, residual)
