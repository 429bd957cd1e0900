"""Attention over a KV cache in Triton. Importing this file does not need triton.

The launches depend on how many sequences and tokens there are, on whether all sequences have one new token each, and on
the cache's shape; only where some have more do they depend on lengths. So a step that decodes can be captured in a CUDA
graph and replayed for others (`llmpq.kernels.DeviceSequences`).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llmpq.kernels.backends import triton_device
from llmpq.kernels.sequences import CacheLayer, Sequences

_MOST_SPLITS = 32  # of a context: what bounds the scratch
_POSITIONS = 128  # in a split, at least: LEAST_BLOCKS * BLOCK of the kernels
_LOG2_E = math.log2(math.e)
_PROGRAMS = 4  # a multiprocessor, about: enough of them wait for memory while others compute


def most_splits(seen: int) -> int:
    """Into how many parts decoding cuts a context at most: of `_POSITIONS` at least, where a token sees `seen`."""
    return min(_MOST_SPLITS, -(-seen // _POSITIONS))


def _narrowing(window: int | None, cache: CacheLayer) -> int:
    """The window, or 0 if it hides nothing of what the cache can hold."""
    return 0 if window is None or window >= cache.max_len else window


def attention(
    q: torch.Tensor,
    cache: CacheLayer,
    sequences: Sequences,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> None:
    """As `llmpq.kernels.attention` says. A sequence's result has the same bits alone and beside others.

    Sequences with one new token are decoded: each program takes some parts of a context, and a second kernel merges
    them. The others go through a kernel that takes many queries at a time; a step may need both. Neither reads what all
    of its tokens have behind their windows. Scratch is one float32 number for each token, dimension and part, and two
    for each head. The result of an absent sequence is 0.
    """
    # A model has few of these, so kernels are compiled for each.
    options = {"WINDOW": _narrowing(window, cache), "CAP": (cap or 0.0) * _LOG2_E, "RING": cache.is_ring}
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        q = q.contiguous()
    if sequences.is_decode or sequences.shortest_query == 1:
        _decode(q, cache, sequences, scale, out, sinks, slopes, options)
    if not sequences.is_decode:
        _prefill(q, cache, sequences, scale, out, sinks, slopes, options)


def _multiplied(q: torch.Tensor, cache: CacheLayer) -> torch.dtype:
    """What queries, keys, weights and values are multiplied in, which holds keys, values and codes exactly.

    Codes times scales are rounded to it. The interpreter multiplies the bits of bfloat16.
    """
    kept = cache.keys.dtype if cache.key_scales is None else q.dtype
    if triton_device.describe(q.device)[0] < (8, 0) or torch.float32 in (q.dtype, kept):
        return torch.float32
    return kept if kept == q.dtype else torch.float32


def _stages(dtype: torch.dtype, block_d: int) -> int:
    """Blocks of keys and values whose loads are under way at a time: as many as fit in any GPU's shared memory."""
    return 1 if dtype == torch.float32 or block_d > 128 else 3


def _decode(
    q: torch.Tensor,
    cache: CacheLayer,
    sequences: Sequences,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    options: dict[str, Any],
) -> None:
    import triton

    from llmpq.kernels.backends.triton_attention_kernels import decode_kernel, merge_kernel

    heads, head_dim = q.shape[1:]
    count, window = len(sequences.slots), options["WINDOW"]
    splits = most_splits(window or cache.max_len)
    at, dtype = sequences.on(q.device), _multiplied(q, cache)
    block_d = max(16, triton.next_power_of_2(head_dim))
    sums = stats = out
    if splits > 1:
        sums = torch.empty(count, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        stats = torch.empty(count, heads, splits, 2, dtype=torch.float32, device=q.device)
    enough = triton.cdiv(_PROGRAMS * triton_device.describe(q.device)[1], count * cache.kv_heads)
    with torch.cuda.device_of(q):
        decode_kernel[(min(splits, enough), cache.kv_heads, count)](
            q,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            out,
            sums,
            stats,
            at.slots,
            at.query_starts,
            at.context_lens,
            at.tables,
            sinks,
            slopes,
            q.stride(0),
            at.columns,
            cache.blocks,
            cache.slot_blocks,
            scale * _LOG2_E,
            HEADS=heads,
            KV_HEADS=cache.kv_heads,
            HEAD_DIM=head_dim,
            **options,
            SPLITS=splits,
            dtype=triton_device.dtype_of(dtype),
            BLOCK_G=max(16, triton.next_power_of_2(heads // cache.kv_heads)),
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
            num_stages=_stages(dtype, block_d),
        )
        if splits > 1:
            merge_kernel[(heads, count)](
                sums,
                stats,
                out,
                at.query_starts,
                at.context_lens,
                sinks,
                HEADS=heads,
                HEAD_DIM=head_dim,
                WINDOW=window,
                SPLITS=splits,
                BLOCK_D=block_d,
                num_warps=4,
                enable_fp_fusion=True,
            )


def _prefill(
    q: torch.Tensor,
    cache: CacheLayer,
    sequences: Sequences,
    scale: float,
    out: torch.Tensor,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
    options: dict[str, Any],
) -> None:
    import triton

    from llmpq.kernels.backends.triton_attention_kernels import prefill_kernel

    heads, head_dim = q.shape[1:]
    at, dtype = sequences.on(q.device), _multiplied(q, cache)
    block_d = max(16, triton.next_power_of_2(head_dim))
    tile = {"BLOCK_M": 128 if block_d <= 128 else 64, "BLOCK_N": 64, "num_warps": 8 if block_d <= 128 else 4}
    if dtype == torch.float32:
        tile = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4}
    with torch.cuda.device_of(q):
        prefill_kernel[(triton.cdiv(sequences.longest_query, tile["BLOCK_M"]), heads, len(sequences.slots))](
            q,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            out,
            at.slots,
            at.query_starts,
            at.context_lens,
            at.tables,
            sinks,
            slopes,
            q.stride(0),
            at.columns,
            cache.blocks,
            cache.slot_blocks,
            scale * _LOG2_E,
            HEADS=heads,
            KV_HEADS=cache.kv_heads,
            HEAD_DIM=head_dim,
            **options,
            dtype=triton_device.dtype_of(dtype),
            BLOCK_D=block_d,
            num_stages=_stages(dtype, block_d),
            enable_fp_fusion=True,
            **tile,
        )
