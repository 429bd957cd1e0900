"""How many bytes of tensors are alive at once while something is computed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """`peak`: the most that tensors made in the block held together; each storage counts once, views do not."""

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, int] = {}  # storage -> tensors that are views of it
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs or {})) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._tensors:
                    if key in given:
                        continue  # it was there before
                    self._tensors[key] = 0
                    self._now += size
                    self.peak = max(self.peak, self._now)
                self._tensors[key] += 1
                weakref.finalize(x, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if self._tensors[key] == 0:
            del self._tensors[key]
            self._now -= size
