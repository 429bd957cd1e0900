"""Attention over a KV cache, and the way of new keys and values there, in the layout of the cache's backend."""

from __future__ import annotations

import torch

from llmpq.kernels.outputs import check_out
from llmpq.kernels.registry import load
from llmpq.kernels.sequences import CacheLayer, Sequences
from llmpq.kernels.weight import FLOAT_DTYPES


def allocate_cache(
    backend: str,
    layers: int,
    slots: int,
    kv_heads: int,
    max_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[CacheLayer]:
    """Caches of so many layers, full of zeros, with all keys in one tensor of `dtype` and all values in another."""
    module = load(backend)
    shapes = module.cache_shapes(slots, kv_heads, max_len, head_dim)
    keys, values = (module.allocate_zeros((layers, *shape), dtype, device) for shape in shapes)
    return [CacheLayer(backend, keys[i], values[i], max_len, head_dim) for i in range(layers)]


def _check_cache(cache: CacheLayer, sequences: Sequences, x: torch.Tensor, name: str) -> None:
    """Raise ValueError unless x [t, _, d] has tokens of these sequences, and the cache room for them."""
    if x.dim() != 3 or x.dtype not in FLOAT_DTYPES or x.shape[2] != cache.head_dim:
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}, expected floating-point [t, heads, d] with d = {cache.head_dim}"
        )
    if cache.backend == "cpu" and x.dtype != torch.float32:
        raise ValueError(
            f"{name} is {x.dtype}, but the cache is that of backend 'cpu', which computes in torch.float32"
        )
    if x.device != cache.keys.device:
        raise ValueError(f"{name} is on {x.device}, but the cache is on {cache.keys.device}")
    if sequences.num_slots > cache.slots:
        raise ValueError(f"slots names {sequences.num_slots - 1}, but the cache has {cache.slots}")
    if sequences.longest > cache.max_len:
        raise ValueError(
            f"context_lens says {sequences.longest}, but a slot of the cache has {cache.max_len} positions"
        )
    if sequences.tokens != len(x):
        raise ValueError(f"{name} has {len(x)} tokens, but query_lens say {sequences.tokens}")


def rotate_and_store(
    qkv: torch.Tensor, cache: CacheLayer, sequences: Sequences, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> None:
    """Rotate new queries and keys in place, and write keys and values to the cache.

    qkv is [t, heads + 2 * kv_heads, d]: queries, keys and values of the sequences' new tokens; any distance between
    tokens. `rotary` has tables [>= context_len, d] of the cosines and sines by which dimensions j and j + d / 2 are
    rotated at each position, in qkv's dtype, the first half of the sines with a minus sign; None: nothing is rotated.
    Numbers that a cache of float16 cannot hold become its largest, 65504. Raises ValueError.
    """
    _check_cache(cache, sequences, qkv, "qkv")
    if qkv.shape[1] < 2 * cache.kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} heads, expected those of {cache.kv_heads} keys and values at least")
    if len(qkv) and (qkv.stride(2) != 1 or qkv.stride(1) != qkv.shape[2]):
        raise ValueError("qkv has gaps within a token, which are not supported")
    for table in rotary or ():
        if table.dim() != 2 or table.shape[0] < sequences.longest or table.shape[1] != cache.head_dim:
            raise ValueError(
                f"a table of rotary has shape {list(table.shape)}, expected [>= {sequences.longest}, {cache.head_dim}]"
            )
        if table.dtype != qkv.dtype or table.device != qkv.device or not table.is_contiguous():
            raise ValueError(
                f"a table of rotary is {table.dtype} on {table.device}, expected contiguous {qkv.dtype} on {qkv.device}"
            )
    if rotary is not None and cache.head_dim % 2:
        raise ValueError(f"heads of {cache.head_dim} dimensions, which are no pairs, cannot be rotated")
    if len(qkv):
        load(cache.backend).rotate_and_store(qkv, cache, sequences, rotary)


def attention(
    q: torch.Tensor, cache: CacheLayer, sequences: Sequences, scale: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention of the new tokens of several sequences to all of theirs: [t, heads, d], or `out`.

    q is [t, heads, d]; the cache holds the new tokens' keys and values already. A token sees those up to its own
    position. Query head h reads kv head h // (heads / kv_heads). Raises ValueError.
    """
    check_out(out, q)
    _check_cache(cache, sequences, q, "q")
    if q.shape[1] % cache.kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, which {cache.kv_heads} kv_heads do not divide")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        load(cache.backend).attention(q, cache, sequences, scale, out)
    return out
