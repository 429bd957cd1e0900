"""A backend under test, with a device that it runs on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from llmpq.kernels import available_backends
from llmpq.spec import Precision


@dataclass(frozen=True)
class Target:
    """A backend under test, and a device that it runs on."""

    backend: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Too slow for large cases."""
        return self.backend == "triton" and self.device == "cpu"

    def same(self, y: torch.Tensor, expected: torch.Tensor, precision: Precision) -> bool:
        """Whether two products of the same rows have the same bits.

        For plain weights the GPU backends call torch's product, whose bits depend on shapes and strides.
        """
        if self.backend in ("cuda", "triton") and not precision.quantized:
            return torch.allclose(y, expected, rtol=2.0**-7, atol=2.0**-7)
        return torch.equal(y, expected)


def require_backend(name: str) -> None:
    """Skip the test, with the reason, where a backend cannot run."""
    if reason := available_backends()[name]:
        pytest.skip(f"backend {name} is not available: {reason}")
