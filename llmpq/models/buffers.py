"""Where a stage's activations go, allocated once for its largest step; and memory that is free again."""

from __future__ import annotations

import ctypes
import math

import torch

from llmpq.spec import ModelSpec, Plan


class Buffers:
    """Hidden states in two tensors in turn, room for what a half of a layer makes in between, and logits.

    They are most of what a CPU stage takes for activations, however long it runs: an allocator would leave holes
    between tensors of changing sizes, and getting pages anew for each takes as long as half a layer. They take memory
    as far as steps really use them. On a GPU, where torch's allocator does as well, there are none: what is asked for
    is None then, and its user allocates.
    """

    def __init__(
        self, spec: ModelSpec, tokens: int, dtype: torch.dtype, device: torch.device, logit_rows: int = 0
    ) -> None:
        self._on_cpu = device.type == "cpu"
        rows = tokens if self._on_cpu else 0
        self._hidden = [torch.empty(rows, spec.hidden_size, dtype=dtype) for _ in range(2)]
        self._room = torch.empty(rows * spec.widest_activations, dtype=dtype)
        self._logits = torch.empty(logit_rows if self._on_cpu else 0, spec.vocab_size, dtype=dtype)
        self._used = 0

    @classmethod
    def of_stage(cls, spec: ModelSpec, plan: Plan, index: int, device: torch.device) -> Buffers:
        """Those of one stage of a plan: for `plan.step_tokens` tokens, and on the head's stage logits of a step."""
        dtype: torch.dtype = getattr(torch, plan.stages[index].compute_dtype)
        return cls(spec, plan.step_tokens, dtype, device, plan.step_sequences if index == plan.head.stage else 0)

    def logits(self, rows: int) -> torch.Tensor | None:
        """[rows, vocab_size]; None for more rows than there are."""
        return self._logits[:rows] if rows <= len(self._logits) else None

    def hidden_states(self, tokens: int, other: torch.Tensor | None = None) -> torch.Tensor | None:
        """[tokens, hidden_size] that does not share memory with `other`, what this gave before. Empties the room."""
        if not self._on_cpu:
            return None
        self._used = 0
        taken = other is not None and other.data_ptr() == self._hidden[0].data_ptr()
        return self._hidden[taken][:tokens]

    def take(self, *shape: int) -> torch.Tensor | None:
        """Contiguous, from the room, until it is emptied. Raises ValueError if there is no room for it."""
        if not self._on_cpu:
            return None
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > len(self._room):
            raise ValueError(f"a buffer of {list(shape)} is larger than the step that buffers were made for")
        return self._room[start : self._used].view(shape)


def return_free_memory() -> None:
    """Have the allocator give back what it keeps for later (glibc; elsewhere nothing happens)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
