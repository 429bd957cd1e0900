"""Which experts tokens go to, and the sum of what they give, in Triton. Importing this file needs no triton.

One launch each. A token's result depends on nothing but the token.
"""

from __future__ import annotations

import torch

__all__ = ["combine", "route"]

_COLUMNS = 1024  # of one program


def route(logits: torch.Tensor, normalized: bool, sigmoid: bool, experts: torch.Tensor, weights: torch.Tensor) -> None:
    """As `llmpq.kernels.route` says."""
    import triton

    from llmpq.kernels.backends.triton_experts_kernels import route_kernel

    count, choices = logits.shape[1], experts.shape[1]
    with torch.cuda.device_of(logits):
        route_kernel[(len(logits),)](
            logits,
            experts,
            weights,
            logits.stride(0),
            EXPERTS=count,
            CHOICES=choices,
            NORMALIZED=normalized,
            SIGMOID=sigmoid,
            BLOCK=triton.next_power_of_2(count),
            BLOCK_C=triton.next_power_of_2(choices),
            num_warps=1,
            enable_fp_fusion=True,
        )


def combine(y: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor, out: torch.Tensor) -> None:
    """As `llmpq.kernels.combine` says."""
    import triton

    from llmpq.kernels.backends.triton_experts_kernels import combine_kernel

    tokens, n = out.shape
    with torch.cuda.device_of(y):
        combine_kernel[(tokens, triton.cdiv(n, _COLUMNS))](
            y, weights, residual, out, n, CHOICES=weights.shape[1], BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=True
        )
