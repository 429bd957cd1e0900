"""Reading memory and nothing else: what a product with one row cannot be faster than."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.kernels import ceilings
from bench.kernels.rivals import Contender, Problem

_NBYTES = 160 * 2**20  # several times the caches, in whole huge pages


def contender(problem: Problem) -> Contender:
    """Its nbytes are not those of a weight: times are scaled to the bytes of what it is compared with."""
    read, address = ceilings.library().ceilings_read_seconds, ceilings.buffer(_NBYTES)

    def bind(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        def sweep() -> torch.Tensor:
            read(address, _NBYTES, problem.threads)
            return x

        return sweep

    return Contender(_NBYTES, 1, None, bind)
