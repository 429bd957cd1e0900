"""The way into the KV cache in Triton. Importing this file does not need triton.

The cache has the shapes of the reference.
"""

from __future__ import annotations

import torch

from llmpq.kernels.backends.reference import allocate_zeros, cache_shapes
from llmpq.kernels.sequences import CacheLayer, Sequences

__all__ = ["allocate_zeros", "cache_shapes", "rotate_and_store"]

_HEADS = 4  # that one program rotates


def rotate_and_store(
    qkv: torch.Tensor, cache: CacheLayer, sequences: Sequences, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """As `llmpq.kernels.rotate_and_store` says; in one kernel, which rounds once. Nothing is done for absent tokens."""
    import triton

    from llmpq.kernels.backends.triton_kv_cache_kernels import rotate_and_store_kernel

    heads, kv_heads, head_dim = qkv.shape[1] - 2 * cache.kv_heads, cache.kv_heads, cache.head_dim
    at = sequences.on(qkv.device)
    cos, sin = rotary or (qkv, qkv)
    dims = cos.shape[1] if rotary else 0
    count = qkv.shape[1] if dims else 2 * kv_heads
    with torch.cuda.device_of(qkv):
        rotate_and_store_kernel[(len(qkv), triton.cdiv(count, _HEADS))](
            qkv,
            cos,
            sin,
            cache.keys,
            cache.values,
            cache.key_scales,
            cache.value_scales,
            at.slots,
            at.token_sequences,
            at.positions,
            at.tables,
            qkv.stride(0),
            at.columns,
            cache.blocks,
            cache.slot_blocks,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            DIMS=dims,
            RING=cache.is_ring,
            BLOCK_H=_HEADS,
            BLOCK_D=triton.next_power_of_2(max(1, dims // 2)),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - dims)),
            num_warps=1,
            enable_fp_fusion=True,
        )
