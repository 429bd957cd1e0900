"""The CUDA backend without a GPU: dequantizers compiled for the host, kernels emulated, the binary inspected.

The emulation (cuda_emulation.cpp) runs the kernels' own source and launches. It cannot show what only a device shows:
races, alignment faults, speed. The grid of test_gemm.py runs on a device where there is one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from grid import FACTORS, Case, covering_array
from reference import assert_close_to_native, dense, random_weight

import llmpq
from llmpq.kernels import PreparedWeight, cuda
from llmpq.kernels.cuda import ACTIVATION_DTYPES
from llmpq.quant import QuantTensor, pack
from llmpq.quant.packing import PACKED_BITS
from llmpq.spec import Precision

CSRC = Path(__file__).parent.parent / "csrc"
DEQUANTIZERS = """
#include "cuda/dequant.cuh"

template <int Bits>
void dequantize(const uint32_t* words, int zero, float (&values)[llmpq::kBlock]) {
  for (int octet = 0; octet < llmpq::kOctets; ++octet) {
    float eight[llmpq::kOctet];
    llmpq::dequantize_octet<Bits>(words, octet, llmpq::code_shift(zero), eight);
    for (int j = 0; j < llmpq::kOctet; ++j) values[octet * llmpq::kOctet + j] = eight[j];
  }
}

extern "C" void dequantize_blocks(int bits, const uint32_t* words, int blocks, int zero, float (*values)[32]) {
  for (int block = 0; block < blocks; ++block, words += bits, ++values) {
    if (bits == 3) dequantize<3>(words, zero, *values);
    if (bits == 4) dequantize<4>(words, zero, *values);
    if (bits == 8) dequantize<8>(words, zero, *values);
  }
}
"""


def _find(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"{tool} is not on PATH")
    return path


@pytest.fixture(scope="module")
def dequantizers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """csrc/cuda/dequant.cuh as plain C++."""
    folder = tmp_path_factory.mktemp("dequantizers")
    (folder / "dequantizers.cpp").write_text(DEQUANTIZERS)
    library = folder / "dequantizers.so"
    command = [_find(os.environ.get("CXX", "g++")), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC"]
    subprocess.run([*command, "-shared", f"-I{CSRC}", folder / "dequantizers.cpp", "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for the host. nvcc only finds CUDA's headers here, and the host compiler compiles."""
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = Path(__file__).parent / "cuda_emulation.cpp"
    command = [_find("nvcc"), "-std=c++17", "-O1", "-Xcompiler", "-fPIC,-Wall,-Wno-unknown-pragmas,-Wno-attributes"]
    subprocess.run([*command, "-cudart", "none", "-shared", f"-I{CSRC}", source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.gemm.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 6 + [ctypes.c_int] * 3
    return loaded


@pytest.fixture
def emulated(emulation: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the emulation in the place of llmpq._cuda, and the CPU in that of the device."""

    def gemm(*, device: int | None, stream: int, **arguments: int) -> None:
        order = ("x", "qweight", "scales", "zeros", "bias", "y", "m", "n", "k", "x_stride", "y_stride", "group_size")
        assert emulation.gemm(*(arguments.pop(name) for name in (*order, "bits", "x_dtype", "scale_dtype"))) == 0
        assert not arguments

    monkeypatch.setattr(llmpq, "_cuda", SimpleNamespace(gemm=gemm), raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


def multiply(
    x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    n, k = weight.shape
    precision, dtype, device = weight.precision, weight.scales.dtype, torch.device("cpu")
    data = cuda.allocate(n, k, precision, dtype, device)
    cuda.fill(data, 0, weight, n=n, k=k, precision=precision)
    out = torch.empty(len(x), n, dtype=x.dtype) if out is None else out
    cuda.gemm(x, PreparedWeight("cuda", n, k, precision, dtype, device, data), bias, out, "a16")
    return out


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_dequantizer_is_exact_for_every_code_position_and_zero(dequantizers: ctypes.CDLL, bits: int) -> None:
    values = 2**bits
    codes = ((torch.arange(values)[:, None] + torch.arange(32)) % values).to(torch.uint8)  # each at every position
    words = pack(codes, bits)
    found = torch.empty(values, 32)
    for zero in range(values):
        pointers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (words, found))
        dequantizers.dequantize_blocks(bits, next(pointers), values, zero, next(pointers))
        assert torch.equal(found, codes.float() - zero)


SMALL = {"m": (0, 1, 2, 3, 4, 5, 8, 9, 17), "n": (1, 4, 5, 16, 17, 33)}  # around the kernel's tiles
CASES = [Case(**row) for row in covering_array({**FACTORS, **SMALL})]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel_matches_float64_and_stays_inside_its_tensors(emulated: None, case: Case) -> None:
    weight = random_weight(case.n, case.k, case.precision, case.scale_dtype)
    assert isinstance(weight, QuantTensor)
    bias = torch.randn(case.n).to(case.dtype) if case.bias else None
    around_x = torch.full((case.m + 2, case.k + 3), math.nan, dtype=case.dtype)
    around_y = torch.full((case.m + 2, case.n + 3), math.nan, dtype=case.dtype)
    x, y = around_x[1:-1, 1:-2], around_y[1:-1, 1:-2]
    x.copy_(torch.randn(x.shape))

    multiply(x, weight, bias, y)

    assert_close_to_native(y.clone(), x, dense(weight), bias)
    y.fill_(math.nan)
    assert around_y.isnan().all()


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_emulated_kernel_reads_out_the_dequantized_weight(emulated: None, bits: int, dtype: torch.dtype) -> None:
    k = 100  # no multiple of 8, in rows that do start at multiples of 16 bytes
    weight = random_weight(21, k, Precision(bits, 32, symmetric=False))
    assert isinstance(weight, QuantTensor)
    x = torch.full((k, 104), math.nan, dtype=dtype)[:, :k]
    x.copy_(torch.eye(k))
    assert torch.equal(multiply(x, weight), weight.dequantize(dtype).T)


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_a_row_has_the_same_bits_whatever_m_and_its_place(emulated: None, bits: int, dtype: torch.dtype) -> None:
    weight = random_weight(19, 600, Precision(bits, 64))
    assert isinstance(weight, QuantTensor)
    x = torch.randn(17, 600).to(dtype)
    y = multiply(x, weight)
    for m in (1, 2, 3, 4, 7, 16):
        assert torch.equal(multiply(x[17 - m :], weight), y[17 - m :])


def test_extension_holds_code_for_turing_ampere_and_hopper() -> None:
    extension = importlib.util.find_spec("llmpq._cuda")
    if extension is None or extension.origin is None:
        pytest.skip("llmpq was built without CUDA")
    if "CUDAARCHS" in os.environ:
        pytest.skip("CUDAARCHS chose other architectures")
    listing = subprocess.run(
        [_find("cuobjdump"), "--list-elf", extension.origin], check=True, capture_output=True, text=True
    ).stdout
    for architecture in ("sm_75", "sm_80", "sm_90"):
        assert listing.count(f".{architecture}.") == 3, f"expected {architecture} code for 3, 4 and 8 bits: {listing}"
