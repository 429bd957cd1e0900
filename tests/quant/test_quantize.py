"""Quantizing: QuantTensor is what it says, and round-to-nearest with its scale search does what it promises."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmpq.quant import QuantTensor, pack, quantize, unpack
from llmpq.spec import GROUP_SIZES, W16, Precision
from tests.support.grid import PACKED
from tests.support.reference import random_zeros, relative_error

precisions = pytest.mark.parametrize("precision", PACKED, ids=str)
scale_dtypes = pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)


def groups_of(tensor: torch.Tensor, precision: Precision) -> list[torch.Tensor]:
    """The columns of each group."""
    return list(tensor.split(precision.group_size or tensor.shape[1], dim=1))


def plain_round_to_nearest(weight: torch.Tensor, precision: Precision, scale_dtype: torch.dtype) -> torch.Tensor:
    """Quantized and dequantized with the scale that maps the largest weight to the last code; group by group."""
    levels = 2**precision.bits - 1
    parts = []
    for group in groups_of(weight, precision):
        if precision.zero == "offset":
            low, high = group.aminmax(dim=1, keepdim=True)
            scale, offset = ((high - low) / levels).to(scale_dtype).float(), low.to(scale_dtype).float()
            codes = torch.where(scale > 0, (group - offset) / scale, 0).round()
            parts.append(scale * codes.clamp(0, levels) + offset)
            continue
        if precision.zero == "sym":
            zero = torch.tensor(2.0 ** (precision.bits - 1))
            scale = group.abs().amax(1, keepdim=True) / (levels - zero)
        else:
            low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / levels
            zero = torch.where(scale > 0, -low / scale, 0).round()
        scale = scale.to(scale_dtype).float()
        codes = torch.where(scale > 0, group / scale, 0).round() + zero
        parts.append(scale * (codes.clamp(0, levels) - zero))
    return torch.cat(parts, dim=1)


def squared_errors(weight: torch.Tensor, approximation: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Of each group: [n, groups]."""
    difference = approximation.double() - weight.double()
    return torch.stack([group.square().sum(1) for group in groups_of(difference, precision)], dim=1)


@precisions
@scale_dtypes
def test_dequantize_gives_what_the_formulas_say(precision: Precision, scale_dtype: torch.dtype) -> None:
    n, k = 3, 150
    groups = precision.num_groups(k)
    codes = torch.randint(2**precision.bits, (n, k), dtype=torch.uint8)
    scales = torch.randn(n, groups).to(scale_dtype)
    zeros = random_zeros(scales, precision)
    w = QuantTensor(pack(codes, precision.bits), scales, zeros, precision, (n, k)).dequantize()
    for i in range(n):
        for j in range(k):
            group = j // (precision.group_size or k)
            scale, code = float(scales[i, group]), int(codes[i, j])
            if precision.zero == "offset":
                expected = float(np.float32(scale * code + float(zeros[i, group])))
            else:
                expected = scale * (code - (2 ** (precision.bits - 1) if zeros is None else int(zeros[i, group])))
            assert float(w[i, j]) == expected


@precisions
@scale_dtypes
@pytest.mark.parametrize("k", [1, 31, 200, 256])
def test_search_is_never_worse_than_plain_rounding(precision: Precision, scale_dtype: torch.dtype, k: int) -> None:
    weight = torch.randn(24, k) * torch.logspace(-2, 1, 24)[:, None]
    weight[:8] = weight[:8] ** 3  # heavy tails
    weight[8:12] += 2 * weight[8:12].abs().amax()  # all of one sign
    found = quantize(weight, precision, scale_dtype=scale_dtype).dequantize()
    plain = plain_round_to_nearest(weight, precision, scale_dtype)
    found_error, plain_error = (squared_errors(weight, w, precision) for w in (found, plain))
    # Which of the two is better is decided in float32.
    energy = squared_errors(weight, torch.zeros_like(weight), precision)
    assert (found_error <= plain_error * (1 + 1e-4) + energy * 1e-9).all()


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        # The best 8 and 16 equidistant levels for a normal distribution have errors of 0.1935 and 0.1074 (J. Max,
        # 1960); a group of 128 adapts to its own largest weights.
        (Precision(3, 128), 0.17, 0.20),
        (Precision(4, 128), 0.09, 0.105),
        (Precision(3, None), 0.18, 0.21),
        (Precision(4, None), 0.10, 0.12),
        (Precision(8, 128), 0.005, 0.0075),
    ],
    ids=str,
)
def test_normal_weights_are_quantized_nearly_as_well_as_can_be(precision: Precision, least: float, most: float) -> None:
    weight = torch.randn(128, 1024)
    error = relative_error(quantize(weight, precision).dequantize(), weight)
    assert least < error < most


@pytest.mark.parametrize(("bits", "gain"), [(3, 0.75), (4, 0.9)])
def test_search_pays_where_levels_are_few(bits: int, gain: float) -> None:
    precision, weight = Precision(bits, 128), torch.randn(128, 1024)
    plain = plain_round_to_nearest(weight, precision, torch.float16)
    found = quantize(weight, precision).dequantize()
    assert relative_error(found, weight) < gain * relative_error(plain, weight)


@precisions
def test_weights_inside_the_range_are_off_by_half_a_step_at_most(precision: Precision) -> None:
    weight = torch.randn(16, 300)
    quantized = quantize(weight, precision)
    codes = unpack(quantized.qweight, precision.bits, 300)
    inside = (codes > 0) & (codes < 2**precision.bits - 1)
    size = precision.group_size or 300
    half_step = quantized.scales.float().abs().repeat_interleave(size, dim=1)[:, :300] / 2
    error = (quantized.dequantize() - weight).abs()
    assert bool(inside.any())
    assert (error <= half_step * (1 + (1e-4 if precision.zero == "offset" else 1e-5)))[inside].all()


@pytest.mark.parametrize("precision", [p for p in PACKED if p.zero != "offset"], ids=str)
@scale_dtypes
def test_zero_weights_stay_exactly_zero(precision: Precision, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(4, 160)
    weight[0] = 0
    weight[1, ::3] = 0
    weight[2, 32:] = 0
    quantized = quantize(weight, precision, scale_dtype=scale_dtype).dequantize()
    assert (quantized[weight == 0] == 0).all()


@precisions
@pytest.mark.parametrize("value", [1.0, -1.0, 0.0371, -250.0])
def test_constant_groups_are_exact_up_to_the_scale_s_rounding(precision: Precision, value: float) -> None:
    weight = torch.full((3, 200), value)
    assert relative_error(quantize(weight, precision).dequantize(), weight) <= 2.0**-11


@precisions
def test_one_large_weight_does_not_overflow_its_code(precision: Precision) -> None:
    weight = torch.full((2, 96), 1e-3)
    weight[0, 5], weight[1, 70] = 100.0, -100.0
    quantized = quantize(weight, precision).dequantize()
    assert relative_error(quantized, weight) < (2e-3 if precision.zero == "offset" else 1e-3)  # two roundings


@precisions
@scale_dtypes
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e30])
def test_sizes_beyond_the_scale_s_range_give_finite_weights_of_the_right_sign(
    precision: Precision, scale_dtype: torch.dtype, size: float
) -> None:
    weight = torch.randn(4, 100) * size
    quantized = quantize(weight, precision, scale_dtype=scale_dtype).dequantize()
    assert quantized.isfinite().all()
    if precision.zero != "offset":
        assert (quantized * weight.sign() >= 0).all()
    assert relative_error(quantized, weight) <= 1


@precisions
def test_rows_do_not_depend_on_each_other(precision: Precision) -> None:
    weight = torch.randn(40, 130)
    whole = quantize(weight, precision)
    for start, stop in ((0, 1), (7, 23), (39, 40)):
        part, view = quantize(weight[start:stop], precision), whole.rows(start, stop)
        assert torch.equal(part.qweight, view.qweight)
        assert torch.equal(part.scales, view.scales)
        assert part.zeros is None or torch.equal(part.zeros, view.zeros)


def test_weights_of_many_chunks_are_quantized_as_their_parts() -> None:
    weight, precision = torch.randn(1100, 1000), Precision(4, 64)
    whole = quantize(weight, precision).dequantize()
    parts = torch.cat([quantize(part, precision).dequantize() for part in weight.split(77)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_floating_dtype_and_stride_is_quantized_as_its_float32_values(dtype: torch.dtype) -> None:
    weight, precision = torch.randn(100, 2 * 20).to(dtype).T[::2], Precision(4, 32, "asym")
    assert torch.equal(quantize(weight, precision).dequantize(), quantize(weight.float(), precision).dequantize())


# What IEEE 754 defines, what moves or compares numbers, and integer operations: not one whose result a device may
# choose, such as a sum of torch's, a quotient with a Python number, or a fused product and sum.
EXACT_OPERATIONS = {
    *("_to_copy", "_unsafe_view", "alias", "arange", "cat", "clone", "constant_pad_nd", "copy_", "detach", "empty"),
    *("full_like", "permute", "select", "slice", "unsqueeze", "view", "zeros_like", "_local_scalar_dense"),
    *("abs", "all", "amax", "amin", "aminmax", "clamp", "clamp_", "max", "maximum", "neg", "where"),
    *("eq", "gt", "le", "lt", "ne", "masked_fill", "masked_fill_", "nan_to_num_"),
    *("__lshift__", "__rshift__", "bitwise_and", "bitwise_not", "bitwise_or"),
    *("add", "add_", "mul", "mul_", "reciprocal", "round_", "rsub", "sub", "sub_"),
}


class Operations(TorchDispatchMode):
    """Collects what is called of torch that is not in EXACT_OPERATIONS."""

    def __init__(self) -> None:
        super().__init__()
        self.others: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        exact = name in EXACT_OPERATIONS
        if name == "div":  # of two tensors as large
            exact = all(isinstance(x, torch.Tensor) and x.dim() > 0 for x in args[:2])
        elif name == "sum":  # of counts
            exact = not args[0].is_floating_point()
        elif name in ("pow", "pow_"):  # which is a product then
            exact = args[1] == 2
        if not exact:
            self.others.add(func.__name__)
        return func(*args, **(kwargs or {}))


@precisions
@pytest.mark.parametrize("k", [128, 300])
def test_every_operation_has_the_same_bits_on_every_device(precision: Precision, k: int) -> None:
    weight = torch.randn(5, k)
    with Operations() as operations:
        quantize(weight, precision)
    assert not operations.others


@pytest.mark.gpu
@precisions
@scale_dtypes
def test_a_gpu_quantizes_to_the_bits_of_a_cpu(precision: Precision, scale_dtype: torch.dtype) -> None:
    for dtype, k in ((torch.float32, 300), (torch.bfloat16, 1024), (torch.float16, 33)):
        weight = (torch.randn(500, k) * torch.logspace(-12, 3, 500)[:, None]).to(dtype)
        weight[:20] = weight[:20].float().pow(3).to(dtype)
        weight[7] = 0
        there = quantize(weight.cuda(), precision, scale_dtype=scale_dtype)
        here = quantize(weight, precision, scale_dtype=scale_dtype)
        assert there.qweight.is_cuda
        assert torch.equal(there.qweight.cpu(), here.qweight)
        assert torch.equal(there.scales.cpu(), here.scales)
        assert here.zeros is None or torch.equal(there.zeros.cpu(), here.zeros)
        assert torch.equal(there.dequantize().cpu(), here.dequantize())


@precisions
def test_the_size_of_portions_changes_no_bit(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 300)
    whole = quantize(weight, precision)
    monkeypatch.setattr("llmpq.quant.tensor.CHUNK", 2000)
    parts = quantize(weight, precision)
    assert torch.equal(whole.qweight, parts.qweight) and torch.equal(whole.scales, parts.scales)
    assert whole.zeros is None or torch.equal(whole.zeros, parts.zeros)


@given(
    st.sampled_from(PACKED),
    st.integers(1, 70).flatmap(
        lambda k: st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=k, max_size=k), min_size=1, max_size=3)
    ),
)
def test_no_weights_are_worse_off_than_with_plain_rounding(precision: Precision, rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    found = quantize(weight, precision).dequantize()
    plain = plain_round_to_nearest(weight, precision, torch.float16)
    found_error, plain_error = (squared_errors(weight, w, precision) for w in (found, plain))
    energy = squared_errors(weight, torch.zeros_like(weight), precision)
    assert found.isfinite().all()
    assert (found_error <= plain_error * (1 + 1e-4) + energy * 1e-9).all()


@precisions
def test_nbytes_equals_the_precision_s_count(precision: Precision) -> None:
    assert quantize(torch.randn(5, 333), precision).nbytes == precision.weight_bytes(5, 333)


def test_group_sizes_of_the_specification_are_all_accepted() -> None:
    for group in GROUP_SIZES:
        assert quantize(torch.randn(2, 600), Precision(4, group)).scales.shape == (2, -(-600 // group))


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.randn(4), {}, r"weight is .* expected floating-point \[n, k\]"),
        (torch.ones(4, 4, dtype=torch.int32), {}, "weight is torch.int32"),
        (torch.ones(4, 0), {}, "weight is"),
        (torch.full((2, 8), float("nan")), {}, "not finite"),
        (torch.tensor([[1.0, float("inf")]]), {}, "not finite"),
        (torch.ones(4, 4), {"precision": W16}, "w16, which is not quantized"),
        (torch.ones(4, 4), {"precision": Precision(4, 32, quantizer="gguf")}, "cannot be quantized to w4-g32-sym-gguf"),
        (torch.ones(4, 4), {"scale_dtype": torch.float32}, "scale_dtype is torch.float32"),
    ],
)
def test_quantize_refuses(weight: torch.Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight, **{"precision": Precision(4, 32), **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(2, 7, dtype=torch.int32)}, r"qweight is torch.int32 \[2, 7\], expected .* \[2, 8\]"),
        ({"qweight": torch.zeros(2, 8)}, "qweight is torch.float32"),
        ({"scales": torch.zeros(2, 2)}, "scales is torch.float32"),
        ({"scales": torch.zeros(2, 1, dtype=torch.float16)}, r"scales is .* expected .* \[2, 2\]"),
        ({"zeros": None}, "zeros is missing"),
        ({"zeros": torch.zeros(2, 2, dtype=torch.int8)}, "zeros is torch.int8"),
        ({"precision": Precision(4, 32, "offset")}, "zeros is torch.uint8 .* expected torch.float16"),
        ({"precision": Precision(4, 32)}, "zeros is given, but w4-g32-sym-rtn is symmetric"),
        ({"precision": W16}, "w16, which is a plain tensor"),
        ({"scales": torch.zeros(2, 2, dtype=torch.float16, device="meta")}, "scales is on meta"),
    ],
)
def test_quant_tensor_names_the_field_that_is_wrong(change: dict[str, object], message: str) -> None:
    good = quantize(torch.randn(2, 40), Precision(4, 32, zero="asym"))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change)  # type: ignore[arg-type]


def test_rows_refuses_rows_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="rows 1 to 3 are not rows of a weight with n = 2"):
        quantize(torch.randn(2, 40), Precision(4, 32)).rows(1, 3)
