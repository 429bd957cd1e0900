"""The Triton kernels of what is done to rows by themselves; llmpq/kernels/backends/triton_rows.py launches them."""

import triton
import triton.language as tl


@triton.jit
def capped(x, CAP: tl.constexpr):
    """CAP * tanh(x / CAP) of float32, to a few units in the last place; NaN stays NaN."""
    u = x / CAP
    square = u * u
    # Near 0 the series, whose next term is below 1e-8 of the sum; else 1 - 2 / (1 + exp(2u)), which there would cancel.
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return CAP * tl.where(tl.abs(u) < 0.25, u * series, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u)))


@triton.jit(do_not_specialize=["x_stride", "out_stride"])
def norm_kernel(
    x_ptr,  # [rows, groups, SIZE], rows x_stride elements apart
    weight_ptr,
    bias_ptr,  # not read unless CENTERED
    residual_ptr,  # as out, not read unless ADDED
    out_ptr,  # [rows, groups, SIZE], rows out_stride elements apart
    x_stride,
    out_stride,
    eps,
    SIZE: tl.constexpr,
    CENTERED: tl.constexpr,  # LayerNorm, else RMSNorm
    ADDED: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides are multiples of 16
    BLOCK: tl.constexpr,
):
    """Programs (row, group)."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if ALIGNED:
        x_stride, out_stride = tl.multiple_of(x_stride, 16), tl.multiple_of(out_stride, 16)
    valid = column < SIZE
    group = tl.program_id(1) * SIZE
    to = row * out_stride + group + column
    x = tl.load(x_ptr + row * x_stride + group + column, mask=valid, other=0.0).to(tl.float32)
    if CENTERED:
        x = tl.where(valid, x - tl.sum(x, 0) / SIZE, 0.0)
        x = tl.where(valid, x - tl.sum(x, 0) / SIZE, 0.0)  # by what rounding the mean has left
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + eps))
    y *= tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
    if CENTERED:
        y += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    if ADDED:
        y += tl.load(residual_ptr + to, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, y.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """Of float32; NaN stays NaN."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def activation_kernel(
    x_ptr,  # [rows, n], or [rows, 2 * n] if GATED; rows x_stride elements apart
    n,
    x_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first n columns become their activation, if GATED times the others."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, valid = x_ptr + tl.program_id(0).to(tl.int64) * x_stride + column, column < n
    x = tl.load(here, mask=valid, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu_clamped":
        gate, up = tl.where(x > 7.0, 7.0, x), tl.load(here + n, mask=valid, other=0.0).to(tl.float32)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        y = gate / (1.0 + tl.exp(-1.702 * gate)) * (up + 1.0)
    else:
        y = _activated(x, ACTIVATION)
        if GATED:
            y *= tl.load(here + n, mask=valid, other=0.0).to(tl.float32)
    tl.store(here, y.to(x_ptr.dtype.element_ty), mask=valid)


@triton.jit
def scale_kernel(
    x_ptr,  # [rows, n], rows x_stride elements apart
    n,
    x_stride,
    factor,
    CAP: tl.constexpr,  # 0.0: none
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = x_ptr + tl.program_id(0).to(tl.int64) * x_stride + column
    x = tl.load(here, mask=column < n, other=0.0).to(tl.float32) * factor
    x = capped(x, CAP) if CAP > 0 else x
    tl.store(here, x.to(x_ptr.dtype.element_ty), mask=column < n)


@triton.jit
def positions_kernel(
    x_ptr,  # [t, n]
    table_ptr,  # [positions, n]
    positions_ptr,
    n,
    BLOCK: tl.constexpr,
):
    """Each row of x += the table's row of its position; a position below 0 is none."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + row).to(tl.int64)
    valid = column < tl.where(position >= 0, n, 0)
    x = tl.load(x_ptr + row * n + column, mask=valid, other=0.0)
    y = x.to(tl.float32) + tl.load(table_ptr + position * n + column, mask=valid, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * n + column, y.to(x.dtype), mask=valid)


@triton.jit
def last_rows_kernel(
    x_ptr,  # [t, n]
    query_starts_ptr,
    out_ptr,  # [s, n]
    n,
    BLOCK: tl.constexpr,
):
    sequence, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(query_starts_ptr + sequence + 1).to(tl.int64) - 1
    x = tl.load(x_ptr + row * n + column, mask=column < n, other=0.0)
    tl.store(out_ptr + sequence * n + column, x, mask=column < n)


@triton.jit
def greatest_kernel(
    x_ptr,  # [rows, size], rows x_stride elements apart
    values_ptr,  # float32 [rows, PARTS], not written if PARTS is 1
    columns_ptr,  # int32 [rows, PARTS], or int64 [rows]
    size,
    x_stride,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest number of each part of a row, BLOCK columns wide, and the first column that has it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))  # NaN is no less than any number, so what is found is a column of the row
    greatest, index = tl.max(x, 0, return_indices=True)
    tl.store(columns_ptr + row * PARTS + part, (part * BLOCK + index).to(columns_ptr.dtype.element_ty))
    if PARTS > 1:
        tl.store(values_ptr + row * PARTS + part, greatest)


@triton.jit
def first_greatest_kernel(
    values_ptr,  # as `greatest_kernel` writes them
    columns_ptr,
    out_ptr,  # int64 [rows]
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    index = tl.argmax(values, 0)  # of equal ones the first
    tl.store(out_ptr + row, tl.load(columns_ptr + row * PARTS + index).to(tl.int64))
