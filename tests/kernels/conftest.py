"""Where Triton's kernels are tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmpq.kernels import available_backends


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where Triton runs, as the default backend, and tensors are made."""
    if reason := available_backends()["triton"]:
        pytest.skip(reason)
    monkeypatch.setenv("LLMPQ_BACKEND", "triton")
    where = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with where:
        yield where
