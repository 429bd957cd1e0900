"""Step: which tokens of which sequences one pass through a stage computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from llmpq.kernels import Sequences


@dataclass(frozen=True, eq=False)
class Step:
    """New tokens of several sequences, packed one after the other without padding. All tensors are on the CPU."""

    slots: torch.Tensor  # int32 [s]: where in the cache each sequence is
    query_lens: torch.Tensor  # int32 [s]: its new tokens
    starts: torch.Tensor  # int32 [s]: position of the first of them
    tokens: torch.Tensor  # int64 [t], t = sum(query_lens)
    tables: torch.Tensor | None = None  # int32 [s, columns]: the cache's blocks of each; None: those of their slots

    def __post_init__(self) -> None:
        for name in ("slots", "query_lens", "starts"):
            tensor = getattr(self, name)
            if tensor.dtype != torch.int32 or tensor.shape != self.slots.shape:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected int32 [{len(self.slots)}]")
        count = sum(self.query_lens.tolist())
        if self.tokens.dtype != torch.int64 or self.tokens.shape != (count,):
            raise ValueError(f"tokens is {self.tokens.dtype} {list(self.tokens.shape)}, expected int64 [{count}]")

    @classmethod
    def of(
        cls,
        slots: Sequence[int],
        query_lens: Sequence[int],
        starts: Sequence[int],
        tokens: Sequence[int],
        blocks: Sequence[Sequence[int] | npt.NDArray[np.int32]] | None = None,
    ) -> Step:
        """A step from lists: slots, query_lens and starts of the sequences, and all their new tokens in one list.

        `blocks`: what each sequence has of the cache, in order, soonest as arrays; None: what its slot has of its own.
        """
        a, b, c = torch.tensor([*slots, *query_lens, *starts], dtype=torch.int32).view(3, -1).unbind()
        tables = None
        if blocks is not None:
            filled = np.zeros((len(blocks), max(map(len, blocks), default=0)), dtype=np.int32)
            for row, own in zip(filled, blocks):
                row[: len(own)] = own
            tables = torch.from_numpy(filled)
        return cls(a, b, c, torch.tensor(tokens, dtype=torch.int64), tables)

    @property
    def num_sequences(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """int64 [s]: row of each sequence's last token, whose logits predict the next."""
        return self.query_lens.cumsum(0) - 1

    @property
    def context_lens(self) -> torch.Tensor:
        """int32 [s]: tokens of each sequence, the new ones included."""
        return self.sequences.context_lens

    @cached_property
    def sequences(self) -> Sequences:
        """What kernels are told of the step. Raises ValueError for lengths that no sequences have."""
        return Sequences(self.slots, self.query_lens, self.starts + self.query_lens, self.tables)
