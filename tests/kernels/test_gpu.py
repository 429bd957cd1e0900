"""What only a GPU shows: graphs, streams, devices, both routes at sizes of models, and that runs repeat bit by bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmpq.kernels import PreparedWeight, gemm, gemm_path, prepare
from llmpq.kernels.backends import dense as dense_module
from llmpq.kernels.backends.gpu_layout import PANEL
from llmpq.measure.gemm_paths import measure_routes
from llmpq.models.linear import QuantLinear
from llmpq.quant import QuantTensor
from llmpq.spec import Precision
from tests.support.reference import assert_close_to_native, dense, finite, random_weight, relative_error
from tests.support.specs import tiny_model
from tests.support.target import require_backend

pytestmark = pytest.mark.gpu

PRECISIONS = (Precision(3, 128), Precision(4, 128), Precision(4, 32, "asym"), Precision(8, None, "asym"))
precisions = pytest.mark.parametrize("precision", PRECISIONS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
GUARD = 4096  # bytes


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Both tiers; one that cannot run here is skipped with the reason."""
    name: str = request.param
    require_backend(name)
    return name


@pytest.fixture(params=["fused", "dequantized"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both routes, each forced at every m."""
    monkeypatch.setattr(gemm_path, "is_fused", lambda *_, **__: request.param == "fused")
    name: str = request.param
    return name


def weight_of(precision: Precision, n: int, k: int) -> QuantTensor:
    weight = random_weight(n, k, precision)
    assert isinstance(weight, QuantTensor)
    return weight


@precisions
@dtypes
@pytest.mark.parametrize("m", [1, 16, 64])
def test_a_captured_product_gives_the_bits_of_an_eager_one_at_every_replay(
    backend: str, route: str, precision: Precision, dtype: torch.dtype, m: int
) -> None:
    n, k = 1000, 2048
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    x, out = torch.randn(m, k, device="cuda", dtype=dtype), torch.empty(m, n, device="cuda", dtype=dtype)
    gemm(x, w, out=out)  # compiles what there is to compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm(x, w, out=out)
    results = []
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        results.append(out.clone())
        assert torch.equal(results[-1], gemm(x, w))
    assert not torch.equal(*results)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.inference_mode()
def test_a_compiled_linear_gives_the_bits_of_an_eager_one(backend: str, route: str, mode: str) -> None:
    n, k = 1000, 2048
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    linear = QuantLinear(prepare(weight_of(Precision(4, 128), n, k), "cuda", backend=backend), bias)
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, mode=mode)
    for m in (1, 16, 64):
        for _ in range(4):  # the first ones warm up and capture
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), linear(x))
    torch.compiler.reset()


@precisions
@dtypes
def test_two_runs_give_the_same_bits(backend: str, route: str, precision: Precision, dtype: torch.dtype) -> None:
    n, k = 200, 20000  # several chunks for each block of any GPU there is
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    for m in (1, 2, 3, 5, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 300, 1024):
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        first = gemm(x, w)
        assert first.isfinite().all()
        for _ in range(3):
            torch.randn(2**24, device="cuda")  # what scratch may be made of next holds something else
            assert torch.equal(gemm(x, w), first), f"m = {m}"


@precisions
@dtypes
def test_a_row_of_the_fused_kernel_has_the_same_bits_at_every_m(
    backend: str, precision: Precision, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "1")
    n, k, m = 200, 20000, 1100  # several chunks for each block of any GPU there is, and many parts of a tile
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    whole = gemm(x, w)
    for start, stop in ((0, 1), (7, 9), (3, 11), (8, 17), (40, 56), (30, 63), (64, 128), (5, 70), (99, 227), (1, 1025)):
        assert torch.equal(gemm(x[start:stop], w), whole[start:stop]), f"rows {start} to {stop}"


@precisions
@dtypes
def test_a_residual_is_added_to_what_was_rounded(
    backend: str, route: str, precision: Precision, dtype: torch.dtype
) -> None:
    n, k = 1000, 2048
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    bias, rows = (torch.randn(size, device="cuda", dtype=dtype) for size in ((n,), (70, n + 3)))
    for m in (1, 8, 17, 70):
        x, residual = torch.randn(m, k, device="cuda", dtype=dtype), rows[70 - m :, 1 : 1 + n]
        for added in (None, bias):
            found = gemm(x, w, bias=added, residual=residual)
            assert torch.equal(found, gemm(x, w, bias=added) + residual), f"m = {m}"


@precisions
@pytest.mark.parametrize("m", [1, 16, 70])
def test_products_that_need_one_another_give_the_bits_of_ones_made_one_by_one(
    backend: str, route: str, precision: Precision, m: int
) -> None:
    """Where a kernel may begin before the one before it has ended, it must not read or overwrite too early."""
    n, count = 2048, 12
    weights = [prepare(weight_of(precision, n, n), "cuda", backend=backend) for _ in range(count)]
    start = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    buffers = [torch.empty_like(start) for _ in range(3)]

    def products(after: Callable[[], None]) -> torch.Tensor:
        """Each adds to the one before the last, in the buffer that nobody reads any more."""
        buffers[0].copy_(start)
        buffers[1].copy_(start)
        for i, w in enumerate((*weights, *weights)):
            x, residual, out = (buffers[(i + place) % 3] for place in (1, 0, 2))
            gemm(x, w, residual=residual, out=out)
            out.div_(out.norm() / n**0.5) if i % 5 == 4 else None  # sometimes a kernel of torch's is between
            after()
        return out

    expected = products(torch.cuda.synchronize).clone()
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(products(lambda: None), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(lambda: None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, expected)


@precisions
def test_a_product_waits_for_what_its_stream_did_before(backend: str, route: str, precision: Precision) -> None:
    n, k, m = 1000, 2048, 64
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    later = torch.randn(m, k, device="cuda", dtype=torch.float16)
    expected = gemm(later, w)
    x, large = torch.full_like(later, float("nan")), torch.randn(8192, 8192, device="cuda")
    product, side = torch.empty_like(large), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(8):
            torch.mm(large, large, out=product)
        x.copy_(later)
        y = gemm(x, w)
    side.synchronize()
    assert torch.equal(y, expected)


@precisions
def test_a_product_runs_on_a_device_that_is_not_the_current_one(backend: str, route: str, precision: Precision) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    weight = weight_of(precision, 300, 500)
    x = torch.randn(20, 500).half()
    with torch.cuda.device(0):
        y = gemm(x.to("cuda:1"), prepare(weight, "cuda:1", backend=backend))
        assert torch.cuda.current_device() == 0
    assert y.device == torch.device("cuda", 1)
    assert_close_to_native(y, x, dense(weight))


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Callable[[], bool]]:
    """A tensor in GPU memory of which every byte is 255, NaN as a float, and whether those around it still are."""
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    whole = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8, device="cuda")
    inner = whole[GUARD : GUARD + size].view(dtype).view(shape)
    return inner, lambda: bool((whole[:GUARD] == 255).all() and (whole[GUARD + size :] == 255).all())


@pytest.fixture
def guarded_scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], bool]]]:
    """Whatever a product makes by torch.empty is guarded; the checks of those guards."""
    checks: list[Callable[[], bool]] = []
    real = torch.empty

    def empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return real(*shape, dtype=dtype, device=device, **options)
        tensor, check = guarded(tuple(real(*shape, device="meta").shape), dtype or torch.float32)
        checks.append(check)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    yield checks


@precisions
@pytest.mark.parametrize("m", [1, 16, 100])
@pytest.mark.parametrize(("n", "k"), [(1, 4096), (1000, 1000), (200, 8192)])
def test_a_product_writes_out_and_its_scratch_and_nothing_around_them(
    backend: str, route: str, precision: Precision, m: int, n: int, k: int, request: pytest.FixtureRequest
) -> None:
    w = prepare(weight_of(precision, n, k), "cuda", backend=backend)
    x, x_is_intact = guarded((m, k), torch.float16)
    x.copy_(torch.randn(m, k))
    expected = gemm(x, w)
    checks = request.getfixturevalue("guarded_scratch")  # from here on
    out, out_is_intact = guarded((m, n), torch.float16)
    gemm(x, w, out=out)
    assert torch.equal(out, expected)  # so scratch full of NaN was not read before it was written
    assert x_is_intact() and out_is_intact()
    assert all(check() for check in checks)
    assert checks or (route == "fused" and backend == "triton")


@pytest.mark.parametrize("precision", [*PRECISIONS, Precision(3, None, "asym"), Precision(8, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(5, 33), (300, 1000)])
def test_dequantizing_rounds_every_weight_once(
    backend: str, precision: Precision, dtype: torch.dtype, scale_dtype: torch.dtype, n: int, k: int
) -> None:
    weight = random_weight(n, k, precision, scale_dtype)
    w = prepare(weight, "cuda", backend=backend)
    for panel_start, count in ((0, n), (0, min(n, 20)), ((n - 1) // PANEL, n - (n - 1) // PANEL * PANEL)):
        out, is_intact = guarded((count, k), dtype)
        w.module.dequantize(w, panel_start, out)
        start = panel_start * PANEL
        assert torch.equal(out.cpu(), dense(weight)[start : start + count].to(dtype))
        assert is_intact()


@precisions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_both_gemm_paths_match_float64_for_ragged_sizes_in_several_chunks(
    backend: str, route: str, precision: Precision, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_module, "SCRATCH_BYTES", 1)
    m, n, k = 70, 301, 515
    weight, x = weight_of(precision, n, k), torch.randn(m, k).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    w = prepare(weight, "cuda", backend=backend)
    y = gemm(x.cuda(), w, bias=None if offset is None else offset.cuda())
    assert_close_to_native(y, x, dense(weight), offset)


@pytest.mark.parametrize("precision", [*PRECISIONS, Precision(4, 64, "offset"), Precision(3, 128, "offset")], ids=str)
@dtypes
@pytest.mark.parametrize(("n", "k"), [(1, 33), (255, 128), (301, 515), (1000, 4224)])
def test_fused_kernels_for_many_rows_match_float64(
    backend: str, precision: Precision, dtype: torch.dtype, n: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes that fill products of 32, 64 and 128 rows of x, or just not, with one block for a tile or many."""
    monkeypatch.setattr(gemm_path, "is_fused", lambda *_, **__: True)
    weight, x = weight_of(precision, n, k), torch.randn(300, k).to(dtype)
    w, bias = prepare(weight, "cuda", backend=backend), torch.randn(n).to(dtype)
    for m in (17, 32, 33, 64, 65, 128, 129, 300):
        out, is_intact = guarded((m, n), dtype)
        gemm(x[:m].cuda(), w, bias=bias.cuda(), out=out)
        assert_close_to_native(out.cpu(), x[:m], dense(weight), bias)
        assert is_intact()


@functools.cache
def large_weight(bits: int) -> tuple[QuantTensor, torch.Tensor]:
    """A weight of 4096 x 4096 in groups of 128, and the same in float64 on the GPU."""
    weight = weight_of(Precision(bits, 128), 4096, 4096)
    return weight, dense(weight).cuda().double()


@functools.cache
def prepared_large_weight(bits: int, backend: str) -> PreparedWeight:
    return prepare(large_weight(bits)[0], "cuda", backend=backend)


@pytest.mark.parametrize("bits", [3, 4, 8])
@dtypes
@pytest.mark.parametrize("m", [1, 16, 64, 1024])
def test_the_error_is_at_most_that_of_cublas(backend: str, route: str, bits: int, dtype: torch.dtype, m: int) -> None:
    """Of the fused route: that of the plain product of 16-bit weights, against float64 on just these.

    The dequantized route rounds the weights to 16 bits, so there cuBLAS is given them rounded, and both are compared
    with float64 on the exact ones.
    """
    _, exact = large_weight(bits)
    w = prepared_large_weight(bits, backend)
    x = torch.randn(m, 4096, device="cuda", dtype=dtype)
    rounded = exact.to(dtype)
    plain, truth = F.linear(x, rounded), exact if route == "dequantized" else rounded.double()
    limit = 1.1 * relative_error(finite(plain), F.linear(x.double(), truth))
    error = relative_error(gemm(x, w), F.linear(x.double(), exact))
    assert error <= limit, f"relative error is {error:.3g}, the limit {limit:.3g}"


def test_products_take_the_measured_gemm_paths() -> None:
    spec, device = tiny_model(), torch.device("cuda", torch.cuda.current_device())
    measure_routes(spec, (Precision(4, 32), Precision(16)), device)
    table = gemm_path.find_table(device)
    assert table is not None
    assert {(row.bits, row.group_size, row.n, row.k) for row in table.rows} == {
        (4, 32, s.n, s.k) for s in spec.linears("layer.0").values()
    }
    for row in table.rows:
        for m in (16, 256, 4096):
            fused = row.dequantize_min_rows is None or m < row.dequantize_min_rows
            precision = Precision(row.bits, 32)
            assert gemm_path.is_fused(device, row.backend, precision, m, row.n, row.k, torch.float16) == fused
    measure_routes(spec, (Precision(4, 32),), device)  # all of it is known
    assert gemm_path.find_table(device) == table
