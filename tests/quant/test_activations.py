"""Quantized activations to the bit, against the definition written out for one number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq.quant.activations import activation_group, quantize_activations, rounded_activations
from llmpq.spec import GROUP_SIZES

TERMS = {"a8": 1, "a8x2": 2}
group_sizes = pytest.mark.parametrize("group_size", [*GROUP_SIZES, None])
one = np.float32


def scalar_group(values: list[np.float32], terms: int) -> tuple[list[list[int]], list[np.float32]]:
    """Codes and scales of one group, by term, in operations on single float32 numbers."""
    with np.errstate(all="ignore"):
        if not all(math.isfinite(value) for value in values):
            return [[0] * len(values)] * terms, [one("nan")] * terms
        largest = max(abs(value) for value in values)
        scale, inverse = largest / one(127), one(127) / largest
        if largest == 0 or math.isinf(inverse):
            return [[0] * len(values)] * terms, [one(0)] * terms
        steps = [value * inverse for value in values]
        hi = [round(float(step)) for step in steps]  # Python's round takes halves to even
        lo = [round(float((step - one(code)) * one(254))) for step, code in zip(steps, hi, strict=True)]
        return [hi, lo][:terms], [scale, scale / one(254)][:terms]


def check_bits(x: torch.Tensor, group_size: int | None, terms: int) -> None:
    m, k = x.shape
    codes, scales = quantize_activations(x, group_size, terms)
    size = min(group_size or 128, 128)
    assert codes.dtype == torch.int8 and codes.shape == (terms, m, k)
    assert scales.dtype == torch.float32 and scales.shape == (terms, m, -(-k // size))
    for row in range(m):
        for group, start in enumerate(range(0, k, size)):
            values = [one(value) for value in x[row, start : start + size].float().numpy()]
            expected_codes, expected_scales = scalar_group(values, terms)
            assert codes[:, row, start : start + size].tolist() == expected_codes
            found = scales[:, row, group].numpy()
            assert np.array_equal(found, np.array(expected_scales, dtype=np.float32), equal_nan=True)


@group_sizes
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("k", [1, 31, 32, 129, 300])
def test_codes_and_scales_are_the_definition_s_to_the_bit(group_size: int | None, terms: int, k: int) -> None:
    x = torch.randn(6, k)
    x[1] *= 1e30
    x[2] *= 1e-35
    x[3, ::2] = 0
    x[4] = x[4].round()  # many halves
    x[5] = torch.randint(-254, 255, (k,)) / 2
    check_bits(x, group_size, terms)
    check_bits(x[:2].to(torch.bfloat16), group_size, terms)


numbers = st.floats(width=32) | st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-39, 2.0**-126, 3.7e-37, 3.8e-37, 127.0, 63.5, 3.4028234663852886e38, -math.inf, math.nan]
)


@given(st.lists(numbers, min_size=1, max_size=40), st.sampled_from([1, 2]))
def test_any_float32_is_quantized_as_defined(values: list[float], terms: int) -> None:
    check_bits(torch.tensor([values]), 32, terms)


@given(st.lists(st.floats(0.0, 2.0**-119, width=32), min_size=1, max_size=8), st.sampled_from([1, 2]))
def test_so_are_numbers_at_the_lower_end(values: list[float], terms: int) -> None:
    check_bits(torch.tensor([values]), 32, terms)


def test_groups_are_those_of_the_weight_but_128_at_most() -> None:
    assert [activation_group(size) for size in (*GROUP_SIZES, None)] == [32, 64, 128, 128, 128]


@group_sizes
@pytest.mark.parametrize(("activations", "limit"), [("a8", 0.5), ("a8x2", 0.5 / 254)])
def test_rounded_values_are_within_half_a_step(group_size: int | None, activations: str, limit: float) -> None:
    k, size = 300, min(group_size or 128, 128)
    x = torch.randn(5, k) * torch.logspace(-6, 6, 5)[:, None]
    rounded = rounded_activations(x, group_size, activations)
    assert rounded.dtype == torch.float64 and rounded.shape == x.shape
    for start in range(0, k, size):
        part = slice(start, start + size)
        step = x[:, part].abs().amax(1, keepdim=True).double() / 127
        error = (rounded[:, part] - x[:, part].double()).abs() / step
        assert float(error.max()) <= limit + 1e-4


@group_sizes
@pytest.mark.parametrize("activations", ["a8", "a8x2"])
def test_rounded_values_are_the_sum_of_scale_times_code(group_size: int | None, activations: str) -> None:
    x, size = torch.randn(3, 200), min(group_size or 128, 128)
    codes, scales = quantize_activations(x, group_size, TERMS[activations])
    rounded = rounded_activations(x, group_size, activations)
    for row, column in ((0, 0), (1, 64), (2, 199)):
        terms = [int(c[row, column]) * float(s[row, column // size]) for c, s in zip(codes, scales, strict=True)]
        assert float(rounded[row, column]) == sum(terms)


@pytest.mark.parametrize("activations", ["a8", "a8x2"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_value_that_is_not_finite_makes_its_group_nan_and_no_other(activations: str, value: float) -> None:
    x = torch.randn(3, 100)
    expected = rounded_activations(x, 32, activations)
    x[1, 40] = value
    found = rounded_activations(x, 32, activations)
    assert found[1, 32:64].isnan().all()
    found[1, 32:64] = expected[1, 32:64]
    assert torch.equal(found, expected)


def test_no_rows_give_no_rows() -> None:
    assert rounded_activations(torch.empty(0, 70), 32, "a8x2").shape == (0, 70)
