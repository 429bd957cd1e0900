"""The truths that kernels are compared with: none of them hangs on what lies around the operands."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.support import reference
from tests.support.reference import assert_close_to_float64, assert_close_to_native, attention_float64

BEYOND = 31  # columns, as oneDNN reads them on a processor with AMX where k is no multiple of 32


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values amid NaN."""
    around = torch.full((len(tensor) + 2, tensor.shape[1] + 2 * BEYOND), math.nan, dtype=tensor.dtype)
    inner = around[1:-1, BEYOND:-BEYOND]
    return inner.copy_(tensor)


@pytest.fixture
def torch_reads_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's product reads beyond the columns of x and of the weight, and multiplies what is there by zero."""
    linear = F.linear

    def reading(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        beyond = [t.as_strided((len(t), BEYOND), t.stride(), t.storage_offset() + t.shape[1]) for t in (x, weight)]
        return linear(x, weight, bias) + sum(float(part.sum()) * 0.0 for part in beyond)

    monkeypatch.setattr(F, "linear", reading)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_reference_does_not_hang_on_what_lies_around_its_operands(
    torch_reads_beyond: None, dtype: torch.dtype
) -> None:
    x, weight = (poisoned(torch.randn(rows, 33).to(dtype)) for rows in (5, 16))
    assert F.linear(x, weight).isnan().all(), "this is what the references must not see"
    exact = (x.double()[:, :, None] * weight.double().T).sum(1)
    assert_close_to_native(exact.to(dtype), x, weight)
    assert_close_to_float64(exact, x.double(), weight)
    with pytest.raises(AssertionError, match="max abs error"):
        assert_close_to_native((1.1 * exact).to(dtype), x, weight)


def test_a_reference_that_is_not_finite_is_an_error() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    x[1, 2] = math.nan
    y = F.linear(x, weight)
    with pytest.raises(AssertionError, match="the reference is not finite"):
        assert_close_to_native(y, x, weight)
    with pytest.raises(AssertionError, match="the reference is not finite"):
        reference.relative_error(y, y)


def test_attention_s_reference_reads_no_position_after_the_query_s() -> None:
    cache = torch.full((1, 1, 9, 8), math.nan)
    cache[:, :, :5] = torch.randn(5, 8)
    exact = attention_float64(torch.randn(2, 3, 8), cache, cache, [0], [2], [5], 0.3)
    assert exact.isfinite().all()
