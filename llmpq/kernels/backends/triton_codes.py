"""What the Triton kernels read of a weight in panels (llmpq/kernels/backends/gpu_layout.py), and how its words become
numbers.

The only place where bit widths and dtypes differ.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)  # codes in four words of a row
STEP = tl.constexpr(128)  # codes that go through the loop together: the three planes of 3 bits hold as many
PANEL = tl.constexpr(16)  # rows


def _both(half: int) -> int:
    """An int32 with the same 16 bits in both halves."""
    return half * 0x10001 - (half >> 15 << 32)


# A code becomes a floating-point number where it is made the end of a mantissa: 1024 + code in float16, 128 + code in
# bfloat16. Four bits further up, 1/16 of the number is 64 + code or 8 + code. A multiply-add subtracts that and the
# zero. bfloat16's mantissa is too short for a byte, which goes by way of float32 and is 2**23 + code there.
F16_MAGIC = tl.constexpr(_both(0x6400))
F16_ONE = tl.constexpr(_both(0x3C00))
F16_SIXTEENTH = tl.constexpr(_both(0x2C00))
F16_MINUS_1024 = tl.constexpr(_both(0xE400))  # and 1 less for each 1 that is added to the bits
F16_MINUS_64 = tl.constexpr(_both(0xD400))  # 1 less for each 16
BF16_MAGIC = tl.constexpr(_both(0x4300))
BF16_ONE = tl.constexpr(_both(0x3F80))
BF16_SIXTEENTH = tl.constexpr(_both(0x3D80))
BF16_MINUS_128 = tl.constexpr(_both(0xC300))  # 1 less for each 1
BF16_MINUS_8 = tl.constexpr(_both(0xC100))  # 1 less for each 16
F32_MAGIC = tl.constexpr(0x4B000000)
F32_MINUS_2_23 = tl.constexpr(0xCB000000 - 2**32)  # 1 less for each 1

# ((word & mask) | magic) * factor + minus in both halves
NIBBLES_F16 = tl.constexpr("{ .reg .b32 t; lop3.b32 t, $1, $2, $3, 0xEA; fma.rn.f16x2 $0, t, $4, $5; }")
NIBBLES_BF16 = tl.constexpr("{ .reg .b32 t; lop3.b32 t, $1, $2, $3, 0xEA; fma.rn.bf16x2 $0, t, $4, $5; }")
# two bytes of a word, picked by selectors that put the upper bytes of magic beside them, + minus
BYTES_F16 = tl.constexpr("{ .reg .b32 t; prmt.b32 t, $1, $2, $3; add.rn.f16x2 $0, t, $5; }")
BYTES_BF16 = tl.constexpr(
    "{ .reg .b32 s, t; prmt.b32 s, $1, $2, $3; prmt.b32 t, $1, $2, $4; "
    "add.rn.f32 s, s, $5; add.rn.f32 t, t, $5; prmt.b32 $0, s, t, 0x7632; }"
)


@triton.jit
def _pair(word, a, b, c, minus, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r", [word, a, b, c, minus], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _nibble_pairs(word, zero, MASK: tl.constexpr, dtype: tl.constexpr):
    """Codes minus zeros of words of 3 or 4 bits a code, in four words of two floating-point numbers each."""
    HALF: tl.constexpr = dtype == tl.float16
    ASM: tl.constexpr = NIBBLES_F16 if HALF else NIBBLES_BF16
    MAGIC: tl.constexpr = F16_MAGIC if HALF else BF16_MAGIC
    ONE: tl.constexpr = F16_ONE if HALF else BF16_ONE
    NEAR: tl.constexpr = MASK * 0x10001
    minus = zero * 0x10001 + (F16_MINUS_1024 if HALF else BF16_MINUS_128)
    p0 = _pair(word, NEAR, MAGIC, ONE, minus, ASM)
    p2 = _pair(word >> 8, NEAR, MAGIC, ONE, minus, ASM)
    if HALF or MASK == 7:
        FAR: tl.constexpr = MASK * 0x100010
        SIXTEENTH: tl.constexpr = F16_SIXTEENTH if HALF else BF16_SIXTEENTH
        minus_far = zero * 0x100010 + (F16_MINUS_64 if HALF else BF16_MINUS_8)
        p1 = _pair(word, FAR, MAGIC, SIXTEENTH, minus_far, ASM)
        p3 = _pair(word >> 8, FAR, MAGIC, SIXTEENTH, minus_far, ASM)
    else:  # four bits, four further up, do not fit bfloat16's seven
        p1 = _pair(word >> 4, NEAR, MAGIC, ONE, minus, ASM)
        p3 = _pair(word >> 12, NEAR, MAGIC, ONE, minus, ASM)
    return p0, p1, p2, p3


@triton.jit
def _byte_pairs(word, zero, dtype: tl.constexpr):
    """The four codes of words of bytes, minus zeros, in two words of two floating-point numbers each."""
    if dtype == tl.float16:
        minus = zero * 0x10001 + F16_MINUS_1024
        p0 = _pair(word, F16_MAGIC, 0x7170, 0, minus, BYTES_F16)
        p1 = _pair(word, F16_MAGIC, 0x7372, 0, minus, BYTES_F16)
    else:
        minus = zero + F32_MINUS_2_23
        p0 = _pair(word, F32_MAGIC, 0x7440, 0x7441, minus, BYTES_BF16)
        p1 = _pair(word, F32_MAGIC, 0x7442, 0x7443, minus, BYTES_BF16)
    return p0, p1


@triton.jit
def _low(pair, dtype: tl.constexpr):
    return pair.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _high(pair, dtype: tl.constexpr):
    return (pair >> 16).to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _code(word, zero, SHIFT: tl.constexpr, MASK: tl.constexpr):
    return (((word >> SHIFT) & MASK) - zero).to(tl.float32)


@triton.jit
def dequantize(word, upper, zero, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes minus zeros [rows, 32], exact in dtype, from what `load_words` and `load_group` give.

    In float32 it is plain arithmetic: for GPUs without tensor cores, for x in float32 and for Triton's interpreter.
    """
    if dtype == tl.float32:
        BYTES: tl.constexpr = BITS == 8
        MASK: tl.constexpr = 2**BITS - 1
        v0 = _code(word, zero, 0, MASK)
        v1 = _code(word, zero, 8 if BYTES else 16, MASK)
        v2 = _code(word, zero, 16 if BYTES else 4, MASK)
        v3 = _code(word, zero, 24 if BYTES else 20, MASK)
        v4 = _code(upper, zero, 0 if BYTES else 8, MASK)
        v5 = _code(upper, zero, 8 if BYTES else 24, MASK)
        v6 = _code(upper, zero, 16 if BYTES else 12, MASK)
        v7 = _code(upper, zero, 24 if BYTES else 28, MASK)
    else:
        if BITS == 8:
            p0, p1 = _byte_pairs(word, zero, dtype)
            p2, p3 = _byte_pairs(upper, zero, dtype)
        else:
            p0, p1, p2, p3 = _nibble_pairs(word, zero, 2**BITS - 1, dtype)
        v0, v1 = _low(p0, dtype), _high(p0, dtype)
        v2, v3 = _low(p1, dtype), _high(p1, dtype)
        v4, v5 = _low(p2, dtype), _high(p2, dtype)
        v6, v7 = _low(p3, dtype), _high(p3, dtype)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (word.shape[0], BLOCK))


@triton.jit
def _plane(rows, plane, PLANES: tl.constexpr, GUARDED: tl.constexpr):
    """The words of a plane [rows, 4]; 0 past the last plane."""
    at = tl.arange(0, 4)[None, :] + plane * (PANEL * 4)
    if GUARDED:
        return tl.load(rows[:, None] + at, mask=at < PLANES * PANEL * 4, other=0, eviction_policy="evict_first")
    return tl.load(rows[:, None] + at, eviction_policy="evict_first")


@triton.jit
def load_words(
    qweight_ptr,
    first_row,
    n,
    k,
    B: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GUARDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The words [ROWS, 4] of the block at k, the B-th of a step: two for 8 bits, else the same one twice.

    Rows past the last panel get another's words. GUARDED: blocks past the last one get 0.
    """
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    PLANES: tl.constexpr = 2 * BLOCKS if BITS == 8 else BLOCKS if BITS == 4 else BLOCKS - BLOCKS // 4
    row = first_row + tl.arange(0, ROWS)
    rows = qweight_ptr + tl.minimum(row // PANEL, (n - 1) // PANEL) * (PLANES * PANEL * 4) + row % PANEL * 4
    if BITS == 8:
        word = _plane(rows, k // BLOCK * 2, PLANES, GUARDED)
        return word, _plane(rows, k // BLOCK * 2 + 1, PLANES, GUARDED)
    if BITS == 4:
        word = _plane(rows, k // BLOCK, PLANES, GUARDED)
    elif B < 3:
        word = _plane(rows, k // STEP * 3 + B, PLANES, GUARDED)
    else:  # it has no plane but the top bits of the step's other blocks, which Triton loads once
        first = _plane(rows, k // STEP * 3, PLANES, GUARDED)
        second = _plane(rows, k // STEP * 3 + 1, PLANES, GUARDED)
        third = _plane(rows, k // STEP * 3 + 2, PLANES, GUARDED)
        word = ((first >> 3) & 0x11111111) | ((second >> 2) & 0x22222222) | ((third >> 1) & 0x44444444)
    return word, word


@triton.jit
def _by_row(upper, lower):
    """[rows] of what belongs to the upper and to the lower eight rows of each panel, [rows / 2] each."""
    halves = tl.reshape(tl.join(upper, lower), (upper.shape[0] // 8, 8, 2))
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (2 * upper.shape[0],))


@triton.jit
def _group(first_row, n, k, K: tl.constexpr, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Where what belongs to the group at k and the upper eight rows of each panel is: [ROWS / 2].

    Rows past the last panel get another's.
    """
    GROUPS: tl.constexpr = (K + GROUP_SIZE - 1) // GROUP_SIZE
    half = first_row // 2 + tl.arange(0, ROWS // 2)
    panel = tl.minimum(half // 8, (n - 1) // PANEL)
    return (panel * GROUPS + tl.minimum(k // GROUP_SIZE, GROUPS - 1)) * PANEL + half % 8


@triton.jit
def load_scales(scales_ptr, first_row, n, k, K: tl.constexpr, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """Scales or offsets float32 [ROWS] of the group at k. Rows past the last panel get another's.

    Rows r and r + 8 of a panel are one thread's. They are loaded apart, since Triton loads straight to the threads that
    want something only what is less than one value a thread; all else goes by way of shared memory, with barriers.
    """
    at = _group(first_row, n, k, K, GROUP_SIZE, ROWS)
    return _by_row(tl.load(scales_ptr + at), tl.load(scales_ptr + at + 8)).to(tl.float32)


@triton.jit
def load_group(
    scales_ptr,
    zeros_ptr,
    has_zeros,
    first_row,
    n,
    k,
    K: tl.constexpr,
    ZERO: tl.constexpr,  # where there are none
    GROUP_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scales float32 [ROWS] and zeros int32 [ROWS, 1] of the group at k, loaded as in `load_scales`.

    That a symmetric weight has no zeros is found out while running. It costs nothing, saves half of the compilations
    and keeps this load in Triton's sight, which lets a thread hold as many numbers along k as the narrowest load below
    a product has to 32 bits, and twice as many where tensors were joined: eight, a whole word.
    """
    at = _group(first_row, n, k, K, GROUP_SIZE, ROWS)
    scale = load_scales(scales_ptr, first_row, n, k, K, GROUP_SIZE, ROWS)
    zeros_ptr = zeros_ptr.to(tl.pointer_type(tl.uint8)) + at
    mask = tl.full(at.shape, has_zeros, tl.int32) != 0
    upper = tl.load(zeros_ptr, mask=mask, other=ZERO)
    lower = tl.load(zeros_ptr + 8, mask=mask, other=ZERO)
    return scale, _by_row(upper, lower).to(tl.int32)[:, None]
