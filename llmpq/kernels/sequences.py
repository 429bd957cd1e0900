"""Sequences: which tokens of which sequences an operation is about. CacheLayer: where their keys and values are."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from llmpq.kernels.registry import load


@dataclass(frozen=True, eq=False)
class Sequences:
    """New tokens of several sequences, packed one after the other. All tensors are int32 [s], contiguous, on the CPU.

    Sequence s has its cache in slots[s], query_lens[s] new tokens and context_lens[s] tokens in all; its new token i is
    at position context_lens[s] - query_lens[s] + i. One serves all layers of a step. Raises ValueError.
    """

    slots: torch.Tensor
    query_lens: torch.Tensor
    context_lens: torch.Tensor
    tokens: int = field(init=False)  # new ones of all sequences
    num_slots: int = field(init=False)  # that a cache must have at least
    longest: int = field(init=False)  # of context_lens
    _rows: dict[object, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        count = self.slots.shape[0] if self.slots.dim() else 0
        for name in ("slots", "query_lens", "context_lens"):
            lens = getattr(self, name)
            if lens.dtype != torch.int32 or lens.shape != (count,) or lens.device.type != "cpu":
                raise ValueError(
                    f"{name} is {lens.dtype} {list(lens.shape)} on {lens.device}, expected int32 [{count}] on the CPU"
                )
            object.__setattr__(self, name, lens.contiguous())
        slots, query_lens, context_lens = (t.tolist() for t in (self.slots, self.query_lens, self.context_lens))
        if slots and min(slots) < 0:
            raise ValueError(f"slots names {min(slots)}, expected 0 or more")
        for queries, context in zip(query_lens, context_lens):
            if not 0 < queries <= context:
                raise ValueError(
                    f"query_lens and context_lens say {queries} and {context}, expected 0 < query_len <= context_len"
                )
        object.__setattr__(self, "tokens", sum(query_lens))
        object.__setattr__(self, "num_slots", max(slots, default=-1) + 1)
        object.__setattr__(self, "longest", max(context_lens, default=0))

    @cached_property
    def positions(self) -> torch.Tensor:
        """int64 [t]: position of each token in its sequence."""
        # A sequence's last token is at context_lens - 1; the others are as far from it as their rows.
        shifts = self.context_lens - self.query_lens.cumsum(0)
        return torch.arange(self.tokens) + shifts.repeat_interleave(self.query_lens)

    @cached_property
    def token_slots(self) -> torch.Tensor:
        """int64 [t]: slot of each token's sequence."""
        return self.slots.long().repeat_interleave(self.query_lens)

    @cached_property
    def handle(self) -> Any:
        """What the extension module of the backend "cpu" needs to know, looked up once."""
        return load("cpu").sequences_handle(self)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """token_slots and positions on a device, copied there once."""
        if device not in self._rows:
            self._rows[device] = self.token_slots.to(device), self.positions.to(device)
        rows: tuple[torch.Tensor, torch.Tensor] = self._rows[device]
        return rows

    def rows_of(self, table: torch.Tensor) -> torch.Tensor:
        """Rows of a table [max_len, d] for the tokens' positions, [t, 1, d], looked up once."""
        key = table.data_ptr()
        if key not in self._rows:
            self._rows[key] = table[self.on(table.device)[1]].unsqueeze_(1)
        rows: torch.Tensor = self._rows[key]
        return rows


@dataclass(frozen=True, eq=False)
class CacheLayer:
    """Keys and values of one layer: for each slot and kv head, `max_len` positions of `head_dim` numbers.

    How they lie in the tensors is the backend's affair, and what they hold where no sequence has written is anything.
    """

    backend: str
    keys: torch.Tensor
    values: torch.Tensor
    max_len: int
    head_dim: int

    @property
    def slots(self) -> int:
        return self.keys.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @cached_property
    def handle(self) -> Any:
        """What the backend's extension module needs to know, looked up once."""
        return load(self.backend).cache_handle(self)
