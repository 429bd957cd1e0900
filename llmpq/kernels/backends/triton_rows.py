"""What is done to rows by themselves, in Triton: one launch for each operation. Importing this file needs no triton.

A row's result depends on nothing but the row. All compute in float32 and round once.
"""

from __future__ import annotations

import torch

from llmpq.kernels.sequences import Sequences

__all__ = ["activate_", "add_positions_", "argmax", "head_norm_", "last_rows", "layer_norm", "rms_norm", "scale_"]

_COLUMNS = 1024  # of one program, where rows are cut
_PART = 4096  # columns of a row among which one program looks for the greatest


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """residual + x / sqrt(mean(x**2) + eps) * weight over the last dim."""
    return _normalize(x, weight, None, eps, out, residual)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: torch.Tensor | None
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim."""
    return _normalize(x, weight, bias, eps, out)


def head_norm_(x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    """As `llmpq.kernels.head_norm_` says."""
    _launch_norm(x, weight, None, eps, x, None)


def _normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    size = x.shape[-1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, size)
    if len(rows):
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        residual = None if residual is None else residual.contiguous()
        _launch_norm(rows.unsqueeze(1), weight, bias, eps, out.view(-1, 1, size), residual)
    return out


def _launch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor,
    residual: torch.Tensor | None,
) -> None:
    """The norm of each group of x [rows, groups, size] in out, which may be x; residual lies as out does."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import norm_kernel

    rows, groups, size = x.shape
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):
        norm_kernel[(rows, groups)](
            x,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            out if residual is None else residual,
            out,
            x.stride(0),
            out.stride(0),
            eps,
            SIZE=size,
            CENTERED=bias is not None,
            ADDED=residual is not None,
            # By the size too: else the same row would be summed in another order where rows lie otherwise.
            ALIGNED=size % 16 == x.stride(0) % 16 == out.stride(0) % 16 == 0,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
            enable_fp_fusion=True,
        )


def activate_(x: torch.Tensor, activation: str, gated: bool) -> None:
    """The activation of x [t, n], in place; see `llmpq.kernels.activate_`."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import activation_kernel

    n = x.shape[1] // 2 if gated else x.shape[1]
    with torch.cuda.device_of(x):
        activation_kernel[(len(x), triton.cdiv(n, _COLUMNS))](
            x, n, x.stride(0), ACTIVATION=activation, GATED=gated, BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=True
        )


def scale_(x: torch.Tensor, factor: float, cap: float | None) -> None:
    """As `llmpq.kernels.scale_` says."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import scale_kernel

    rows, n = x.shape
    with torch.cuda.device_of(x):
        scale_kernel[(rows, triton.cdiv(n, _COLUMNS))](
            x, n, x.stride(0), factor, CAP=cap or 0.0, BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=True
        )


def add_positions_(x: torch.Tensor, table: torch.Tensor, sequences: Sequences) -> None:
    """x [t, n] += the rows of a table of learned positions; nothing for absent tokens."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import positions_kernel

    tokens, n = x.shape
    if tokens:
        with torch.cuda.device_of(x):
            positions_kernel[(tokens, triton.cdiv(n, _COLUMNS))](
                x,
                table.contiguous(),
                sequences.on(x.device).positions,
                n,
                BLOCK=_COLUMNS,
                num_warps=4,
                enable_fp_fusion=True,
            )


def last_rows(x: torch.Tensor, sequences: Sequences, out: torch.Tensor) -> None:
    """Rows of x [t, n]; see `llmpq.kernels.last_rows`."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import last_rows_kernel

    count, n = out.shape
    if count:
        with torch.cuda.device_of(x):
            last_rows_kernel[(count, triton.cdiv(n, _COLUMNS))](
                x, sequences.on(x.device).query_starts, out, n, BLOCK=_COLUMNS, num_warps=4, enable_fp_fusion=True
            )


def argmax(x: torch.Tensor, out: torch.Tensor) -> None:
    """The first column of the largest number in each row of x [rows, size]; of a row with NaN, some column."""
    import triton

    from llmpq.kernels.backends.triton_rows_kernels import first_greatest_kernel, greatest_kernel

    if x.stride(1) != 1:
        x = x.contiguous()
    rows, size = x.shape
    parts = triton.cdiv(size, _PART)
    values, columns = out, out
    if parts > 1:
        values = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
        columns = torch.empty(rows, parts, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        greatest_kernel[(rows, parts)](
            x,
            values,
            columns,
            size,
            x.stride(0),
            PARTS=parts,
            BLOCK=min(_PART, triton.next_power_of_2(size)),
            num_warps=8,
            enable_fp_fusion=True,
        )
        if parts > 1:
            first_greatest_kernel[(rows,)](
                values,
                columns,
                out,
                PARTS=parts,
                BLOCK=triton.next_power_of_2(parts),
                num_warps=1,
                enable_fp_fusion=True,
            )
