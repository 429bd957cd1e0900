"""What is done to rows by themselves: norms, activations, scales, positions, the likeliest token, residuals of
products."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from llmpq import kernels
from llmpq.kernels import layer_norm, rms_norm
from llmpq.spec import W16, Precision
from tests.support.kv_caches import sequences
from tests.support.reference import clean, finite, layer_norm_float64, random_weight, rms_norm_float64

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp of results of size 1
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
FUNCTIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def swiglu_clamped(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.double().chunk(2, -1)
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_is_the_function_of_its_name(name: str, gated: bool) -> None:
    for n in (64, 77):  # the second is no multiple of a vector's width
        x = torch.linspace(-30, 30, 5 * n).view(5, n)
        x = torch.cat((x, torch.randn(5, n)), 1) if gated else x
        expected = FUNCTIONS[name](x[:, :n].double()) * (x[:, n:].double() if gated else 1)
        found = kernels.activate_(x.clone(), name, gated)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
        x[:, 3] = torch.nan
        assert kernels.activate_(x.clone(), name, gated)[:, 3].isnan().all()


@pytest.mark.usefixtures("operations")
def test_a_clamped_swiglu_clamps_gate_and_up() -> None:
    for n in (64, 77):
        x = torch.cat((torch.linspace(-30, 30, 5 * n).view(5, n), 5 * torch.randn(5, n)), 1)
        found = kernels.activate_(x.clone(), "swiglu_clamped", True)
        torch.testing.assert_close(found.double(), swiglu_clamped(x), atol=1e-6, rtol=1e-6)
        x[:, 3] = x[:, n + 5] = torch.nan
        assert kernels.activate_(x.clone(), "swiglu_clamped", True)[:, [3, 5]].isnan().all()
    with pytest.raises(ValueError, match="'swiglu_clamped', which is of a gate"):
        kernels.activate_(x, "swiglu_clamped", False)


@dtypes
def test_numbers_are_scaled_and_capped(operations: str, dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-90, 90, 300), torch.logspace(-6, 1, 54), torch.tensor([torch.inf, -torch.inf])))
    x = x.to(dtype).view(4, 89)
    for factor, cap in ((0.3, None), (-1.7, 30.0), (1.0, 50.0)):
        scaled = x.double() * factor
        exact = scaled if cap is None else cap * torch.tanh(scaled / cap)
        beside = torch.full((4, 200), 5.0, dtype=dtype)
        part = beside[:, 50:139].copy_(x)
        assert kernels.scale_(part, factor, cap) is part
        torch.testing.assert_close(part.double(), exact, atol=2.0**-25, rtol=2 * DTYPES[dtype])
        assert bool((beside[:, :50] == 5).all()) and bool((beside[:, 139:] == 5).all())
    x[2, 3] = torch.nan
    assert kernels.scale_(x.clone(), 1.0, 30.0).isnan().sum() == 1
    with pytest.raises(ValueError, match="cap is 0"):
        kernels.scale_(x, 1.0, 0.0)


@pytest.mark.usefixtures("operations", "threads")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_takes_rows_apart(name: str, gated: bool) -> None:
    """Bit for bit, whatever is computed with a row."""
    for n in (96, 1534):
        x = torch.randn(29, n)
        torch.set_num_threads(1)
        alone = torch.cat([kernels.activate_(x[i : i + 1].clone(), name, gated) for i in range(29)])
        for threads in (1, 7):
            torch.set_num_threads(threads)
            assert torch.equal(kernels.activate_(x.clone(), name, gated), alone)
            assert torch.equal(kernels.activate_(x[5:16].clone(), name, gated), alone[5:16])


def test_what_cannot_be_activated_is_an_error() -> None:
    with pytest.raises(ValueError, match="activation is 'swish', expected one of silu"):
        kernels.activate_(torch.zeros(1, 2), "swish", False)
    with pytest.raises(ValueError, match=r"x is torch.float32 \[1, 3\]"):
        kernels.activate_(torch.zeros(1, 3), "silu", True)


@pytest.mark.usefixtures("operations")
def test_learned_positions_are_added_where_tokens_stand() -> None:
    table, x = torch.randn(9, 5), torch.randn(6, 5)
    lens = [(0, 3, 3), (1, 1, 9), (2, 2, 5)]  # slot, new tokens, tokens
    of = sequences(*zip(*lens, strict=True))
    expected = x + table[[0, 1, 2, 8, 3, 4]]
    assert torch.equal(kernels.add_positions_(x, table, of), expected)
    with pytest.raises(ValueError, match="table has 8 positions, but context_lens says 9"):
        kernels.add_positions_(x, table[:8], of)


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("size", [1, 17, 1024, 5000, 131_073])
def test_argmax_is_the_first_of_the_largest(size: int) -> None:
    x = torch.randint(-40, 40, (12, size)).float()
    x[3] = -torch.inf
    x[4, size // 2] = torch.inf
    expected = [row.index(max(row)) for row in x.tolist()]
    assert kernels.argmax(x, torch.empty(12, dtype=torch.int64)).tolist() == expected


@pytest.mark.usefixtures("operations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", [Precision(4, 32), Precision(8, 64, "offset"), W16], ids=str)
def test_a_residual_is_added_after_the_bias(precision: Precision, dtype: torch.dtype, operations: str) -> None:
    device = torch.get_default_device()
    with torch.device("cpu"):
        w = kernels.prepare(random_weight(40, 96, precision), device, backend=operations)
    x, bias, residual = torch.randn(13, 96).to(dtype), torch.randn(40), torch.randn(13, 40).to(dtype)
    for rows in (1, 13):
        plain = kernels.gemm(x[:rows], w, bias=bias)
        found = kernels.gemm(x[:rows], w, bias=bias, residual=residual[:rows], out=torch.full_like(plain, torch.nan))
        assert torch.equal(found, plain + residual[:rows])
    with pytest.raises(ValueError, match="residual is"):
        kernels.gemm(x, w, residual=residual[:, 1:])


SIZES = [1, 8, 33, 576, 4096]


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_matches_float64(operations: str, dtype: torch.dtype, size: int, eps: float) -> None:
    x = (torch.randn(7, size) * torch.logspace(-3, 2, 7)[:, None]).to(dtype)
    weight = torch.randn(size)
    found, exact = rms_norm(x, weight, eps), rms_norm_float64(x, weight, eps)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 1.01 * DTYPES[dtype] * exact.abs() + 1e-7).all()


@dtypes
@pytest.mark.parametrize("size", [33, 128])
def test_heads_are_normed_where_they_lie(operations: str, dtype: torch.dtype, size: int) -> None:
    beside = torch.full((5, 7 * size), 3.0, dtype=dtype)
    heads = beside[:, size : 4 * size].view(5, 3, size)
    x, weight = (torch.randn(5, 3, size) * torch.logspace(-2, 2, 3)[:, None]).to(dtype), torch.randn(size)
    assert kernels.head_norm_(heads.copy_(x), weight, 1e-5) is heads
    exact = rms_norm_float64(x, weight, 1e-5)
    assert ((heads.double() - exact).abs() <= 1.01 * DTYPES[dtype] * exact.abs() + 1e-7).all()
    assert bool((beside[:, :size] == 3).all()) and bool((beside[:, 4 * size :] == 3).all())
    for bad in (x.transpose(0, 1), x[:, :, 1:], x[0]):
        with pytest.raises(ValueError, match=r"x is .* without gaps within a token"):
            kernels.head_norm_(bad, weight, 1e-5)


@dtypes
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_matches_float64(operations: str, dtype: torch.dtype, size: int, eps: float) -> None:
    x = (torch.randn(7, size) * torch.logspace(-3, 2, 7)[:, None] + 3).to(dtype)
    weight, bias = torch.randn(size), torch.randn(size)
    found, exact = layer_norm(x, weight, bias, eps), layer_norm_float64(x, weight, bias, eps)
    # The native error is part of the limit: x less its mean loses digits that float32 does not have.
    native = finite(F.layer_norm(clean(x.float()), (size,), weight, bias, eps)).double()
    assert found.dtype == dtype
    limit = 1.01 * DTYPES[dtype] * exact.abs() + 2 * (native - exact).abs().max() + 1e-6
    assert ((found.double() - exact).abs() <= limit).all()


@dtypes
@pytest.mark.parametrize("size", SIZES)
def test_a_normed_row_has_the_same_bits_whatever_its_neighbours_and_the_threads(
    operations: str, threads: None, dtype: torch.dtype, size: int
) -> None:
    rows = 14 if operations == "triton" else 130  # interpreted, each takes a program's time
    x = torch.randn(rows, size).to(dtype)
    weight, bias = torch.randn(size), torch.randn(size)
    for norm in (lambda x: rms_norm(x, weight, 1e-5), lambda x: layer_norm(x, weight, bias, 1e-5)):
        torch.set_num_threads(1)
        whole = norm(x)
        torch.set_num_threads(2)
        assert torch.equal(norm(x), whole)
        for start, stop in ((0, 1), (5, 6), (3, 10), (rows // 2, rows - 1), (rows - 1, rows)):
            assert torch.equal(norm(x[start:stop]), whole[start:stop])
        assert torch.equal(norm(x.view(2, -1, size)), whole.view(2, -1, size))
        assert torch.equal(norm(x[::2]), whole[::2])
        assert torch.equal(norm(x[7]), whole[7])


def test_norms_of_no_rows_are_empty(operations: str) -> None:
    x, weight = torch.empty(0, 8), torch.ones(8)
    assert rms_norm(x, weight, 1e-5).shape == layer_norm(x, weight, weight, 1e-5).shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(9), r"weight is .* \[9\] on cpu, expected floating-point \[8\] on cpu"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.int32), "weight is torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8, device="meta"), "weight is .* on meta"),
        (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(8), "x is torch.int64"),
        (torch.zeros(()), torch.zeros(8), "x is"),
    ],
)
def test_norms_refuse(x: torch.Tensor, weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, 1e-5)
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, torch.zeros(x.shape[-1:]), 1e-5)
