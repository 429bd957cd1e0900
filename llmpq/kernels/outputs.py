"""What is asked of a tensor that a result is to be written to."""

from __future__ import annotations

import torch


def check_out(out: torch.Tensor | None, like: torch.Tensor) -> None:
    """Raise ValueError unless `out` is None or contiguous and of this shape, dtype and device."""
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (like.shape, like.dtype, like.device) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} {list(out.shape)} on {out.device}, expected contiguous {like.dtype} "
            f"{list(like.shape)} on {like.device}"
        )
