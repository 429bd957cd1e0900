"""Tokens drawn by their probability, in Triton: one launch for all rows. Importing this file needs no triton."""

from __future__ import annotations

import torch

_BLOCK = 4096  # columns that a program takes at a time


def draw_(tokens: torch.Tensor, logits: torch.Tensor, parameters: torch.Tensor, numbers: torch.Tensor) -> None:
    """As `llmpq.kernels.draw_` says. Scratch is a float64 number for each logit."""
    import triton

    from llmpq.kernels.backends.triton_draw_kernel import draw_kernel

    rows, size = logits.shape
    weights = torch.empty(rows, size, dtype=torch.float64, device=logits.device)
    bits = 8 * logits.element_size()
    with torch.cuda.device_of(logits):
        draw_kernel[(rows,)](
            logits,
            logits.view(torch.int16 if bits == 16 else torch.int32),
            weights,
            parameters,
            numbers,
            tokens,
            logits.stride(0),
            SIZE=size,
            BITS=bits,
            BLOCK=min(_BLOCK, triton.next_power_of_2(size)),
            num_warps=8,
            enable_fp_fusion=False,
        )
