"""Arena: the memory of a stage's activations, allocated once for its largest step; and malloc's unused memory."""

from __future__ import annotations

import ctypes
import math

import torch

from llmpq.spec import ModelSpec, Plan


class Arena:
    """Uninitialised tensors: hidden states, from two buffers in turn; what half a layer makes in between; logits.

    All of them are views of memory that is allocated once, and in the same places in every pass: a recorded program and
    a captured graph know them by address. On a CPU, malloc would leave holes between tensors of changing sizes, and
    fresh pages for each tensor cost as much time as half a layer; pages become resident when a step first writes to
    them. On a GPU all of it is resident at once.
    """

    def __init__(
        self, spec: ModelSpec, tokens: int, dtype: torch.dtype, device: torch.device, logit_rows: int = 0
    ) -> None:
        self._hidden_size, self._vocab_size = spec.hidden_size, spec.vocab_size
        self.dtype, self.device = dtype, device
        self._hidden = [self._new(tokens, spec.hidden_size) for _ in range(2)]
        self._room = self._new(tokens * spec.widest_activations)
        self._last_rows = self._new(logit_rows, spec.hidden_size)
        self._next_tokens = torch.empty(logit_rows, dtype=torch.int64, device=device)
        self._logits = self._new(logit_rows, spec.vocab_size)
        self._turn = self._used = 0

    @classmethod
    def of_stage(cls, spec: ModelSpec, plan: Plan, index: int, device: torch.device) -> Arena:
        """One for steps of `plan.step_tokens` tokens, with the logits of a step on the head's stage."""
        dtype: torch.dtype = getattr(torch, plan.stages[index].compute_dtype)
        return cls(spec, plan.step_tokens, dtype, device, plan.step_sequences if index == plan.head.stage else 0)

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens begins: what is asked for next is where it was in the pass before.

        Raises ValueError for more tokens than the arena was made for.
        """
        self._turn = self._used = 0
        self._check(tokens)

    def hidden_states(self, tokens: int) -> torch.Tensor:
        """[tokens, hidden_size]: the buffer that the previous call did not return. Ends the life of `empty` tensors.

        Raises ValueError as `begin`.
        """
        self._used = 0
        self._check(tokens)
        self._turn = 1 - self._turn
        return self._hidden[self._turn][:tokens]

    def empty(self, tokens: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[tokens, ...], contiguous, valid until the next call of `hidden_states`; in its dtype, or one that is wider.

        It begins at the same place for any number of tokens. Raises ValueError if the room is used up.
        """
        dtype = dtype or self.dtype
        times = dtype.itemsize // self.dtype.itemsize
        each = times * math.prod(shape)
        start = -(-self._used // times) * times
        self._used = start + len(self._hidden[0]) * each
        if self._used > len(self._room):
            raise ValueError(f"a tensor of {[tokens, *shape]} is larger than the step that its arena was made for")
        self._check(tokens)
        return self._room[start : start + tokens * each].view(dtype).view(tokens, *shape)

    def _check(self, tokens: int) -> None:
        most = len(self._hidden[0])
        if tokens > most:
            raise ValueError(f"a step of {tokens} tokens is larger than the {most} that its arena was made for")

    @property
    def logit_rows(self) -> int:
        """For how many rows the next three have their place; they are allocated for more."""
        return len(self._logits)

    def last_rows(self, rows: int) -> torch.Tensor:
        """[rows, hidden_size] of what the head reads. Ends the life of `empty` tensors."""
        self._used = 0
        return self._last_rows[:rows] if rows <= self.logit_rows else self._new(rows, self._hidden_size)

    def next_tokens(self, rows: int) -> torch.Tensor:
        """int64 [rows]."""
        if rows <= self.logit_rows:
            return self._next_tokens[:rows]
        return torch.empty(rows, dtype=torch.int64, device=self.device)

    def logits(self, rows: int) -> torch.Tensor:
        """[rows, vocab_size], valid until the next call."""
        return self._logits[:rows] if rows <= self.logit_rows else self._new(rows, self._vocab_size)

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)


def return_free_memory(device: torch.device | None = None) -> None:
    """Return unused memory to the system: malloc's (glibc; elsewhere nothing happens), and torch's on a GPU."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
