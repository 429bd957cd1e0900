"""What is known of a contender once it has been timed, and how far its products are from exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.kernels.rivals import Contender

WRONG = 5e-2  # relative error beyond which a rival was called wrongly
_CHECKED_ROWS = 16


@dataclass(frozen=True)
class Timing:
    """One contender with one number of rows."""

    seconds: list[float]  # of one product, per round
    error: float | None  # relative Frobenius error against float64 on its own weights; None: no product
    nbytes: int  # of its weight
    graphed: bool | None = None  # whether it was timed in a CUDA graph; None: on the CPU
    latency_seconds: float | None = None  # of a single call without a graph, if that was timed


class WrongProductError(ValueError):
    """A rival's product is too far from the exact one to be timed."""


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return float((y.double() - exact).norm() / exact.norm())


class Checked:
    """A contender and what its product should be, in some of the rows."""

    def __init__(self, contender: Contender, x: torch.Tensor) -> None:
        self.contender = contender
        self.rows = torch.linspace(0, len(x) - 1, min(len(x), _CHECKED_ROWS)).long().to(x.device)
        self.exact = None if contender.weight is None else x[self.rows].double() @ contender.weight().double().T

    def error(self, y: torch.Tensor) -> float | None:
        """Of the product with the first m rows of x."""
        if self.exact is None:
            return None
        inside = self.rows < len(y)
        return relative_error(y[self.rows[inside]], self.exact[inside])

    def accept(self, y: torch.Tensor) -> float | None:
        """The same. Raises WrongProductError if it is not small."""
        error = self.error(y)
        if error is not None and not error < WRONG:
            raise WrongProductError(f"its product with {len(y)} rows has the relative error {error:.1e}")
        return error
