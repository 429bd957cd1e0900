"""The Triton kernel. Importing this file needs triton; llmpq/kernels/triton_gemm.py launches it.

Nothing here decides on sizes: the tile is given, and the same for every m. Each program sums along k in the same order
then, whatever m is and wherever in a tile a row lies, so a row's result does not depend on the other rows.
"""

import triton
import triton.language as tl


@triton.jit
def _words(row_ptrs, block, valid, WORD: tl.constexpr, BITS: tl.constexpr):
    """Word WORD of each block of the rows: int32 [N, blocks]."""
    return tl.load(row_ptrs[:, None] + block[None, :] * BITS + WORD, mask=valid, other=0)


@triton.jit
def load_codes(row_ptrs, k_begin, rows_valid, K: tl.constexpr, BITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes k_begin ... k_begin + BLOCK_K of packed rows, int32 [N, BLOCK_K]: the only place where bit widths differ.

    The format is drawn in llmpq/quant/packing.py: 32 codes are a block of BITS words. Past the end they read as 0.
    """
    N: tl.constexpr = row_ptrs.shape[0]
    if BITS == 3:
        # The fourth octet of a block is gathered from the other three words. Then there are four words of nibbles.
        block = k_begin // 32 + tl.arange(0, BLOCK_K // 32)
        valid = rows_valid[:, None] & (block < (K + 31) // 32)[None, :]
        w0 = _words(row_ptrs, block, valid, 0, BITS)
        w1 = _words(row_ptrs, block, valid, 1, BITS)
        w2 = _words(row_ptrs, block, valid, 2, BITS)
        w3 = ((w0 >> 3) & 0x11111111) | ((w1 >> 2) & 0x22222222) | ((w2 >> 1) & 0x44444444)
        octet = tl.arange(0, 4)[None, None, :]
        words = tl.where(octet == 0, w0[:, :, None], tl.where(octet == 1, w1[:, :, None], w2[:, :, None]))
        words = tl.reshape(tl.where(octet == 3, w3[:, :, None], words), (N, BLOCK_K // 8))
        PER_WORD: tl.constexpr = 8
        MASK: tl.constexpr = 7
    else:
        PER_WORD: tl.constexpr = 32 // BITS
        MASK: tl.constexpr = (1 << BITS) - 1
        word = k_begin // PER_WORD + tl.arange(0, BLOCK_K // PER_WORD)
        valid = rows_valid[:, None] & (word < (K + 31) // 32 * BITS)[None, :]
        words = tl.load(row_ptrs[:, None] + word[None, :], mask=valid, other=0)
    shifts = tl.arange(0, PER_WORD) * (32 // PER_WORD)
    return tl.reshape((words[:, :, None] >> shifts[None, None, :]) & MASK, (N, BLOCK_K))


@triton.jit(do_not_specialize=["m"])
def gemm_kernel(
    x_ptr,  # [m, K], rows x_stride elements apart
    qweight_ptr,  # int32 [n, ceil(K / 32) * BITS]
    scales_ptr,  # [n, groups]
    zeros_ptr,  # uint8 [n, groups]; not read if SYMMETRIC
    bias_ptr,  # [n], of x's dtype; not read unless HAS_BIAS
    y_ptr,  # [m, n], rows y_stride elements apart
    m,
    n,
    x_stride,
    y_stride,
    K: tl.constexpr,  # a model has few, and the loop's bounds become known
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # a multiple of BLOCK_K, or at least K
    SYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 32
):
    """y = x @ w.T + bias. Codes minus zeros are exact in x's dtype; scales multiply fp32 sums of BLOCK_K products."""
    GROUPS: tl.constexpr = (K + GROUP_SIZE - 1) // GROUP_SIZE
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_valid = row < m
    column_valid = column < n
    packed_rows = qweight_ptr + column * ((K + 31) // 32 * BITS)

    # The weights are the left factor: what is dequantized then stays in registers, and a tile of few rows is natural.
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k_begin in range(0, K, BLOCK_K):
        codes = load_codes(packed_rows, k_begin, column_valid, K, BITS, BLOCK_K)
        group = column * GROUPS + k_begin // GROUP_SIZE
        scale = tl.load(scales_ptr + group, mask=column_valid, other=0.0).to(tl.float32)
        if SYMMETRIC:
            values = codes - (1 << (BITS - 1))
        else:
            values = codes - tl.load(zeros_ptr + group, mask=column_valid, other=0).to(tl.int32)[:, None]
        k_index = k_begin + tl.arange(0, BLOCK_K)
        inside = (k_index < K)[:, None] & row_valid[None, :]
        x = tl.load(x_ptr + k_index[:, None] + row[None, :] * x_stride, mask=inside, other=0.0)
        total += scale[:, None] * tl.dot(values.to(x.dtype), x, input_precision="ieee")

    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column_valid, other=0.0).to(tl.float32)[:, None]
    to = y_ptr + column[:, None] + row[None, :] * y_stride
    tl.store(to, total.to(y_ptr.dtype.element_ty), mask=column_valid[:, None] & row_valid[None, :])
