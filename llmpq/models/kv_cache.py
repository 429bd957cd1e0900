"""KVCache: keys and values of all sequences of a stage, allocated once, addressed by slot."""

from __future__ import annotations

import torch


class KVCache:
    """Room for `slots` sequences of `max_length` tokens in each layer.

    Keys and values of a layer are [slots, kv_heads, max_length, head_dim]. A slot needs no clearing: a sequence only
    sees positions that it wrote itself.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        max_length: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, slots, kv_heads, max_length, head_dim)
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(layer[0], layer[1]) for layer in self._data]
        # The same memory as [slots, max_length, 2, kv_heads, head_dim]: keys and values of a token in one assignment.
        self._tokens = [layer.permute(1, 3, 0, 2, 4) for layer in self._data]

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each [slots, kv_heads, max_length, head_dim]."""
        return self._layers[layer]

    def write(self, layer: int, token_slots: torch.Tensor, positions: torch.Tensor, kv: torch.Tensor) -> None:
        """Store keys and values kv [t, 2, kv_heads, head_dim] of the tokens at (token_slots, positions), int64 [t]."""
        self._tokens[layer].index_put_((token_slots, positions), kv)
