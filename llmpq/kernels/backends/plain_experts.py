"""The operations of a mixture of experts in plain torch, for the backends that have no kernels for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq.kernels.weight import PreparedWeight


def route(logits: torch.Tensor, normalized: bool, sigmoid: bool, experts: torch.Tensor, weights: torch.Tensor) -> None:
    """As `llmpq.kernels.route` says."""
    scores = logits.float()
    # Stable: of equal ones the first. (torch.topk takes any.)
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, : experts.shape[1]]
    parts = scores.sigmoid().gather(-1, chosen) if sigmoid else scores.softmax(-1).gather(-1, chosen)
    experts.copy_(chosen)
    weights.copy_(parts / parts.sum(-1, keepdim=True) if normalized else parts)


def grouped_gemm(
    x: torch.Tensor,
    weights: Sequence[PreparedWeight],
    experts: torch.Tensor,
    biases: torch.Tensor | None,
    out: torch.Tensor,
    activations: str,
) -> None:
    """As `llmpq.kernels.grouped_gemm` says, by the backend's `gemm` for each expert that has tokens.

    The host waits to know which these are, so it cannot be captured in a CUDA graph.
    """
    gemm, choices = weights[0].module.gemm, experts.flatten()
    for expert in choices.unique().tolist():
        if not 0 <= expert < len(weights):
            raise ValueError(f"experts names {expert}, but there are {len(weights)}")
        pairs = (choices == expert).nonzero()[:, 0]
        rows = x[pairs if len(x) == len(choices) else pairs // experts.shape[1]]
        y = torch.empty(len(rows), out.shape[1], dtype=out.dtype, device=out.device)
        gemm(rows, weights[expert], None if biases is None else biases[expert], y, activations)
        out[pairs] = y


def combine(y: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
    """As `llmpq.kernels.combine` says."""
    choices = y.view(len(out), -1, y.shape[1])
    total = choices[:, 0].float() * weights[:, :1]
    for j in range(1, weights.shape[1]):
        total += choices[:, j].float() * weights[:, j : j + 1]
    out.copy_(total.add_(residual))
