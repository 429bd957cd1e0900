"""Attention over a KV cache, and the way of new keys and values there, in the layout of the cache's backend."""

from __future__ import annotations

import math

import torch

from llmpq.kernels.outputs import check_out
from llmpq.kernels.registry import load
from llmpq.kernels.sequences import CacheLayer, Sequences
from llmpq.kernels.weight import FLOAT_DTYPES
from llmpq.spec.layers import KV_BLOCK, blocks_for


def allocate_cache(
    backend: str,
    layers: int,
    slots: int,
    kv_heads: int,
    max_len: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    capacity: int | None = None,
    blocks: int | None = None,
) -> list[CacheLayer]:
    """Caches of so many layers, full of zeros, with all keys in one tensor of `dtype` and all values in another.

    Of torch.int8 these are codes, whose scales are in two more tensors. A slot keeps the latest `capacity` of its
    max_len positions at least, in whole blocks; all, if it is None. Layers that keep all have a pool of `blocks`, by
    default as many as all slots have of their own. Raises ValueError for a capacity below 1.
    """
    module = load(backend)
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity is {capacity}, expected 1 or more")
    slot_blocks = blocks_for(max_len if capacity is None else min(capacity, max_len))
    if blocks is None or slot_blocks < blocks_for(max_len):
        blocks = slots * slot_blocks
    parts = [(shape, dtype) for shape in module.cache_shapes(blocks, kv_heads, head_dim)]
    if dtype == torch.int8:
        parts += 2 * [((kv_heads, blocks, KV_BLOCK), torch.float32)]
    tensors = [module.allocate_zeros((layers, *shape), kind, device) for shape, kind in parts]
    return [
        CacheLayer(backend, keys, values, max_len, head_dim, slot_blocks, *scales)
        for keys, values, *scales in zip(*tensors)
    ]


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
    if (sequences.tables is None or cache.is_ring) and sequences.num_slots > cache.slots:
        raise ValueError(f"slots names {sequences.num_slots - 1}, but the cache has {cache.slots}")
    if not cache.is_ring and sequences.num_blocks > cache.blocks:
        raise ValueError(f"tables name block {sequences.num_blocks - 1}, but the cache has {cache.blocks}")
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
    tokens. `rotary` has tables [>= context_len, dims] of the cosines and sines by which dimensions j and j + dims / 2
    are rotated at each position, in qkv's dtype, the first half of the sines with a minus sign; those from dims on stay
    as they are. None: nothing is rotated. Numbers that a cache of float16 cannot hold become its largest, 65504. In one
    of int8 the key or value of a token and kv head gets a scale, its largest |number| / 127, and codes, number / scale
    to the nearest, ties to even; all are 0 for zeros, and the scale is NaN for one that is not finite. Raises
    ValueError.
    """
    _check_cache(cache, sequences, qkv, "qkv")
    if qkv.shape[1] < 2 * cache.kv_heads:
        raise ValueError(f"qkv has {qkv.shape[1]} heads, expected those of {cache.kv_heads} keys and values at least")
    if len(qkv) and (qkv.stride(2) != 1 or qkv.stride(1) != qkv.shape[2]):
        raise ValueError("qkv has gaps within a token, which are not supported")
    if cache.is_ring and len(qkv) and sequences.longest_query > cache.capacity:
        raise ValueError(
            f"query_lens says {sequences.longest_query}, but a slot of the cache keeps {cache.capacity} positions"
        )
    dims = rotary[0].shape[-1] if rotary is not None else 0
    if dims > cache.head_dim or dims % 2:
        raise ValueError(f"{dims} dimensions of heads of {cache.head_dim}, expected an even number of them to rotate")
    for table in rotary or ():
        if table.dim() != 2 or table.shape[0] < sequences.longest or table.shape[1] != dims:
            raise ValueError(
                f"a table of rotary has shape {list(table.shape)}, expected [>= {sequences.longest}, {dims}]"
            )
        if table.dtype != qkv.dtype or table.device != qkv.device or not table.is_contiguous():
            raise ValueError(
                f"a table of rotary is {table.dtype} on {table.device}, expected contiguous {qkv.dtype} on {qkv.device}"
            )
    if len(qkv):
        load(cache.backend).rotate_and_store(qkv, cache, sequences, rotary)


def _check_window(window: int | None, cache: CacheLayer, sequences: Sequences) -> None:
    """Raise ValueError unless the cache keeps all keys that the new tokens see."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected 1 or more")
    if not cache.is_ring:
        return
    if window is None:
        raise ValueError(f"a slot of the cache keeps {cache.capacity} of {cache.max_len} positions: window is missing")
    needed = window + sequences.longest_query - 1
    if needed > cache.capacity:
        raise ValueError(
            f"{sequences.longest_query} new tokens of a sequence see {needed} positions through a window of {window}, "
            f"but a slot of the cache keeps {cache.capacity}"
        )


def _check_of_heads(name: str, of_heads: torch.Tensor, q: torch.Tensor) -> None:
    """Raise ValueError unless there is a number for each head of q."""
    heads = q.shape[1]
    if of_heads.dtype != torch.float32 or of_heads.shape != (heads,) or not of_heads.is_contiguous():
        raise ValueError(
            f"{name} is {of_heads.dtype} {list(of_heads.shape)}, expected contiguous torch.float32 [{heads}]"
        )
    if of_heads.device != q.device:
        raise ValueError(f"{name} is on {of_heads.device}, but q is on {q.device}")


def attention(
    q: torch.Tensor,
    cache: CacheLayer,
    sequences: Sequences,
    scale: float,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the new tokens of several sequences to all of theirs: [t, heads, d], or `out`.

    q is [t, heads, d]; the cache holds the new tokens' keys and values already. A token sees those up to its own
    position, with a `window` so many of the latest, its own among them; codes are seen times their scales. Query head h
    reads kv head h // (heads / kv_heads). Scores are q.k * scale. To them is added, with `slopes` (float32 [heads]),
    the head's slope times (key position - query position), as ALiBi has it (Press et al., "Train short, test long");
    then, with a `cap`, they become cap * tanh(score / cap). `sinks` (float32 [heads]) are a further score of each head,
    which takes part in the softmax and has no value. Raises ValueError.
    """
    check_out(out, q)
    _check_cache(cache, sequences, q, "q")
    if q.shape[1] % cache.kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, which {cache.kv_heads} kv_heads do not divide")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"cap is {cap}, expected a positive number")
    if sinks is not None:
        _check_of_heads("sinks", sinks, q)
    if slopes is not None:
        _check_of_heads("slopes", slopes, q)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(q):
        _check_window(window, cache, sequences)
        load(cache.backend).attention(q, cache, sequences, scale, out, window, cap, sinks, slopes)
    return out
