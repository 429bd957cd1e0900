"""The CUDA backend without a GPU: its own bindings, launches and kernels, compiled over an emulated machine.

The machine (tests/support/emulation) is written after the PTX ISA; what it cannot show is what only a device shows: its
compiler's faults, some races, speed. The grid of test_gemm.py runs on a device where there is one.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llmpq
from llmpq.kernels import PreparedWeight
from llmpq.kernels.backends import cuda, gpu_layout
from llmpq.kernels.backends.cuda import ACTIVATION_DTYPES
from llmpq.quant import QuantTensor, pack
from llmpq.quant.packing import PACKED_BITS
from llmpq.spec import GROUP_SIZES, Precision
from llmpq.spec.precision import ZeroKind
from tests.support.grid import FACTORS, Case, covering_array
from tests.support.reference import assert_close_to_native, dense, random_weight

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
HALVES = (torch.float16, torch.bfloat16)
# One multiprocessor, so that blocks have many chunks, and shared memory is used again and again.
HOPPER = {"capability": 90, "multiprocessors": 1, "shared_bytes": 227 * 1024}
TURING = {"capability": 75, "multiprocessors": 2, "shared_bytes": 64 * 1024}
ORDERS = [{"backwards": backwards, "hasty": hasty} for backwards in (False, True) for hasty in (False, True)]


def compiled(source: str, output: Path, *options: str) -> Path:
    """A source of the emulation as a program or library. nvcc finds CUDA's headers, and the host compiler compiles."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folders = [ROOT / "tests/support/emulation", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = "-fPIC,-Wall,-Wno-unknown-pragmas,-Wno-attributes"
    command = [nvcc, "-x", "c++", "-std=c++17", "-O1", "-Xcompiler", flags, "-cudart", "none", *options]
    command += [f"-I{folder}" for folder in folders]
    subprocess.run([*command, ROOT / "tests/support/emulation" / source, "-o", output], check=True)
    return output


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """llmpq._cuda for the emulated machine."""
    options = ["-shared", "-DLLMPQ_WGMMA"]  # as for a build that has code for sm_90a
    options += ["-Xlinker", "-Bsymbolic"]  # its own functions, though a CUDA build of torch has some of these names
    library = compiled("cuda_emulation.cpp", tmp_path_factory.mktemp("emulation") / "cuda_emulation.so", *options)
    spec = importlib.util.spec_from_file_location("cuda_emulation", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(machine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Puts the emulation in the place of llmpq._cuda, and the CPU in that of the device."""
    monkeypatch.setattr(llmpq, "_cuda", machine, raising=False)
    monkeypatch.setitem(sys.modules, "llmpq._cuda", machine)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    machine.emulate(**HOPPER, **ORDERS[0])
    machine.arrive_late([])
    return machine


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """A copy of a tensor amid memory that is not to be read, and the addresses where each part of that starts and ends.

    It is wide enough for whoever goes on to the next tile of any weight here."""
    width = 2**20
    whole = torch.full((2 * width + tensor.nbytes,), 255, dtype=torch.uint8)
    inner = whole[width : width + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    start, stop = inner.data_ptr(), inner.data_ptr() + inner.nbytes
    return inner, [(start - width, start), (stop, stop + width)]


def prepared(weight: QuantTensor | torch.Tensor) -> PreparedWeight:
    assert isinstance(weight, QuantTensor)
    n, k = weight.shape
    precision, dtype, device = weight.precision, weight.scales.dtype, torch.device("cpu")
    data, guards = zip(*map(guarded, cuda.allocate(n, k, precision, dtype, device)), strict=True)
    llmpq._cuda.forbid([guard for pair in guards for guard in pair])
    cuda.fill(data, 0, weight, n=n, k=k, precision=precision)
    w = PreparedWeight("cuda", n, k, precision, dtype, device, data)
    vars(w)["module"] = cuda  # there is no device to load it for
    return w


def multiply(
    x: torch.Tensor,
    w: PreparedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.full((len(x), w.n), math.nan, dtype=x.dtype) if out is None else out
    cuda.gemm(x, w, bias, out, "a16", residual)
    assert not w.data[-1].any(), "the counters are to be left at zero"
    return out


def test_the_machine_shows_what_is_wrong_with_a_product_of_a_warpgroup(tmp_path: Path) -> None:
    program = compiled("products.cpp", tmp_path / "products")
    caught = {
        "not shown": "a product of what was not shown to it",
        "no fence": "a batch of products was begun without a fence",
        "left factor overwritten": "a left factor was overwritten before its product was made",
        "sums overwritten": "sums were overwritten before their product was made",
        "no wait": "wrong",
        "steps swapped": "wrong",
    }
    for hasty in "01":
        assert subprocess.run([program, "none", hasty], check=True, capture_output=True, text=True).stdout == "right\n"
    for fault, message in caught.items():
        result = subprocess.run([program, fault, "0"], capture_output=True, text=True)
        assert message in result.stdout + result.stderr, fault


def test_the_machine_shows_what_is_wrong_with_matrices_that_a_warp_loads(tmp_path: Path) -> None:
    program = compiled("matrices.cpp", tmp_path / "matrices")
    caught = {
        "not aligned": "a row of a matrix is not aligned",
        "outside": "a matrix from outside shared memory",
        "rows swapped": "wrong",
        "a lane missing": "a warp waits for one of its threads",
    }
    for hasty in "01":
        assert subprocess.run([program, "none", hasty], check=True, capture_output=True, text=True).stdout == "right\n"
    for fault, message in caught.items():
        result = subprocess.run([program, fault, "0"], capture_output=True, text=True)
        assert message in result.stdout + result.stderr, fault


@pytest.mark.parametrize(("dtype", "keeps_base"), [(HALVES[0], False), (HALVES[1], False), (HALVES[1], True)], ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_dequantizers_are_exact_for_every_code_position_and_zero(
    emulated: ModuleType, bits: int, dtype: torch.dtype, keeps_base: bool
) -> None:
    values, k = 2**bits, 128
    n = max(values, 16)
    codes = ((torch.arange(n)[:, None] + torch.arange(k)) % values).to(torch.uint8)  # each at every position
    precision = Precision(bits, None)
    weight = QuantTensor(pack(codes, bits), torch.ones(n, 1, dtype=torch.float16), None, precision, (n, k))
    qweight, found = prepared(weight).data[0], torch.empty(n, k)
    for zero in range(values):
        bfloat16 = dtype == torch.bfloat16
        emulated.read_out(bits, bfloat16, keeps_base, qweight.data_ptr(), n, zero, found.data_ptr())
        assert torch.equal(found, codes.float() - zero), f"zero = {zero}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tiles=st.integers(1, 2**18), chunks=st.integers(1, 2**10), multiprocessors=st.integers(1, 300), data=st.data())
def test_chunks_are_dealt_out_evenly_and_found_again(
    emulated: ModuleType, tiles: int, chunks: int, multiprocessors: int, data: st.DataObject
) -> None:
    emulated.emulate(**HOPPER | {"multiprocessors": multiprocessors}, **ORDERS[0])
    count = tiles * chunks
    units = [*data.draw(st.lists(st.integers(0, count - 1), max_size=20)), 0, count - 1]
    begins, places = emulated.deal(128 * tiles, 128 * chunks, units)
    assert begins[0] == 0
    assert begins[-1] == count
    shares = [end - begin for begin, end in pairwise(begins)]
    assert 1 <= min(shares) <= max(shares) <= min(shares) + 1
    assert places == [(bisect_right(begins, unit) - 1, unit // chunks) for unit in units]


# Around the tiles of all kernels: 8 to 128 rows of x; 256, 128 and 16 columns of y; chunks of 128 columns of x.
SMALL = {"m": (0, 1, 2, 4, 5, 8, 9, 17, 33, 64, 65, 150), "n": (1, 5, 16, 33, 130, 300), "activations": ("a16",)}
SMALL |= {"group": (32, 64, 128, 256, None), "k": (1, 31, 33, 100, 129, 392, 576, 1100, 1500)}
CASES = [Case(**row) for row in covering_array({**FACTORS, **SMALL})]
# Only the tensor-core kernels have threads that wait for others, or for copies.
IN_BOTH_ORDERS = [
    (case, hasty, capability)
    for case in CASES
    for hasty in (False, True)
    for capability in (80, 90)  # which differ in the kernels for more than 16 rows, and for fewer of bfloat16
    if case.dtype in HALVES or (capability == 90 and not hasty)
    if case.m > 16 or case.dtype == torch.bfloat16 or capability == 90
]


@pytest.mark.parametrize(("case", "hasty", "capability"), IN_BOTH_ORDERS, ids=str)
def test_product_matches_float64_and_stays_inside_its_tensors(
    emulated: ModuleType, case: Case, hasty: bool, capability: int
) -> None:
    emulated.emulate(**HOPPER | {"capability": capability}, backwards=not hasty, hasty=hasty)
    weight = random_weight(case.n, case.k, case.precision, case.scale_dtype)
    bias = torch.randn(case.n).to(case.dtype) if case.bias else None
    around_x = torch.full((case.m + 2, case.k + 16), math.nan, dtype=case.dtype)
    around_y = torch.full((case.m + 2, case.n + 3), math.nan, dtype=case.dtype)
    x, y = around_x[1:-1, 8 : 8 + case.k], around_y[1:-1, 1:-2]
    x.copy_(torch.randn(x.shape))

    multiply(x, prepared(weight), bias, y)

    assert_close_to_native(y.clone(), x, dense(weight), bias)
    y.fill_(math.nan)
    assert around_y.isnan().all()


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("zero", ["asym", "offset"])
def test_product_with_the_identity_reads_out_every_weight_exactly(
    emulated: ModuleType, bits: int, zero: ZeroKind, group_size: int, dtype: torch.dtype
) -> None:
    k = 232  # no whole blocks, and not a whole chunk
    weight = random_weight(21, k, Precision(bits, group_size, zero))
    x = torch.full((k, 240), math.nan, dtype=dtype)[:, :k]
    x.copy_(torch.eye(k))
    assert torch.equal(multiply(x, prepared(weight)), dense(weight).to(dtype).T)


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_residual_is_added_to_what_was_rounded(emulated: ModuleType, with_bias: bool, dtype: torch.dtype) -> None:
    n, k = 150, 300
    w = prepared(random_weight(n, k, Precision(4, 64)))
    bias = torch.randn(n).to(dtype) if with_bias else None
    around = torch.full((72, n + 5), math.nan, dtype=dtype)
    around[1:71, 2 : 2 + n] = torch.randn(70, n)
    for m in (1, 3, 9, 33, 70):
        x, residual = torch.randn(m, k).to(dtype), around[71 - m : 71, 2 : 2 + n]
        assert torch.equal(multiply(x, w, bias, residual=residual), multiply(x, w, bias) + residual)


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize(("group_size", "zero"), [(64, "sym"), (128, "sym"), (32, "offset"), (128, "offset")])
def test_a_row_has_the_same_bits_whatever_m_and_its_place(
    emulated: ModuleType,
    bits: int,
    group_size: int,
    zero: ZeroKind,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "1")
    n, k = (40, 300) if dtype == torch.float32 else (150, 1100)
    w = prepared(random_weight(n, k, Precision(bits, group_size, zero)))
    x = torch.randn(67, k).to(dtype)
    y = multiply(x, w)
    for m in (1, 2, 5, 9, 17, 33, 64):
        assert torch.equal(multiply(x[67 - m :], w), y[67 - m :]), f"m = {m}"


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_few_rows_on_hopper_have_the_same_bits_whatever_m_by_a_kernel_that_takes_zeros_off_sums(
    emulated: ModuleType, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, x = prepared(random_weight(150, 1100, Precision(bits, 128, "asym"))), torch.randn(16, 1100).bfloat16()
    y = multiply(x, w)
    for m in (1, 8, 9):
        assert torch.equal(multiply(x[16 - m :], w), y[16 - m :]), f"m = {m}"
    x[3, 70] = math.inf  # of which sums less sums leave nothing, and products with codes less zeros something
    assert multiply(x, w)[3].isnan().all()
    monkeypatch.setenv("LLMPQ_BATCH_INVARIANT", "1")
    assert multiply(x, w)[3].isinf().any()


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("zero", ["asym", "offset"])
def test_a_base_that_is_taken_off_sums_leaves_no_larger_error_where_all_of_x_is_positive(
    emulated: ModuleType, bits: int, zero: ZeroKind
) -> None:
    weight = random_weight(60, 1100, Precision(bits, 128, zero))
    x = torch.rand(9, 1100).bfloat16()  # so that sums of codes with their base are as large as they can be
    assert_close_to_native(multiply(x, prepared(weight)), x, dense(weight))


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 33])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m", [11, 70])
def test_bits_do_not_depend_on_which_block_or_warp_comes_first(
    emulated: ModuleType, multiprocessors: int, dtype: torch.dtype, m: int
) -> None:
    """The work is dealt to at most four blocks a multiprocessor: from tiles for each of them to many for a tile."""
    w = prepared(random_weight(300, 2000, Precision(4, 128, zero="asym" if dtype == torch.float16 else "offset")))
    x, bias = torch.randn(m, 2000).to(dtype), torch.randn(300).to(dtype)
    results = []
    for order in ORDERS:
        emulated.emulate(**HOPPER | {"multiprocessors": multiprocessors}, **order)
        results.append(multiply(x, w, bias))
    assert all(torch.equal(result, results[0]) for result in results)
    assert_close_to_native(results[0], x, w_dense(w), bias)


def w_dense(w: PreparedWeight) -> torch.Tensor:
    return gpu_layout.rows(torch.arange(w.n), w).float()


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses where a contiguous tensor starts and ends."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 33])
def test_a_kernel_that_begins_early_waits_before_it_touches_what_others_write(
    emulated: ModuleType, multiprocessors: int, order: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k = 300, 1000  # one chunk for a block, or many
    emulated.emulate(**HOPPER | {"multiprocessors": multiprocessors}, **order)
    w = prepared(random_weight(n, k, Precision(4, 64, "asym")))
    bias, residual = torch.randn(n).half(), torch.randn(70, n).half()
    x, out = torch.randn(70, k).half(), torch.full((70, n), math.nan, dtype=torch.float16)
    written = [residual, x, out, bias, w.data[-1]]

    def empty(*shape: int, real: Callable[..., torch.Tensor] = torch.empty, **options: Any) -> torch.Tensor:
        workspace = real(*shape, **options)
        emulated.arrive_late([extent(tensor) for tensor in (*written, workspace)])
        return workspace

    expected = {m: multiply(x[:m], w, bias, residual=residual[:m]) for m in (9, 16, 70)}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        for m, y in expected.items():
            assert torch.equal(multiply(x[:m], w, bias, out[:m], residual[:m]), y)
            assert emulated.early()
    emulated.arrive_late([extent(x)], deaf=True)
    assert multiply(x, w).isnan().all(), "a kernel that did not wait would have been seen"


def test_the_first_product_of_a_weight_waits_for_who_wrote_it_and_so_does_each_before_hopper(
    emulated: ModuleType,
) -> None:
    weight, x = random_weight(20, 136, Precision(4, 64)), torch.randn(9, 136).half()
    for machine, expected in ((HOPPER, [False, True, True]), (HOPPER | {"capability": 89}, [False, False, False])):
        emulated.emulate(**machine, **ORDERS[0])
        w, found = prepared(weight), []
        for _ in expected:
            multiply(x, w)
            found.append(emulated.early())
        assert found == expected
        multiply(x[:8], w)
        assert not emulated.early()  # of few rows it does not pay


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_turing_takes_what_fits_its_shared_memory_and_has_no_bfloat16(
    emulated: ModuleType, bits: int, dtype: torch.dtype
) -> None:
    emulated.emulate(**TURING, **ORDERS[0])
    weight = random_weight(140, 300, Precision(bits, 128))
    x = torch.randn(70, 300).to(dtype)
    assert_close_to_native(multiply(x, prepared(weight)), x, dense(weight))


def test_x_that_is_not_aligned_gives_the_same_bits(emulated: ModuleType) -> None:
    w = prepared(random_weight(20, 136, Precision(4, 64)))
    x = torch.randn(3, 136, dtype=torch.float16)
    for start, width in ((1, 144), (8, 145), (3, 139)):
        around = torch.full((3, width + start), math.nan, dtype=torch.float16)
        around[:, start : start + 136] = x
        assert torch.equal(multiply(around[:, start : start + 136], w), multiply(x, w))
    odd = x[:1].as_strided((1, 136), (139, 1))  # one row, whose distance to the next says nothing
    assert torch.equal(multiply(odd, w), multiply(x[:1], w))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("zero", ["sym", "offset"])
def test_a_value_that_is_not_finite_spoils_its_own_row_alone(
    emulated: ModuleType, value: float, zero: ZeroKind
) -> None:
    w = prepared(random_weight(40, 300, Precision(3, 32, zero)))
    x = torch.randn(6, 300, dtype=torch.bfloat16)
    clean = multiply(x, w)
    x[3, 299] = value
    y = multiply(x, w)
    assert not y[3].isfinite().any()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("group_size", [*GROUP_SIZES, None])
def test_dequantized_rows_are_exact_before_they_are_rounded_once(
    emulated: ModuleType, bits: int, group_size: int | None, dtype: torch.dtype
) -> None:
    zeros: tuple[ZeroKind, ...] = ("sym" if bits == 4 else "asym", "offset", "offset")
    for zero, (n, k, panel_start, rows) in zip(zeros, ((70, 328, 0, 70), (70, 99, 2, 38), (33, 600, 1, 5))):
        weight = random_weight(n, k, Precision(bits, group_size, zero))
        guarded = torch.full((rows * k + 16,), math.nan, dtype=dtype)
        out = guarded[8:-8].view(rows, k)
        cuda.dequantize(prepared(weight), panel_start, out)
        assert torch.equal(out, dense(weight)[16 * panel_start : 16 * panel_start + rows].to(dtype))
        assert guarded[:8].isnan().all() and guarded[-8:].isnan().all()
