"""The Triton kernels. Importing this file needs triton; llmpq/kernels/backends/triton_gemm.py launches them.

Weights are the left factor of every product: [rows of the weight, 32 codes] x [32 codes, rows of x]. What is
dequantized then goes to the tensor cores from the registers it is made in, for the thread that holds a word of the
panels (llmpq/kernels/backends/gpu_layout.py) is the one that the instruction wants to hold the word's eight codes.

Codes minus zeros are exact in x's dtype; scales multiply float32 sums. Each row of x is summed in one order: 32 along
k at a time, a sum for each group or STEP codes of one, these one after the other, then splits likewise. Nothing that
depends on m changes that order, so a row's result does not depend on the other rows.

Where a weight has offsets, the zero is the middle code, and the zero and the offset multiply sums of x. These are made
as products with ones, so that they have the shape, the layout and the order of the other products.
"""

import triton
import triton.language as tl

from llmpq.kernels.backends.triton_codes import BLOCK, STEP, dequantize, load_group, load_scales, load_words


@triton.jit
def _plus(y, residual, valid):
    """y, which has been rounded, + what `residual` points at, rounded once more."""
    return (y.to(tl.float32) + tl.load(residual, mask=valid, other=0.0).to(tl.float32)).to(y.dtype)


@triton.jit
def _product(
    x_rows,  # [BLOCK_M] where rows of x begin
    qweight_ptr,  # as below
    scales_ptr,
    zeros_ptr,
    has_zeros,
    first_column,
    n,
    K: tl.constexpr,
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """w @ x.T float32 [BLOCK_N, BLOCK_M] of these columns and rows of y, or the part of the third program index."""
    STEPS: tl.constexpr = (K + STEP * SPLITS - 1) // (STEP * SPLITS)  # of this program
    GUARDED: tl.constexpr = STEPS * SPLITS * STEP > K
    k_index = tl.arange(0, BLOCK)
    x_block = x_rows[None, :] + k_index[:, None]

    CENTER: tl.constexpr = 2 ** (BITS - 1)
    first_k = tl.program_id(2) * (STEPS * STEP)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for step in range(STEPS):
        for b in tl.static_range(STEP // BLOCK):
            k = first_k + step * STEP + b * BLOCK
            if b == 0 or b * BLOCK % GROUP_SIZE == 0:
                scale, zero = load_group(
                    scales_ptr, zeros_ptr, has_zeros, first_column, n, k, K, CENTER, GROUP_SIZE, BLOCK_N
                )
                part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                if HAS_OFFSETS:
                    offset = load_scales(zeros_ptr, first_column, n, k, K, GROUP_SIZE, BLOCK_N)
                    x_sum = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            word, upper = load_words(qweight_ptr, first_column, n, k, b, K, BITS, GUARDED, BLOCK_N)
            x = tl.load(x_block + k, mask=(k + k_index < K)[:, None], other=0.0) if GUARDED else tl.load(x_block + k)
            values = dequantize(word, upper, zero, BITS, dtype)
            part = tl.dot(values, x.to(dtype), part, input_precision="ieee")
            if HAS_OFFSETS:
                x_sum = tl.dot(tl.full((BLOCK_N, BLOCK), 1.0, dtype), x.to(dtype), x_sum, input_precision="ieee")
            if b == STEP // BLOCK - 1 or (b + 1) * BLOCK % GROUP_SIZE == 0:
                if HAS_OFFSETS:
                    total += offset[:, None] * x_sum
                    part += CENTER * x_sum
                total += scale[:, None] * part
    return total


@triton.jit(do_not_specialize=["m", "n", "has_zeros"])
def gemm_kernel(
    x_ptr,  # [m, K], rows x_stride elements apart
    qweight_ptr,  # qweight, scales and zeros as llmpq/kernels/backends/gpu_layout.py draws them
    scales_ptr,
    zeros_ptr,  # zeros, not read unless has_zeros, or offsets, not read unless HAS_OFFSETS
    bias_ptr,  # [n], of x's dtype; not read unless HAS_BIAS
    residual_ptr,  # [m, n] of y's dtype, rows residual_stride elements apart; not read unless HAS_RESIDUAL
    y_ptr,  # [m, n] of x's dtype, or float32 [SPLITS, m, n]; rows y_stride elements apart
    m,
    n,
    x_stride,
    residual_stride,
    y_stride,
    has_zeros,
    K: tl.constexpr,  # a model has few, and the loop's bounds become known
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,  # what is multiplied: x's dtype for tensor cores, else float32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = x @ w.T + bias + residual, or one of several parts of x @ w.T along k, which `reduce_kernel` adds."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_N
    # Rows past the last one stand for it: what they give is not stored.
    x_rows = x_ptr + tl.minimum(row, m - 1) * x_stride
    total = _product(
        x_rows,
        qweight_ptr,
        scales_ptr,
        zeros_ptr,
        has_zeros,
        first_column,
        n,
        K,
        BITS,
        HAS_OFFSETS,
        GROUP_SIZE,
        SPLITS,
        dtype,
        BLOCK_M,
        BLOCK_N,
    )
    column = first_column + tl.arange(0, BLOCK_N)
    valid = column < n
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)[:, None]
    y, valid = total.to(y_ptr.dtype.element_ty), valid[:, None] & (row < m)[None, :]
    if HAS_RESIDUAL:
        y = _plus(y, residual_ptr + column[:, None] + (row * residual_stride)[None, :], valid)
    to = y_ptr + column[:, None] + ((row + tl.program_id(2) * m) * y_stride)[None, :]
    tl.store(to, y, mask=valid)


@triton.jit(do_not_specialize=["pairs", "n", "has_zeros"])
def grouped_kernel(
    x_ptr,  # [pairs / ROWS_OF, K], rows x_stride elements apart
    distances_ptr,  # int64 [experts, TENSORS]: how far an expert's tensors are from the first one's, in 16 bytes
    qweight_ptr,  # the first expert's, as above
    scales_ptr,
    zeros_ptr,
    experts_ptr,  # int32 [pairs]
    biases_ptr,  # [experts, n], of x's dtype; not read unless HAS_BIASES
    y_ptr,  # contiguous [pairs, n] of x's dtype, or float32 [SPLITS, pairs, n]
    pairs,
    n,
    x_stride,
    has_zeros,
    ROWS_OF: tl.constexpr,  # pairs that a row of x is for
    TENSORS: tl.constexpr,
    K: tl.constexpr,  # as above, from here on
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_BIASES: tl.constexpr,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_P: tl.constexpr,  # no fewer than there are pairs
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[pair] = x[pair / ROWS_OF] @ w[experts[pair]].T + biases[experts[pair]], or one of several parts of the product.

    Programs (pair, block of columns, part). The pairs of an expert are taken BLOCK_M at a time, by the program of the
    first of them; the others have nothing to do. So neither is anything sorted, nor does the host know who is chosen.
    """
    pair, every = tl.program_id(0), tl.arange(0, BLOCK_P)
    expert = tl.load(experts_ptr + pair)
    alike = tl.load(experts_ptr + every, mask=every < pairs, other=-1) == expert
    before = tl.sum((alike & (every < pair)).to(tl.int32), 0)
    if before % BLOCK_M != 0:
        return
    member = before + tl.arange(0, BLOCK_M)  # of the expert's pairs
    place = tl.cumsum(alike.to(tl.int32), 0) - 1
    at = alike[:, None] & (place[:, None] == member[None, :])
    row = tl.sum(tl.where(at, every[:, None], 0), 0).to(tl.int64)  # the first of all where there are no more
    there = member < tl.sum(alike.to(tl.int32), 0)

    distance = distances_ptr + expert * TENSORS
    qweight_ptr += tl.load(distance) * (16 * 8 // qweight_ptr.dtype.element_ty.primitive_bitwidth)
    scales_ptr += tl.load(distance + 1) * (16 * 8 // scales_ptr.dtype.element_ty.primitive_bitwidth)
    if TENSORS > 2:
        zeros_ptr += tl.load(distance + 2) * (16 * 8 // zeros_ptr.dtype.element_ty.primitive_bitwidth)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK_N
    total = _product(
        x_ptr + row // ROWS_OF * x_stride,
        qweight_ptr,
        scales_ptr,
        zeros_ptr,
        has_zeros,
        first_column,
        n,
        K,
        BITS,
        HAS_OFFSETS,
        GROUP_SIZE,
        SPLITS,
        dtype,
        BLOCK_M,
        BLOCK_N,
    )
    column = first_column + tl.arange(0, BLOCK_N)
    valid = column < n
    if HAS_BIASES:
        total += tl.load(biases_ptr + expert * n + column, mask=valid, other=0.0).to(tl.float32)[:, None]
    to = y_ptr + column[:, None] + ((row + tl.program_id(2) * pairs) * n)[None, :]
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=valid[:, None] & there[None, :])


@triton.jit(do_not_specialize=["m", "n"])
def reduce_kernel(
    parts_ptr,  # float32 [SPLITS, m, n]
    bias_ptr,  # as above; where rows are of experts, theirs: [experts, n]
    residual_ptr,
    experts_ptr,  # int32 [m]; not read unless OF_EXPERTS
    y_ptr,  # [m, n], rows y_stride elements apart
    m,
    n,
    residual_stride,
    y_stride,
    OF_EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = the sum of the parts, one after the other, + bias + residual."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < n
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (row + split * m) * n + column, mask=valid, other=0.0)
    if HAS_BIAS:
        bias_ptr += tl.load(experts_ptr + row) * n if OF_EXPERTS else 0
        total += tl.load(bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
    y = total.to(y_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        y = _plus(y, residual_ptr + row * residual_stride + column, valid)
    tl.store(y_ptr + row * y_stride + column, y, mask=valid)


@triton.jit(do_not_specialize=["rows", "has_zeros"])
def dequantize_kernel(
    qweight_ptr,  # as above, from the first panel on
    scales_ptr,
    zeros_ptr,
    out_ptr,  # [rows, K]
    rows,
    has_zeros,
    K: tl.constexpr,
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    dtype: tl.constexpr,  # what codes minus zeros become before they are scaled: any in which that is exact
    BLOCK_N: tl.constexpr,
):
    """out = the weights, which float32 holds exactly or, with an offset, rounded once; these numbers are rounded."""
    GUARDED: tl.constexpr = (K + STEP - 1) // STEP * STEP > K
    ZERO: tl.constexpr = 0 if HAS_OFFSETS else 2 ** (BITS - 1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    for b in tl.static_range(STEP // BLOCK):
        k = tl.program_id(1) * STEP + b * BLOCK
        if b == 0 or b * BLOCK % GROUP_SIZE == 0:
            scale, zero = load_group(scales_ptr, zeros_ptr, has_zeros, first_row, rows, k, K, ZERO, GROUP_SIZE, BLOCK_N)
            if HAS_OFFSETS:
                offset = load_scales(zeros_ptr, first_row, rows, k, K, GROUP_SIZE, BLOCK_N)
        word, upper = load_words(qweight_ptr, first_row, rows, k, b, K, BITS, GUARDED, BLOCK_N)
        values = dequantize(word, upper, zero, BITS, dtype).to(tl.float32) * scale[:, None]
        if HAS_OFFSETS:
            values += offset[:, None]
        k_index = k + tl.arange(0, BLOCK)
        valid = (row < rows)[:, None] & (k_index < K)[None, :]
        tl.store(out_ptr + row[:, None] * K + k_index[None, :], values.to(out_ptr.dtype.element_ty), mask=valid)
