"""The Triton kernel in the interpreter, beyond what the grid of test_gemm.py runs on every backend."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from reference import assert_close_to_native, dense, random_weight

from llmpq.kernels import PreparedWeight, available_backends, gemm, prepare
from llmpq.kernels.triton_gemm import config, is_available
from llmpq.quant import QuantTensor, pack
from llmpq.quant.packing import PACKED_BITS
from llmpq.spec import BLOCK, GROUP_SIZES, Precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton() -> None:
    if (reason := available_backends()["triton"]) is not None:
        pytest.skip(reason)


def prepared(weight: QuantTensor | torch.Tensor) -> PreparedWeight:
    return prepare(weight, DEVICE, backend="triton")


@pytest.mark.parametrize("group_size", [*GROUP_SIZES, None])
def test_tiles_are_whole_blocks_and_never_span_two_groups(group_size: int | None) -> None:
    block_k = config(Precision(4, group_size)).block_k
    assert block_k % BLOCK == 0
    assert group_size is None or group_size % block_k == 0


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_code_is_read_at_every_position_of_a_block(triton: None, bits: int) -> None:
    values = 2**bits
    codes = ((torch.arange(values)[:, None] + torch.arange(BLOCK)) % values).to(torch.uint8)
    zeros = torch.randint(values, (values, 1), dtype=torch.uint8)
    scales = torch.ones(values, 1, dtype=torch.float16)
    weight = QuantTensor(pack(codes, bits), scales, zeros, Precision(bits, None, symmetric=False), (values, BLOCK))
    y = gemm(torch.eye(BLOCK, dtype=torch.float16, device=DEVICE), prepared(weight))
    assert torch.equal(y.cpu().T, codes.half() - zeros.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_product_of_several_tiles_in_every_direction_matches_float64(
    triton: None, bits: int, dtype: torch.dtype
) -> None:
    tile = config(Precision(bits, 128, symmetric=False))
    m, n, k = 2 * tile.block_m + 1, tile.block_n + 6, 2 * tile.block_k + 44
    weight, x, bias = random_weight(n, k, Precision(bits, 128, symmetric=False)), torch.randn(m, k), torch.randn(n)
    x = x.to(dtype)
    y = gemm(x.to(DEVICE), prepared(weight), bias=bias.to(DEVICE))
    assert_close_to_native(y, x, dense(weight), bias)


def test_backend_says_so_when_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = is_available()
    assert reason is not None
    assert "triton is not installed" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_backend_needs_the_interpreter_where_there_is_no_gpu(triton: None) -> None:
    program = "from llmpq.kernels import available_backends; print(available_backends()['triton'])"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    assert "no CUDA device" in result.stdout
