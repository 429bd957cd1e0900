"""The Triton kernels of attention over a KV cache; llmpq/kernels/backends/triton_attention.py launches them.

How keys and values lie, and the scales of codes, says triton_kv_cache_kernels.py. What a row of queries gives depends
on that row and on the positions of its own sequence: blocks and splits are cut by the sequence's length, and added up
in their order. Scores, and with them CAP, are in units of log(2), so that exp2 makes weights of them.
"""

import triton
import triton.language as tl

from llmpq.kernels.backends.triton_kv_cache_kernels import KV_BLOCK, cache_row
from llmpq.kernels.backends.triton_rows_kernels import capped

BLOCK = KV_BLOCK  # positions that decoding takes at a time
LEAST_BLOCKS = tl.constexpr(2)  # in a split: fewer would cost more to merge than they save
MERGED = tl.constexpr(16)  # splits that are merged at a time
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # less than any score, and finite: its difference from itself is 0


@triton.jit
def _splits(seen, SPLITS: tl.constexpr):
    """How the positions that a token sees are cut: the blocks of a split, and the splits, SPLITS at most."""
    blocks = tl.cdiv(seen, BLOCK)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST_BLOCKS)
    return each, tl.cdiv(blocks, each)


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """The first position that the token at `position` sees; WINDOW is 0 where there is none."""
    return tl.maximum(position - (WINDOW - 1), 0) if WINDOW else 0


@triton.jit
def _scale_of(scale, key_scales_ptr, row, loaded):
    """What q.k is multiplied by: of the keys in some rows, if they are codes."""
    if key_scales_ptr is not None:
        scale *= tl.load(key_scales_ptr + row, mask=loaded, other=0.0)[None, :]
    return scale


@triton.jit
def _numbers(values, value_scales_ptr, row, loaded, dtype: tl.constexpr):
    """Values of some rows as they are multiplied. Codes become numbers: weights times scales might be too small."""
    if value_scales_ptr is not None:
        values = values.to(tl.float32) * tl.load(value_scales_ptr + row, mask=loaded, other=0.0)[:, None]
    return values.to(dtype)


@triton.jit
def _scores(q, keys, scale, slopes_ptr, head, distance, CAP: tl.constexpr):
    """[queries, keys] of heads that are broadcast with them; distance: from the query's position to the key's."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    if slopes_ptr is not None:
        scores += tl.load(slopes_ptr + head) * LOG2_E * distance
    return capped(scores, CAP) if CAP > 0 else scores


@triton.jit
def _denominator(total, greatest, sinks_ptr, head):
    """By what sums of values are divided: the sum of weights, and with sinks that of the head; 1 in place of 0."""
    if sinks_ptr is not None:
        total += tl.exp2(tl.load(sinks_ptr + head) * LOG2_E - greatest)
    return tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["q_stride", "columns", "blocks", "slot_blocks"])
def decode_kernel(
    q_ptr,  # [t, HEADS, HEAD_DIM], tokens q_stride elements apart
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,  # [t, HEADS, HEAD_DIM], written if SPLITS is 1
    sums_ptr,  # float32 [s, HEADS, SPLITS, HEAD_DIM], else: sums of values, each times 2**(score - greatest)
    stats_ptr,  # float32 [s, HEADS, SPLITS, 2]: the greatest score, and the sum of 2**(score - greatest)
    slots_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tables_ptr,  # [s, columns]: the blocks of each sequence; None: those of their slots
    sinks_ptr,  # float32 [HEADS], or None
    slopes_ptr,  # float32 [HEADS], or None
    q_stride,
    columns,
    blocks,  # of the cache
    slot_blocks,  # that each slot has of its own
    scale,  # of scores, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    CAP: tl.constexpr,  # 0.0: none
    RING: tl.constexpr,
    SPLITS: tl.constexpr,  # most of a sequence
    dtype: tl.constexpr,  # what is multiplied
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of sequences with one new token; all query heads of a kv head are rows of one product.

    Programs (first, kv_head, sequence): each takes the splits first, first + programs and so on. They have one loop, in
    which loads run ahead into the next split.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    first, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts_ptr + sequence)
    single = tl.load(query_starts_ptr + sequence + 1) - token == 1
    context = tl.where(single, tl.load(context_lens_ptr + sequence), 0)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)

    row, column = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head, rows = kv_head * GROUP + row, tl.where(single, GROUP, 0)
    begin = kv_head.to(tl.int64) * blocks * KV_BLOCK
    valid = (row < rows)[:, None] & (column < HEAD_DIM)[None, :]
    q_at = q_ptr + token.to(tl.int64) * q_stride + head[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(q_at, mask=valid, other=0.0).to(dtype)
    some_head = tl.minimum(head, HEADS - 1)

    first_seen = _first_seen(context - 1, WINDOW)
    each, splits = _splits(context - first_seen, SPLITS)
    programs = tl.num_programs(0)
    mine = tl.maximum(splits - first + programs - 1, 0) // programs
    greatest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for i in range(mine * each):
        split, block = first + i // each * programs, i % each
        start = first_seen + (split * each + block) * BLOCK
        position = start + tl.arange(0, BLOCK)
        seen = position < context
        if WINDOW:
            row_of = cache_row(tables_ptr, columns, sequence, slot, slot_blocks, position, seen, RING=RING)
        else:  # all of them lie in one block
            first_row = cache_row(tables_ptr, columns, sequence, slot, slot_blocks, start, start < context, RING=RING)
            row_of = first_row + tl.arange(0, BLOCK)
        row_of += begin
        there = row_of[:, None] * HEAD_DIM + column[None, :]
        loaded = seen[:, None] & (column < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + there, mask=loaded, other=0.0).to(dtype)
        distance = (position - context + 1)[None, :]
        scale_of = _scale_of(scale, key_scales_ptr, row_of, seen)
        scores = _scores(q, keys, scale_of, slopes_ptr, some_head[:, None], distance, CAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        before = tl.where(block == 0, float("-inf"), greatest)  # a split begins anew
        greatest = tl.maximum(before, tl.max(scores, 1))
        kept = tl.exp2(before - greatest)
        weights = tl.exp2(scores - greatest[:, None])
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(values_ptr + there, mask=loaded, other=0.0)
        values = _numbers(values, value_scales_ptr, row_of, seen, dtype)
        sums = tl.dot(weights.to(dtype), values, sums * kept[:, None], input_precision="ieee")
        if SPLITS > 1:
            rows = tl.where(block == each - 1, GROUP, 0)  # of a split's last block
            part = (sequence.to(tl.int64) * HEADS + head) * SPLITS + split
            tl.store(
                sums_ptr + part[:, None] * HEAD_DIM + column[None, :],
                sums,
                mask=(row < rows)[:, None] & (column < HEAD_DIM)[None, :],
            )
            tl.store(stats_ptr + part * 2, greatest, mask=row < rows)
            tl.store(stats_ptr + part * 2 + 1, total, mask=row < rows)
    if SPLITS == 1:
        result = sums / _denominator(total, greatest, sinks_ptr, some_head)[:, None]
        out_at = out_ptr + (token.to(tl.int64) * HEADS + head)[:, None] * HEAD_DIM + column[None, :]
        tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def merge_kernel(
    sums_ptr,  # as `decode_kernel` writes them
    stats_ptr,
    out_ptr,
    query_starts_ptr,
    context_lens_ptr,
    sinks_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention of a head of a sequence with one new token from that to the parts of its context; absent: 0."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts_ptr + sequence)
    single = tl.load(query_starts_ptr + sequence + 1) - token == 1
    context = tl.where(single, tl.load(context_lens_ptr + sequence), 0)
    _, splits = _splits(context - _first_seen(context - 1, WINDOW), SPLITS)
    column = tl.arange(0, BLOCK_D)
    begin = (sequence.to(tl.int64) * HEADS + head) * SPLITS
    greatest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, MERGED):
        split = start + tl.arange(0, MERGED)
        part, valid = begin + split, split < splits
        part_greatest = tl.load(stats_ptr + part * 2, mask=valid, other=float("-inf"))
        part_total = tl.load(stats_ptr + part * 2 + 1, mask=valid, other=0.0)
        loaded = valid[:, None] & (column < HEAD_DIM)[None, :]
        part_sums = tl.load(sums_ptr + part[:, None] * HEAD_DIM + column[None, :], mask=loaded, other=0.0)
        before = greatest
        greatest = tl.maximum(before, tl.max(part_greatest, 0))
        kept, weights = tl.exp2(before - greatest), tl.exp2(part_greatest - greatest)
        total = total * kept + tl.sum(weights * part_total, 0)
        sums = sums * kept + tl.sum(weights[:, None] * part_sums, 0)
    result = sums / _denominator(total, greatest, sinks_ptr, head)
    out_at = out_ptr + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + column
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=column < tl.where(single, HEAD_DIM, 0))


@triton.jit(do_not_specialize=["q_stride", "columns", "blocks", "slot_blocks"])
def prefill_kernel(
    q_ptr,  # as above
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    out_ptr,
    slots_ptr,
    query_starts_ptr,
    context_lens_ptr,
    tables_ptr,
    sinks_ptr,
    slopes_ptr,
    q_stride,
    columns,
    blocks,
    slot_blocks,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    RING: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Causal attention of sequences with several new tokens; programs (block of queries, head, sequence)."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * BLOCK_M
    start = tl.load(query_starts_ptr + sequence)
    queries = tl.load(query_starts_ptr + sequence + 1) - start
    context = tl.load(context_lens_ptr + sequence)
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    none = (queries < 2) | (first >= queries)

    query, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    valid = (query < tl.where(none, 0, queries))[:, None] & (column < HEAD_DIM)[None, :]
    token = (start + query).to(tl.int64)
    q_at = q_ptr + token[:, None] * q_stride + head * HEAD_DIM + column[None, :]
    q = tl.load(q_at, mask=valid, other=0.0).to(dtype)
    begin = (head // (HEADS // KV_HEADS)).to(tl.int64) * blocks * KV_BLOCK

    own = context - queries + query  # a query's position
    end = tl.where(none, 0, tl.minimum(context, context - queries + first + BLOCK_M))
    # Of whole blocks, so that a query's are the same beside any others. Some of them may be before its window.
    start_block = _first_seen(context - queries + first, WINDOW) // BLOCK_N * BLOCK_N
    greatest = tl.full((BLOCK_M,), LOWEST if WINDOW else float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for block in range(start_block, end, BLOCK_N):
        position = block + tl.arange(0, BLOCK_N)
        first_row = cache_row(tables_ptr, columns, sequence, slot, slot_blocks, block, True, RING=RING)  # in one block
        row_of = begin + first_row + tl.arange(0, BLOCK_N)
        there = row_of[:, None] * HEAD_DIM + column[None, :]
        loaded = (position < context)[:, None] & (column < HEAD_DIM)[None, :]
        keys = tl.load(keys_ptr + there, mask=loaded, other=0.0).to(dtype)
        distance = position[None, :] - own[:, None]  # compared, too: with positions registers would spill
        scale_of = _scale_of(scale, key_scales_ptr, row_of, position < context)
        scores = _scores(q, keys, scale_of, slopes_ptr, head, distance, CAP)
        seen = (distance <= 0) & (distance > -WINDOW) if WINDOW else distance <= 0
        scores = tl.where(seen, scores, float("-inf"))
        before = greatest
        greatest = tl.maximum(before, tl.max(scores, 1))
        kept = tl.exp2(before - greatest)
        weights = tl.exp2(scores - greatest[:, None])
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(values_ptr + there, mask=loaded, other=0.0)
        values = _numbers(values, value_scales_ptr, row_of, position < context, dtype)
        sums = tl.dot(weights.to(dtype), values, sums * kept[:, None], input_precision="ieee")
    result = sums / _denominator(total, greatest, sinks_ptr, head)[:, None]
    out_at = out_ptr + (token[:, None] * HEADS + head) * HEAD_DIM + column[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=valid)
