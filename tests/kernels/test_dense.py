"""Products by torch's own multiplication, of plain weights and of weights that are dequantized chunk by chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmpq.kernels import PreparedWeight
from llmpq.kernels.backends import dense as module
from llmpq.kernels.backends import gpu_layout
from llmpq.kernels.backends.dense import chunk_rows, multiply_dequantized, multiply_plain
from llmpq.quant import QuantTensor
from llmpq.spec import Precision
from tests.support.reference import assert_close_to_native, dense, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = (Precision(3, 128), Precision(4, 64, "asym"), Precision(8, None))


def in_panels(weight: QuantTensor) -> PreparedWeight:
    """As the GPU backends hold it."""
    (n, k), device = weight.shape, torch.device("cpu")
    data = gpu_layout.allocate(n, k, weight.precision, weight.scales.dtype, device)
    gpu_layout.fill(data, 0, weight, n=n, k=k, precision=weight.precision)
    return PreparedWeight("triton", n, k, weight.precision, weight.scales.dtype, device, data)


def dequantize(w: PreparedWeight, panel_start: int, out: torch.Tensor) -> None:
    """What a backend's own kernel does."""
    start = panel_start * gpu_layout.PANEL
    out.copy_(gpu_layout.rows(torch.arange(start, start + len(out)), w))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of 128 rows at once."""
    monkeypatch.setattr(module, "SCRATCH_BYTES", 1)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 33), (7, 128, 64), (40, 300, 129), (3, 257, 200)])
def test_chunks_of_dequantized_rows_give_the_product(
    small_chunks: None, precision: Precision, dtype: torch.dtype, bias: bool, m: int, n: int, k: int
) -> None:
    weight = random_weight(n, k, precision)
    assert isinstance(weight, QuantTensor)
    x, offset = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if bias else None
    out = torch.full((m, n), float("nan"), dtype=dtype)
    multiply_dequantized(x, in_panels(weight), offset, out, dequantize)
    assert_close_to_native(out, x, dense(weight), offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 6])
def test_strided_x_and_out_are_read_and_written_where_they_lie(small_chunks: None, dtype: torch.dtype, m: int) -> None:
    n, k = 200, 96
    weight = random_weight(n, k, PRECISIONS[1])
    assert isinstance(weight, QuantTensor)
    # Large, but finite: torch's own product may read beyond a row, and multiply what is there by zeros.
    around = torch.full((m, k + 20), 1e4, dtype=dtype)
    x, bias = around[:, 7 : 7 + k], torch.randn(n).to(dtype)
    x.copy_(torch.randn(m, k))
    guarded = torch.full((m + 2, n + 30), float("nan"), dtype=dtype)
    out = guarded[1:-1, 11 : 11 + n]
    multiply_dequantized(x, in_panels(weight), bias, out, dequantize)
    assert_close_to_native(out, x, dense(weight), bias)
    out.zero_()
    assert int((~guarded.isnan()).sum()) == m * n


def test_every_row_is_dequantized_once_into_one_scratch(small_chunks: None) -> None:
    n, k, seen, addresses = 300, 64, [], set()
    weight = random_weight(n, k, PRECISIONS[0])
    assert isinstance(weight, QuantTensor)

    def watched(w: PreparedWeight, panel_start: int, out: torch.Tensor) -> None:
        assert out.is_contiguous() and out.shape[1] == k
        seen.extend(range(panel_start * gpu_layout.PANEL, panel_start * gpu_layout.PANEL + len(out)))
        addresses.add(out.data_ptr())
        dequantize(w, panel_start, out)

    multiply_dequantized(torch.randn(2, k), in_panels(weight), None, torch.empty(2, n), watched)
    assert seen == list(range(n))
    assert len(addresses) == 1


@given(st.integers(1, 2**16), st.sampled_from(DTYPES))
def test_a_chunk_is_of_whole_panels_and_fits_the_scratch(k: int, dtype: torch.dtype) -> None:
    rows, row_bytes = chunk_rows(k, dtype), k * dtype.itemsize
    assert rows > 0 and rows % gpu_layout.PANEL == 0
    assert rows * row_bytes <= module.SCRATCH_BYTES
    assert (rows + 128) * row_bytes > module.SCRATCH_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_plain_weights_are_multiplied_in_x_s_dtype(dtype: torch.dtype, stored: torch.dtype, bias: bool) -> None:
    x, weight = torch.randn(5, 70).to(dtype), torch.randn(33, 70).to(stored)
    offset, out = torch.randn(33).to(dtype) if bias else None, torch.empty(5, 33, dtype=dtype)
    multiply_plain(x, weight, offset, out)
    assert_close_to_native(out, x, weight.float(), offset)
