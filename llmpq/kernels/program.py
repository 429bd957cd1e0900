"""Program: the operations of a pass on a CPU, recorded once and then run in one call, without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmpq.kernels.backends import cpu
from llmpq.kernels.sequences import Sequences

# What makes another tensor of the same memory, and what checks of tokens look at.
_HARMLESS = frozenset(
    f"aten::{name}" for name in ("view", "slice", "select", "split", "unsqueeze", "alias", "as_strided", "min", "max")
)


class _NothingElse(TorchDispatchMode):
    """Refuses what torch computes itself, which a program would lack."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name
        if name not in _HARMLESS:
            raise RuntimeError(f"{name} was called while a program was recorded, which would not hold it")
        return function(*arguments, **(named or {}))


class Program:
    """What `compute` does, in operations of the backend "cpu", for other tokens of other sequences as well.

    `compute` is called once and computes nothing: its operations are noted with the addresses of their tensors, which
    must stay where they are. Each works on rows, of as many tokens as a pass has, at the start of its buffers. Raises
    RuntimeError if `compute` does anything else but take views of tensors.
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._program = cpu.new_program()
        with _recording(self._program):
            self._result = compute()

    @property
    def names(self) -> list[str]:
        """Of the operations, in order: gemm, attention, rms_norm and so on."""
        names: list[str] = self._program.names
        return names

    def run(
        self,
        rows: int,
        *,
        tokens: torch.Tensor | None = None,
        sequences: Sequences | None = None,
        seconds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What `compute` returned, [rows, ...], for so many rows.

        `tokens` (int64 [rows], contiguous) are those to embed, `sequences` those to attend to, whose cache has room for
        them. `seconds` (float64, one for each operation) gets how long each took. Raises ValueError for tokens that the
        table has not.
        """
        cpu.run_program(self._program, rows, tokens, sequences, seconds)
        return self._result.as_strided((rows, *self._result.shape[1:]), self._result.stride())


@contextmanager
def _recording(program: Any) -> Iterator[None]:
    program.begin()
    try:
        with _NothingElse():  # type: ignore[no-untyped-call]
            yield
    finally:
        program.end()
