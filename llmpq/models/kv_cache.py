"""KVCache: keys and values of all sequences of a stage, allocated once, addressed by block and slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmpq import kernels
from llmpq.spec.layers import blocks_for


class KVCache:
    """Room for `slots` sequences of `max_length` tokens in each layer, for a stage that computes in `compute_dtype`.

    Keys and values are kept in `dtype`, of torch.int8 as codes with scales, laid out for the backend whose attention
    such a stage uses. Each layer has a pool of `blocks`; without that number, as many as all slots have of their own. A
    block needs no clearing: a sequence only sees positions that were written for it.

    A layer with a window keeps the latest positions of a slot in blocks of the slot's own, as many as its number in
    `capacities` at least; None: all, as all layers do without `capacities`. It is the window and one less than the new
    tokens that a sequence has in a step: `new_tokens` at most, where a layer does not keep all. Raises ValueError
    unless there is one for each layer.
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
        capacities: Sequence[int | None] | None = None,
        new_tokens: int | None = None,
        blocks: int | None = None,
    ) -> None:
        capacities = (None,) * num_layers if capacities is None else capacities
        if len(capacities) != num_layers:
            raise ValueError(f"there are {len(capacities)} capacities, but {num_layers} layers")
        self._slots, self._max_length = slots, max_length
        self.slot_blocks = blocks_for(max_length)  # of the longest sequence
        self.longest_step = max_length if new_tokens is None else new_tokens  # most new tokens of a sequence in a step
        shape = (slots, kv_heads, max_length, head_dim)
        backend = kernels.cache_backend(device, compute_dtype)
        self._layers: dict[int, kernels.CacheLayer] = {}
        for capacity in dict.fromkeys(capacities):
            alike = [layer for layer in range(num_layers) if capacities[layer] == capacity]
            kept = kernels.allocate_cache(backend, len(alike), *shape, dtype, device, capacity, blocks)
            self._layers.update(zip(alike, kept))
        self._blocks = slots * self.slot_blocks if blocks is None else blocks

    def check(self, sequences: kernels.Sequences) -> None:
        """Raise ValueError unless there is room for these sequences."""
        slots = self._slots if sequences.tables is not None else min(self._slots, self._blocks // self.slot_blocks)
        if sequences.num_slots > slots:
            raise ValueError(f"slots names {sequences.num_slots - 1}, but the cache has {slots}")
        if sequences.num_blocks > self._blocks:
            raise ValueError(f"tables name block {sequences.num_blocks - 1}, but the cache has {self._blocks}")
        if sequences.longest > self._max_length:
            raise ValueError(
                f"context_lens says {sequences.longest}, but a slot of the cache has {self._max_length} positions"
            )
        if sequences.tokens and sequences.longest_query > self.longest_step:
            raise ValueError(
                f"query_lens says {sequences.longest_query}, but the cache has room for {self.longest_step} new tokens "
                "of a sequence in a step"
            )

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers.values())

    def layer(self, layer: int) -> kernels.CacheLayer:
        """Keys and values of one layer."""
        return self._layers[layer]
