"""Program: the operations of a pass on a CPU, recorded once and then run in one call, without Python between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from llmpq.kernels.registry import load
from llmpq.kernels.sequences import Sequences

_LOOKS = ("min", "max")  # by which tokens are checked
_CHANGES = ("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")))


class _NothingElse(TorchFunctionMode):
    """Refuses what torch computes itself, which a program would lack. Views of tensors are no computing."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        name, named = getattr(function, "__name__", str(function)), named or {}
        in_place = name in _CHANGES or (name.endswith("_") and not name.endswith("__")) or "out" in named
        if not in_place:
            result = function(*arguments, **named)
            if name in _LOOKS or _addresses(result) <= _addresses(arguments):
                return result
        raise RuntimeError(f"torch's {name} was called while a program was recorded, which would not hold it")


def _addresses(tensors: Any) -> set[int]:
    """Of the memory of one tensor or several."""
    several = tensors if isinstance(tensors, (tuple, list)) else (tensors,)
    return {tensor.untyped_storage().data_ptr() for tensor in several if isinstance(tensor, torch.Tensor)}


class Program:
    """What `compute` does, in operations of the backend "cpu", for other tokens of other sequences as well.

    `compute` is called once and computes nothing: its operations are noted with the addresses of their tensors, which
    `compute` must go on referring to. Each works on rows from the start of its buffers on: as many as a pass has
    tokens, or a multiple of them, if it did so in relation to the first operation when it was recorded. Raises
    RuntimeError if `compute` does anything else but take views of tensors.
    """

    def __init__(self, compute: Callable[[], object]) -> None:
        self._keeps = compute  # and the tensors that it refers to
        self._program = load("cpu").new_program()
        with _recording(self._program):
            self.result = compute()  # of the tokens that it was recorded with
        self.names: tuple[str, ...] = tuple(self._program.names)  # of the operations: gemm, attention and so on

    def run(
        self,
        rows: int,
        *,
        tokens: torch.Tensor | None = None,
        sequences: Sequences | None = None,
        seconds: torch.Tensor | None = None,
    ) -> None:
        """Compute it for so many rows.

        `tokens` (int64 [rows], contiguous) are those to embed, `sequences` those to attend to, whose cache has room for
        them. After `kernels.last_rows` operations work on as many rows as there are sequences. `seconds` (float64, one
        for each operation) gets how long each took. Raises ValueError for tokens that the table has not.
        """
        load("cpu").run_program(self._program, rows, tokens, sequences, seconds)


@contextmanager
def _recording(program: Any) -> Iterator[None]:
    program.begin()
    try:
        with _NothingElse():
            yield
    finally:
        program.end()
