"""KVCache: keys and values of all sequences of a stage, allocated once, addressed by slot."""

from __future__ import annotations

import torch

from llmpq import kernels
from llmpq.spec import ModelSpec


class KVCache:
    """Room for `slots` sequences of `max_length` tokens in each layer, for a stage that computes in `compute_dtype`.

    Keys and values are kept in `dtype`, laid out for the backend whose attention such a stage uses. A slot needs no
    clearing: a sequence only sees positions that it wrote itself.
    """

    def __init__(
        self,
        spec: ModelSpec,
        num_layers: int,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        backend = kernels.cache_backend(device, compute_dtype)
        shapes = kernels.cache_shapes(backend, slots, spec.num_kv_heads, max_length, spec.head_dim)
        self._data = [torch.zeros((num_layers, *shape), dtype=dtype, device=device) for shape in shapes]
        self._layers = [
            kernels.CacheLayer(backend, keys, values, max_length, spec.head_dim) for keys, values in zip(*self._data)
        ]

    @property
    def nbytes(self) -> int:
        return sum(data.nbytes for data in self._data)

    def layer(self, layer: int) -> kernels.CacheLayer:
        """Keys and values of one layer."""
        return self._layers[layer]
