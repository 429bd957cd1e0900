"""KV caches for tests, with NaN in every place that nobody wrote, which codes have for a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq import kernels
from llmpq.kernels import CacheLayer, Sequences
from llmpq.spec.layers import KV_BLOCK
from tests.support.reference import int8_codes


def sequences(
    slots: Sequence[int],
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Sequence[Sequence[int]] | None = None,
) -> Sequences:
    columns = [list(lens) for lens in (slots, query_lens, context_lens)] + ([] if tables is None else [tables])
    return Sequences(*(torch.tensor(column, dtype=torch.int32, device="cpu") for column in columns))


def empty_layer(
    slots: int,
    kv_heads: int,
    max_len: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.float32,
    capacity: int | None = None,
    blocks: int | None = None,
) -> CacheLayer:
    """A layer of the backend that computes in `compute_dtype` on torch's default device, full of NaN."""
    device = torch.get_default_device()
    backend = kernels.cache_backend(device, compute_dtype)
    (layer,) = kernels.allocate_cache(backend, 1, slots, kv_heads, max_len, head_dim, dtype, device, capacity, blocks)
    for part in parts(layer):
        part.fill_(float("nan") if part.is_floating_point() else 99)
    return layer


def parts(layer: CacheLayer) -> list[torch.Tensor]:
    """Keys and values, and the scales if they have any."""
    tensors = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return [tensor for tensor in tensors if tensor is not None]


def fill(layer: CacheLayer, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """As `store` from position 0 on, but not by a kernel where the layout is plain: Triton's interpreter is slow."""
    if layer.backend == "cpu":
        store(layer, slot, keys, values)
        return
    numbers = [keys, values]
    if layer.key_scales is not None:
        numbers = [part for of_both in zip(int8_codes(keys), int8_codes(values)) for part in of_both]
    for cached, new in zip(parts(layer), numbers, strict=True):
        for block, part in enumerate(new.transpose(0, 1).split(KV_BLOCK, 1), slot * layer.slot_blocks):
            cached[:, block, : part.shape[1]] = part


def of_slot(layer: CacheLayer, cached: torch.Tensor, slot: int) -> torch.Tensor:
    """Keys or values of a slot's own blocks, [kv_heads, capacity, d], of a plain layout; a copy."""
    return cached[:, slot * layer.slot_blocks : (slot + 1) * layer.slot_blocks].flatten(1, 2)


def store(layer: CacheLayer, slot: int, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
    """Write keys and values [t, kv_heads, d] to the positions of a slot from `start` on."""
    of = sequences([slot], [len(keys)], [start + len(keys)])
    kernels.rotate_and_store(torch.cat((keys, values), 1), layer, of, None)
