"""A mixture of experts in the place of a decoder layer's MLP (arXiv 1701.06538)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from llmpq import kernels
from llmpq.models.arena import Arena
from llmpq.models.loading import UnitLoader
from llmpq.models.mlp import MLP
from llmpq.spec import Experts, ModelSpec, Precision


class Mixture(nn.Module):
    """Sum over a token's experts e of weight_e * MLP_e(x), and sigmoid(gate(x)) times that of a shared expert.

    A router chooses the experts of each token. Tokens are grouped by expert within the products.
    """

    __call__: Callable[..., torch.Tensor]

    def __init__(
        self,
        spec: ModelSpec,
        loader: UnitLoader,
        unit: str,
        experts: Experts,
        precisions: Mapping[str, Precision],
    ) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated_mlp
        self.per_token, self.normalized = experts.per_token, experts.normalized
        self.router = loader.plain(unit, "router")
        self.up, self.down = (loader.experts(unit, name, precisions[name]) for name in ("up", "down"))
        self.shared_gate = loader.plain(unit, "shared_gate") if experts.shared_size else None
        self.gates = 1 if experts.shared_size else 0
        self.shared = MLP(spec, loader, unit, precisions, "shared_") if experts.shared_size else None

    def forward(self, x: torch.Tensor, arena: Arena, residual: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
        """The mixture of x [t, hidden_size], added to `residual`, in `out`, which may be x. Raises ValueError."""
        if residual is None:
            raise ValueError("a mixture of experts whose result is not added to something is not supported")
        tokens, width = x.shape
        # All of four bytes come first, where an arena of two has them in their places.
        routed, gated = (self._choices(arena, tokens, count) for count in (self.per_token, self.gates))
        logits = self.router(x, arena.empty(tokens, self.router.out_features))
        experts, weights = kernels.route(logits, self.per_token, self.normalized, out=routed)

        def rows(size: int) -> torch.Tensor:
            """One for each expert of each token."""
            return arena.empty(tokens, self.per_token, size).view(-1, size)

        up = self.up(x, experts, rows(self.up.out_features))
        y = self.down(kernels.activate_(up, self.activation, self.gated), experts, rows(width))
        if self.shared is None or self.shared_gate is None:
            return kernels.combine(y, weights, residual, out)
        _, gate = kernels.route(self.shared_gate(x, arena.empty(tokens, 1)), 1, False, sigmoid=True, out=gated)
        shared = self.shared(x, arena, None, arena.empty(tokens, width))
        return kernels.combine(shared, gate, kernels.combine(y, weights, residual, out), out)

    def waits(self, tokens: int) -> bool:
        """Whether the host waits for the device in a step of so many tokens, so that no graph of it can be captured."""
        pairs, weights = tokens * self.per_token, (self.up.weights[0], self.down.weights[0])
        return any(pairs > kernels.grouped_pairs(w.device, w.precision) for w in weights)

    @staticmethod
    def _choices(arena: Arena, tokens: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `count` experts of each token, and their weights."""
        return arena.empty(tokens, count, dtype=torch.int32), arena.empty(tokens, count, dtype=torch.float32)
