"""Every backend's product against float64, and what must hold exactly. The grid is in tests/support/grid.py."""

from __future__ import annotations

import pytest
import torch

from llmpq.kernels import PreparedWeight, WeightBuilder, embedding, gemm, prepare
from llmpq.quant import QuantTensor, pack
from llmpq.spec import ACTIVATION_MODES, W16, ActivationMode, Precision
from tests.support.grid import CASES, PACKED, PRODUCTS, Case, full_grid, name
from tests.support.reference import assert_product, dense, linear, random_weight, random_zeros
from tests.support.target import Target

FULL_PRECISION: tuple[Precision, ActivationMode] = (W16, "a16")
EXACT = (Precision(3, 32), Precision(4, 64, "asym"), Precision(8, None), Precision(4, 32, "offset"))
ONE_TERM = (Precision(3, 128), Precision(4, 32, "asym"), Precision(8, None, "offset"))
TWO_TERMS = (Precision(3, None, "offset"), Precision(4, 64), Precision(8, 32, "asym"))
FEW: list[tuple[Precision, ActivationMode]] = [
    *((precision, "a16") for precision in EXACT),
    *((precision, "a8") for precision in ONE_TERM),
    *((precision, "a8x2") for precision in TWO_TERMS),
    FULL_PRECISION,
]
ALL = [*PRODUCTS, FULL_PRECISION]
products = pytest.mark.parametrize(("precision", "activations"), ALL, ids=map(name, ALL))
few_products = pytest.mark.parametrize(("precision", "activations"), FEW, ids=map(name, FEW))
precisions = pytest.mark.parametrize("precision", [*PACKED, W16], ids=str)


def prepared(weight: QuantTensor | torch.Tensor, target: Target) -> PreparedWeight:
    return prepare(weight, target.device, backend=target.backend)


def check_case(target: Target, case: Case) -> None:
    """One product of random operands, judged against float64."""
    x = torch.randn(case.m, case.k).to(case.dtype)
    weight = random_weight(case.n, case.k, case.precision, case.scale_dtype)
    bias = torch.randn(case.n) if case.bias else None
    y = gemm(
        x.to(target.device),
        prepared(weight, target),
        bias=None if bias is None else bias.to(target.device),
        activations=case.activations,
    )
    assert_product(y, x, weight, bias, case.activations)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gemm_matches_float64(target: Target, case: Case) -> None:
    if target.interpreted and case.m * case.n * case.k > 20_000:
        pytest.skip("too large for triton's interpreter")
    check_case(target, case)


@pytest.mark.full
@products
def test_gemm_matches_float64_on_the_whole_grid(
    target: Target, precision: Precision, activations: ActivationMode
) -> None:
    if target.interpreted:
        pytest.skip("too much for triton's interpreter")
    for case in full_grid(precision, activations):
        try:
            check_case(target, case)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from None


@few_products
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1536, 576), (19, 576, 1536), (1, 300, 8192)])
def test_gemm_matches_float64_at_the_sizes_of_models(
    target: Target, precision: Precision, activations: ActivationMode, m: int, n: int, k: int
) -> None:
    if target.interpreted:
        pytest.skip("too large for triton's interpreter")
    x, weight = torch.randn(m, k), random_weight(n, k, precision)
    y = gemm(x.to(target.device), prepared(weight, target), activations=activations)
    assert_product(y, x, weight, activations=activations)


@precisions
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [33, 96, 129])
def test_product_with_the_identity_reads_out_every_weight_exactly(
    target: Target, precision: Precision, scale_dtype: torch.dtype, k: int
) -> None:
    if target.interpreted and (k != 33 or scale_dtype != torch.float16):
        pytest.skip("too large for triton's interpreter")
    weight = random_weight(37, k, precision, scale_dtype)
    y = gemm(torch.eye(k, device=target.device), prepared(weight, target))
    assert torch.equal(y.cpu().T, dense(weight))


@products
def test_a_row_has_the_same_bits_whatever_its_neighbours_and_their_number(
    target: Target, precision: Precision, activations: ActivationMode
) -> None:
    if target.backend in ("cuda", "triton") and not precision.quantized:
        pytest.skip("16-bit weights go to torch's own product there, which promises nothing")
    m, n, k = (18, 20, 70) if target.interpreted else (129, 75, 300)
    x = torch.randn(m, k, device=target.device)
    w = prepared(random_weight(n, k, precision), target)
    whole = gemm(x, w, activations=activations)
    for i in range(0, m, 9):
        assert torch.equal(gemm(x[i : i + 1], w, activations=activations), whole[i : i + 1]), f"row {i} alone"
    for start, stop in ((0, 2), (1, 4), (3, 8), (2, 18), (5, 22), (64, 97), (1, 129)):
        assert torch.equal(gemm(x[start:stop], w, activations=activations), whole[start:stop]), (
            f"rows {start} to {stop}"
        )
    others = torch.randn_like(x) * 1e3
    others[m // 2] = x[m // 2]
    assert torch.equal(gemm(others, w, activations=activations)[m // 2], whole[m // 2])


@few_products
@pytest.mark.parametrize("m", [1, 7, 64])
def test_bits_do_not_depend_on_the_number_of_threads(
    target: Target, precision: Precision, activations: ActivationMode, m: int, threads: None
) -> None:
    if target.device != "cpu" or target.interpreted:
        pytest.skip("runs on no CPU threads of its own")
    x, w = torch.randn(m, 576), prepared(random_weight(1900, 576, precision), target)  # threads pay from m = 1 on
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gemm(x, w, activations=activations))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@few_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 33, 40), (3, 70, 129), (9, 16, 32), (17, 31, 65)])
def test_out_is_written_whole_and_nothing_around_it(
    target: Target, precision: Precision, activations: ActivationMode, dtype: torch.dtype, m: int, n: int, k: int
) -> None:
    x = torch.randn(m, k, device=target.device).to(dtype)
    w = prepared(random_weight(n, k, precision), target)
    guarded = torch.full((m + 2, n + 40), float("nan"), dtype=dtype, device=target.device)
    out = guarded[1:-1, 17 : 17 + n]
    assert gemm(x, w, out=out, activations=activations) is out
    assert target.same(out, gemm(x, w, activations=activations), precision)
    out.zero_()
    written = ~guarded.isnan()
    assert int(written.sum()) == m * n
    assert bool(written[1:-1, 17 : 17 + n].all())


@few_products
def test_contiguous_out_is_written_whole_and_nothing_around_it(
    target: Target, precision: Precision, activations: ActivationMode
) -> None:
    m, n, k = 5, 33, 70
    x, w = torch.randn(m, k, device=target.device), prepared(random_weight(n, k, precision), target)
    guarded = torch.full((64 + m * n + 64,), float("nan"), device=target.device)
    out = guarded[64 : 64 + m * n].view(m, n)
    gemm(x, w, out=out, activations=activations)
    assert target.same(out, gemm(x, w, activations=activations), precision)
    assert guarded[:64].isnan().all() and guarded[-64:].isnan().all()


@few_products
def test_values_beside_x_are_not_read(target: Target, precision: Precision, activations: ActivationMode) -> None:
    k = 70
    x = torch.randn(6, k, device=target.device)
    w = prepared(random_weight(40, k, precision), target)
    poisoned = torch.full((6, k + 64), float("nan"), device=target.device)
    poisoned[:, 32 : 32 + k] = x
    assert target.same(
        gemm(poisoned[:, 32 : 32 + k], w, activations=activations), gemm(x, w, activations=activations), precision
    )


@few_products
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_and_batched_x_give_the_rows_of_plain_x(
    target: Target, precision: Precision, activations: ActivationMode, dtype: torch.dtype
) -> None:
    k, n = 65, 33
    w = prepared(random_weight(n, k, precision), target)
    x = torch.randn(2, 5, k, device=target.device).to(dtype)
    plain = gemm(x.view(10, k), w, activations=activations)
    assert target.same(gemm(x, w, activations=activations), plain.view(2, 5, n), precision)
    assert target.same(gemm(x[1, 2], w, activations=activations), plain[7], precision)
    assert target.same(gemm(x[:, ::2], w, activations=activations), plain.view(2, 5, n)[:, ::2], precision)
    columns = x.view(10, k).T.contiguous().T  # stride 1 along m
    assert target.same(gemm(columns, w, activations=activations), plain, precision)
    out = torch.empty(n, 10, device=target.device, dtype=dtype).T
    assert target.same(gemm(x.view(10, k), w, out=out, activations=activations), plain, precision)
    out = torch.empty(2, 9, n, device=target.device, dtype=dtype)[:, ::2]
    assert target.same(gemm(x, w, out=out, activations=activations), plain.view(2, 5, n), precision)


@few_products
def test_no_rows_give_no_rows(target: Target, precision: Precision, activations: ActivationMode) -> None:
    w = prepared(random_weight(40, 70, precision), target)
    for shape in ((0, 70), (3, 0, 70)):
        assert gemm(torch.empty(shape, device=target.device), w, activations=activations).shape == (*shape[:-1], 40)


@pytest.mark.parametrize("precision", [p for p in PACKED if p.group_size == 32], ids=str)
@pytest.mark.parametrize("activations", ACTIVATION_MODES)
def test_groups_of_zeros_and_saturated_codes(target: Target, precision: Precision, activations: ActivationMode) -> None:
    bits, n, k = precision.bits, 18, 96
    codes = torch.randint(2**bits, (n, k), dtype=torch.uint8)
    codes[0], codes[1] = 0, 2**bits - 1
    scales = torch.randn(n, 3, dtype=torch.float16)
    scales[2:4, 1] = 0
    scales[4] = 65504.0
    zeros = random_zeros(scales, precision)
    if zeros is not None:
        zeros[5], zeros[6] = 0, 2**bits - 1
    if zeros is not None and precision.zero == "offset":
        zeros[4] = -60000.0
    weight = QuantTensor(pack(codes, bits), scales, zeros, precision, (n, k))
    x = torch.randn(3, k)
    y = gemm(x.to(target.device), prepared(weight, target), activations=activations)
    assert_product(y, x, weight, activations=activations)


@few_products
def test_rows_of_any_size_are_as_exact(target: Target, precision: Precision, activations: ActivationMode) -> None:
    m, n, k = 7, 40, 200
    x = torch.randn(m, k) * torch.logspace(-30, 30, m)[:, None]
    weight, bias = random_weight(n, k, precision), torch.zeros(n)
    y = gemm(x.to(target.device), prepared(weight, target), bias=bias.to(target.device), activations=activations).cpu()
    for i in range(m):
        assert_product(y[i : i + 1], x[i : i + 1], weight, bias, activations)


@few_products
def test_rows_of_zeros_give_the_bias(target: Target, precision: Precision, activations: ActivationMode) -> None:
    x, bias = torch.zeros(3, 70, device=target.device), torch.randn(40, device=target.device)
    x[1, 32:64] = torch.randn(32)  # between two groups of zeros
    w = prepared(random_weight(40, 70, precision), target)
    y = gemm(x, w, bias=bias, activations=activations)
    assert torch.equal(y[0], bias) and torch.equal(y[2], bias)
    assert y[1].isfinite().all() and not torch.equal(y[1], bias)


@few_products
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_spoils_its_own_row_alone(
    target: Target, precision: Precision, activations: ActivationMode, value: float
) -> None:
    m, n, k = 6, 40, 300
    x, w = torch.randn(m, k), prepared(random_weight(n, k, precision), target)
    clean = gemm(x.to(target.device), w, activations=activations)
    for row, column in ((0, 0), (3, 129), (5, 299)):
        spoiled = x.clone()
        spoiled[row, column] = value
        y = gemm(spoiled.to(target.device), w, activations=activations)
        finite = y[row].isfinite() if activations == "a16" else ~y[row].isnan()
        assert not finite.any()
        others = [i for i in range(m) if i != row]
        assert target.same(y[others], clean[others], precision)


@few_products
def test_sums_beyond_float16_s_range_do_not_overflow(
    target: Target, precision: Precision, activations: ActivationMode
) -> None:
    k = 256
    weight = random_weight(20, k, precision)
    x = torch.full((2, k), 30_000.0)
    x[:, 1::2] = -30_000.0  # partial sums pass 65504, the results are of any size
    y = gemm(x.half().to(target.device), prepared(weight, target), activations=activations).cpu()
    exact = linear(x, dense(weight), None, torch.float64)
    representable = exact.abs() < 60_000
    assert torch.isfinite(y[representable]).all()
    error = (y.double() - exact).abs()[representable]
    assert (error <= exact.abs()[representable] * 2.0**-10 + 4.0).all()


@few_products
@pytest.mark.parametrize("portion", [1, 7, 16, 40])
def test_a_weight_built_in_portions_is_the_same_weight(
    target: Target, precision: Precision, activations: ActivationMode, portion: int
) -> None:
    n, k = 53, 70
    weight, x = random_weight(n, k, precision), torch.randn(3, k, device=target.device)
    builder = WeightBuilder(n, k, precision, torch.float16, target.device, target.backend)
    for start in range(0, n, portion):
        stop = min(start + portion, n)
        builder.add(weight.rows(start, stop) if isinstance(weight, QuantTensor) else weight[start:stop])
    assert target.same(
        gemm(x, builder.finish(), activations=activations),
        gemm(x, prepared(weight, target), activations=activations),
        precision,
    )


@precisions
def test_embedding_gives_dequantized_rows_exactly(target: Target, precision: Precision) -> None:
    weight = random_weight(43, 100, precision)
    w, ids = prepared(weight, target), torch.tensor([42, 0, 7, 7, 16, 31])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = embedding(ids.to(target.device), w, dtype)
        assert rows.dtype == dtype
        assert torch.equal(rows.cpu(), dense(weight)[ids].to(dtype))
    assert embedding(ids[:0].to(target.device), w, torch.float32).shape == (0, 100)


@precisions
def test_prepared_weight_is_about_as_large_as_the_stored_one(target: Target, precision: Precision) -> None:
    n, k = 192, 576
    w = prepared(random_weight(n, k, precision), target)
    assert w.nbytes <= 1.1 * precision.weight_bytes(n, k)
    assert w.nbytes == sum(tensor.nbytes for tensor in w.data)


def test_plain_float32_weights_are_multiplied_by_the_reference() -> None:
    weight, x, bias = torch.randn(33, 40), torch.randn(5, 40), torch.randn(33)
    w = prepare(weight)
    assert w.backend == "reference"
    assert_product(gemm(x, w, bias=bias), x, weight, bias)
