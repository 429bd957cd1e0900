"""The Triton kernel that reads rows of a table in panels (llmpq/kernels/backends/gpu_layout.py) or of a plain one."""

import triton
import triton.language as tl


@triton.jit
def _word(table_ptr, row, plane, octet, valid, PLANES: tl.constexpr):
    """One for each column: of its row's panel and plane, the word of its octet."""
    at = ((row // 16 * PLANES + plane) * 16 + row % 16) * 4 + octet
    return tl.load(table_ptr + at, mask=valid, other=0)


@triton.jit
def _codes(table_ptr, row, column, valid, BITS: tl.constexpr, PLANES: tl.constexpr):
    """The codes of these columns, int32."""
    block, octet, i = column // 32, column % 32 // 8, column % 8
    if BITS == 8:
        return _word(table_ptr, row, 2 * block + i // 4, octet, valid, PLANES) >> (8 * (i % 4)) & 255
    shift = 4 * (i % 2 * 4 + i // 2)  # even codes are in the lower half of a word, odd ones in the upper
    if BITS == 4:
        return _word(table_ptr, row, block, octet, valid, PLANES) >> shift & 15
    # Of four blocks, three have planes; the bits of the fourth are the top ones of their nibbles.
    first, within = block // 4 * 3, block % 4
    own = valid & (within < 3)
    code = _word(table_ptr, row, first + tl.minimum(within, 2), octet, own, PLANES) >> shift & 7
    for plane in tl.static_range(3):
        top = _word(table_ptr, row, first + plane, octet, valid & (within == 3), PLANES) >> (shift + 3) & 1
        code = tl.where(within == 3, code | top << plane, code)
    return code


@triton.jit
def embedding_kernel(
    ids_ptr,  # int64 [t]
    table_ptr,  # words of panels, or the table [n, k] itself
    scales_ptr,  # [ceil(n / 16), groups, 16]; not read of a plain table
    zeros_ptr,  # as scales; not read unless there are any
    out_ptr,  # [t, k]
    k,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZERO: tl.constexpr,  # kind of zero; empty: the table is plain
    BLOCK: tl.constexpr,
):
    """Programs (token, part of its row)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, valid = tl.load(ids_ptr + token), column < k
    if ZERO == "":
        value = tl.load(table_ptr + row * k + column, mask=valid, other=0.0).to(tl.float32)
    else:
        groups = (k + GROUP_SIZE - 1) // GROUP_SIZE
        at = (row // 16 * groups + column // GROUP_SIZE) * 16 + row % 16
        value = _codes(table_ptr, row, column, valid, BITS, PLANES).to(tl.float32)
        if ZERO == "sym":
            value -= 2 ** (BITS - 1)
        if ZERO == "asym":
            value -= tl.load(zeros_ptr + at, mask=valid, other=0).to(tl.float32)
        value *= tl.load(scales_ptr + at, mask=valid, other=0.0).to(tl.float32)
        if ZERO == "offset":
            value += tl.load(zeros_ptr + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * k + column, value.to(out_ptr.dtype.element_ty), mask=valid)
