"""The Triton kernels of the way into the KV cache; llmpq/kernels/backends/triton_kv_cache.py launches them.

Keys and values lie as [kv_heads, blocks, KV_BLOCK, head_dim]; `cache_row` says where a position is. If they are
codes, their scales lie as [kv_heads, blocks, KV_BLOCK]; else pointers to scales are None.
"""

import triton
import triton.language as tl

from llmpq.spec import layers

KV_BLOCK = tl.constexpr(layers.KV_BLOCK)
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added, leaves of a small number the nearest whole one; of two the even one


@triton.jit
def cache_row(tables_ptr, columns, sequence, slot, slot_blocks, position, valid, RING: tl.constexpr):
    """Which row of a head's cache has a sequence's position, int64; tables are looked at where that is valid."""
    index = position // KV_BLOCK
    if RING:
        block = slot * slot_blocks + index % slot_blocks
    elif tables_ptr is None:
        block = slot * slot_blocks + index
    else:
        block = tl.load(tables_ptr + sequence * columns + index, mask=valid, other=0).to(tl.int64)
    return (block - index) * KV_BLOCK + position


@triton.jit
def _greatest(x):
    """The greatest |number| of each head in x [heads, dims]; NaN if one of them is not finite."""
    x = x.to(tl.float32)
    return tl.max(tl.abs(x), 1) + tl.sum(x - x, 1)


@triton.jit
def _as_kept(number, scales, kind: tl.constexpr):
    """Numbers [heads, dims], or codes with such scales [heads], as a cache has them; see `rotate_and_store`."""
    number = number.to(tl.float32)
    if kind == tl.float16:
        number = tl.where(number > 65504.0, 65504.0, tl.where(number < -65504.0, -65504.0, number))  # NaN stays
    if kind == tl.int8:
        number = tl.div_rn(number, tl.where(scales > 0.0, scales, 1.0)[:, None])
        number = tl.where(number > -127.0, tl.where(number < 127.0, number, 127.0), -127.0)  # NaN becomes a code
        number = number + TO_WHOLE - TO_WHOLE
    return number.to(kind)


@triton.jit
def _store(number, scales, is_key, is_value, column, valid, keys_ptr, values_ptr, row, HEAD_DIM: tl.constexpr):
    """Numbers [heads, dims] of keys and values to columns of their rows in the cache."""
    number = _as_kept(number, scales, keys_ptr.dtype.element_ty)
    place = row[:, None] * HEAD_DIM + column[None, :]
    tl.store(keys_ptr + place, number, mask=valid & is_key[:, None])
    tl.store(values_ptr + place, number, mask=valid & is_value[:, None])


@triton.jit(do_not_specialize=["qkv_stride", "columns", "blocks", "slot_blocks"])
def rotate_and_store_kernel(
    qkv_ptr,  # [t, HEADS + 2 * KV_HEADS, HEAD_DIM], tokens qkv_stride elements apart
    cos_ptr,  # [positions, DIMS]; not read where DIMS is 0
    sin_ptr,  # the first half with a minus sign
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    token_sequences_ptr,
    positions_ptr,
    tables_ptr,
    qkv_stride,
    columns,
    blocks,
    slot_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # of a head that rotate
    RING: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of half of DIMS
    BLOCK_REST: tl.constexpr,  # of the other dimensions
):
    """Programs (token, block of heads), of keys and values alone where DIMS is 0."""
    FIRST: tl.constexpr = 0 if DIMS else HEADS
    token = tl.program_id(0)
    position = tl.load(positions_ptr + token)
    sequence = tl.load(token_sequences_ptr + token)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    head = FIRST + tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = head < tl.where(position >= 0, HEADS + 2 * KV_HEADS, 0)
    is_key, is_value = there & (head >= HEADS) & (head < HEADS + KV_HEADS), there & (head >= HEADS + KV_HEADS)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    row = cache_row(tables_ptr, columns, sequence, slot, slot_blocks, position, position >= 0, RING=RING)
    row += kv_head.to(tl.int64) * blocks * KV_BLOCK
    of_head = qkv_ptr + token.to(tl.int64) * qkv_stride + head[:, None] * HEAD_DIM
    scales = tl.zeros((BLOCK_H,), tl.float32)
    if DIMS > 0:
        HALF: tl.constexpr = DIMS // 2
        column = tl.arange(0, BLOCK_D)
        valid, here = there[:, None] & (column < HALF)[None, :], of_head + column[None, :]
        x = tl.load(here, mask=valid, other=0.0)
        y = tl.load(here + HALF, mask=valid, other=0.0)
        table, in_table = position * DIMS + column, column < tl.where(position >= 0, HALF, 0)
        cos_x = tl.load(cos_ptr + table, mask=in_table, other=0.0).to(tl.float32)[None, :]
        sin_x = tl.load(sin_ptr + table, mask=in_table, other=0.0).to(tl.float32)[None, :]
        cos_y = tl.load(cos_ptr + table + HALF, mask=in_table, other=0.0).to(tl.float32)[None, :]
        sin_y = tl.load(sin_ptr + table + HALF, mask=in_table, other=0.0).to(tl.float32)[None, :]
        turned_x = (x.to(tl.float32) * cos_x + y.to(tl.float32) * sin_x).to(x.dtype)
        turned_y = (y.to(tl.float32) * cos_y + x.to(tl.float32) * sin_y).to(x.dtype)
        turns = (head < HEADS + KV_HEADS)[:, None]
        tl.store(here, turned_x, mask=valid & turns)
        tl.store(here + HALF, turned_y, mask=valid & turns)
        x, y = tl.where(turns, turned_x, x), tl.where(turns, turned_y, y)
    if DIMS < HEAD_DIM:
        rest = DIMS + tl.arange(0, BLOCK_REST)
        stays = (is_key | is_value)[:, None] & (rest < HEAD_DIM)[None, :]
        z = tl.load(of_head + rest[None, :], mask=stays, other=0.0)
    if key_scales_ptr is not None:
        if DIMS > 0:
            scales = tl.maximum(_greatest(x), _greatest(y), propagate_nan=tl.PropagateNan.ALL)
        if DIMS < HEAD_DIM:
            scales = tl.maximum(scales, _greatest(z), propagate_nan=tl.PropagateNan.ALL)
        scales = tl.div_rn(scales, 127.0)
        tl.store(key_scales_ptr + row, scales, mask=is_key)
        tl.store(value_scales_ptr + row, scales, mask=is_value)
    if DIMS > 0:
        _store(y, scales, is_key, is_value, column + HALF, valid, keys_ptr, values_ptr, row, HEAD_DIM)
        _store(x, scales, is_key, is_value, column, valid, keys_ptr, values_ptr, row, HEAD_DIM)
    if DIMS < HEAD_DIM:
        _store(z, scales, is_key, is_value, rest, stays, keys_ptr, values_ptr, row, HEAD_DIM)
