"""KVCache: keys and values of all sequences of a stage, allocated once, addressed by slot."""

from __future__ import annotations

import torch

from llmpq import kernels


class KVCache:
    """Room for `slots` sequences of `max_length` tokens in each layer, for a stage that computes in `compute_dtype`.

    Keys and values are kept in `dtype`, laid out for the backend whose attention such a stage uses. A slot needs no
    clearing: a sequence only sees positions that it wrote itself.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._slots, self._max_length = slots, max_length
        backend = kernels.cache_backend(device, compute_dtype)
        self._layers = kernels.allocate_cache(backend, num_layers, slots, kv_heads, max_length, head_dim, dtype, device)

    def check(self, sequences: kernels.Sequences) -> None:
        """Raise ValueError unless there is room for these sequences."""
        if sequences.num_slots > self._slots:
            raise ValueError(f"slots names {sequences.num_slots - 1}, but the cache has {self._slots}")
        if sequences.longest > self._max_length:
            raise ValueError(
                f"context_lens says {sequences.longest}, but a slot of the cache has {self._max_length} positions"
            )

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers)

    def layer(self, layer: int) -> kernels.CacheLayer:
        """Keys and values of one layer."""
        return self._layers[layer]
