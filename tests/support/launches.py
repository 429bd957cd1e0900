"""Counts what work on tensors consists of: Triton's launches, and what torch computes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """`launches` has kernel, grid and what else was given that is no tensor; `torch` the names of torch's operations.

    Views and allocations are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, ...]] = []
        self.torch: list[str] = []
        self._within = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None
    ) -> Any:
        result, name = function(*arguments, **(named or {})), function._schema.name
        # What may return a view may also compute: `to`, `contiguous`, `reshape`.
        may_be_view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        is_view = may_be_view and _memory(result) <= _memory(arguments)
        if not self._within and not is_view and not name.startswith("aten::empty"):
            self.torch.append(name)
        return result

    def launched(self, launch: Callable[..., Any], kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            rest = [value for value in (*arguments, *named.items()) if not isinstance(value, torch.Tensor)]
            self.launches.append((kernel.fn.__name__, *grid, *rest))
            self._within = True
            try:
                return launch(kernel, grid)(*arguments, **named)
            finally:
                self._within = False

        return run


def _memory(tensors: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor)}


@contextmanager
def counted() -> Iterator[Operations]:
    """What is done within."""
    from triton.runtime.jit import KernelInterface

    operations, launch = Operations(), KernelInterface.__getitem__
    with pytest.MonkeyPatch.context() as patch, operations:
        patch.setattr(KernelInterface, "__getitem__", lambda kernel, grid: operations.launched(launch, kernel, grid))
        yield operations
