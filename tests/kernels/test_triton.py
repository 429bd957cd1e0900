"""The Triton backend beyond what test_gemm.py runs on every backend: how work is cut, and the code that a GPU runs.

Without a GPU all kernels run in Triton's interpreter; the inline assembly, which it lacks, in tests/support/ptx.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from llmpq.kernels import PreparedWeight, available_backends, gemm, gemm_path, prepare
from llmpq.kernels.backends import triton_gemm
from llmpq.kernels.backends.triton_gemm import PROGRAMS, STEP, Config, config, dequantize, is_available
from llmpq.quant import QuantTensor, pack
from llmpq.quant.packing import PACKED_BITS
from llmpq.spec import GROUP_SIZES, Precision
from llmpq.spec.precision import ZeroKind
from tests.support import ptx
from tests.support.grid import FACTORS, Case, covering_array
from tests.support.reference import assert_close_to_native, dense, random_weight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16)
H100 = ((9, 0), 132)
SHAPES = [(16, 100), (576, 1536), (4096, 4096), (8192, 8192), (28672, 8192), (12288, 49152), (151936, 896)]


@pytest.fixture
def triton() -> None:
    if (reason := available_backends()["triton"]) is not None:
        pytest.skip(reason)


def _inline_asm(
    builder: object, program: str, constraints: str, values: list[Any], kinds: object, is_pure: bool, pack: int
) -> SimpleNamespace:
    """In the place of the interpreter's own, which refuses."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    assert constraints == "=r" + ",r" * len(values) and pack == 1
    operands = np.broadcast_arrays(*(value.data for value in values))
    assert all(operand.dtype == np.int32 for operand in operands)
    result = TensorHandle(ptx.run(program, *operands).astype(np.int32), tl.int32)
    return SimpleNamespace(get_result=lambda index: result)


@pytest.fixture
def assembly(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the interpreter run the tensor-core form of the kernels, as if on an H100."""
    if DEVICE == "cuda":
        pytest.skip("the device runs it anyway")
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", _inline_asm)
    monkeypatch.setattr(triton_gemm, "_device", lambda device: H100)
    triton_gemm._config.cache_clear()


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    triton_gemm._config.cache_clear()


def prepared(weight: QuantTensor | torch.Tensor) -> PreparedWeight:
    return prepare(weight, DEVICE, backend="triton")


def cut_into(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(*arguments: Any) -> Config:
        return dataclasses.replace(config(*arguments), splits=splits)

    triton_gemm._config.cache_clear()
    monkeypatch.setattr(triton_gemm, "config", changed)


# How work is cut


@pytest.mark.parametrize("dtype", FACTORS["dtype"], ids=str)
@pytest.mark.parametrize("capability", [(0, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_splits_and_tensor_cores_do_not_depend_on_m(capability: tuple[int, int], dtype: torch.dtype) -> None:
    for bits, (n, k) in itertools.product(PACKED_BITS, SHAPES):
        found = {config(capability, 132, Precision(bits, 128), dtype, m, n, k) for m in (1, 8, 9, 16, 17, 33, 500)}
        assert len({(cut.splits, cut.tensor_cores) for cut in found}) == 1
        if found.pop().tensor_cores:
            # Two warps are too few for wgmma, so that all tiles are multiplied by the same instruction.
            assert {cut.num_warps for cut in found} <= {2}


def test_tensor_cores_are_used_where_triton_has_them() -> None:
    for capability, dtype in itertools.product([(0, 0), (7, 0), (7, 5), (8, 0), (9, 0)], FACTORS["dtype"]):
        cut = config(capability, 100, Precision(4, 128), dtype, 1, 4096, 4096)
        assert cut.tensor_cores == (capability >= (8, 0) and dtype in HALVES)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("sms", [1, 20, 108, 132])
def test_splits_keep_a_device_busy_if_k_is_long_enough(sms: int, n: int, k: int) -> None:
    splits = config((9, 0), sms, Precision(4, 128), torch.float16, 1, n, k).splits
    steps = math.ceil(k / STEP)
    assert splits * math.ceil(n / 64) >= PROGRAMS * sms or splits == max(1, steps // 4)
    assert (splits - 1) * math.ceil(n / 64) < 2 * PROGRAMS * sms or splits == 1


def test_a_tile_covers_m_up_to_64_with_less_than_half_of_it_wasted() -> None:
    for m in range(1, 300):
        block_m = config(*H100, Precision(4, 128), torch.float16, m, 4096, 4096).block_m
        assert block_m == 8 or block_m == 64 or block_m / 2 < m <= block_m


TILE_FIELDS = {"block_n", "num_warps", "num_stages"}
FACTS = {"capability", "bits", "dtype", "n", "k"}


def test_an_entry_of_the_table_sets_only_fields_that_may_depend_on_its_keys() -> None:
    table = triton_gemm._table()
    assert set(table) == {"measured", "tiles", "splits"}
    for entry in table["tiles"]:
        assert set(entry) - FACTS - {"block_m"} == TILE_FIELDS
    for entry in table["splits"]:
        assert set(entry) - FACTS == {"splits"}


def test_first_entry_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = {"block_n": 32, "num_warps": 2, "num_stages": 5}
    table = {
        "tiles": [{"capability": [9, 0], "bits": 4, "n": [1000, 2000], "block_m": 16, **tile}, {"bits": 3, **tile}],
        "splits": [{"dtype": "float16", "k": [64, 64], "splits": 9}, {"splits": 3}],
    }
    monkeypatch.setattr(triton_gemm, "_table", lambda: table)

    def found(bits: int, m: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> tuple[int, int]:
        cut = config((9, 0), 132, Precision(bits, 128), dtype, m, n, k)
        return cut.num_stages, cut.splits

    assert found(4, 16, 1000, 64) == (5, 9)
    assert found(4, 16, 2001, 64) == (3, 9)
    assert found(4, 8, 1000, 65) == (3, 3)
    assert found(3, 8, 1, 64, torch.bfloat16) == (5, 3)


# What the interpreter and a GPU run alike


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_code_is_read_at_every_position_of_a_step(triton: None, bits: int) -> None:
    values = 2**bits
    codes = ((torch.arange(values)[:, None] + torch.arange(STEP)) % values).to(torch.uint8)
    zeros = torch.randint(values, (values, 1), dtype=torch.uint8)
    scales = torch.ones(values, 1, dtype=torch.float16)
    weight = QuantTensor(pack(codes, bits), scales, zeros, Precision(bits, None, zero="asym"), (values, STEP))
    y = gemm(torch.eye(STEP, dtype=torch.float16, device=DEVICE), prepared(weight))
    assert torch.equal(y.cpu().T, codes.half() - zeros.half())


@pytest.mark.parametrize(
    ("bits", "dtype"), [*zip(PACKED_BITS, (torch.bfloat16, torch.float16, torch.float32))], ids=str
)
def test_product_of_several_tiles_in_every_direction_matches_float64(
    triton: None, bits: int, dtype: torch.dtype
) -> None:
    m, n, k = 33, 70, 2 * STEP + 44
    weight, x, bias = random_weight(n, k, Precision(bits, 128, zero="asym")), torch.randn(m, k), torch.randn(n)
    x = x.to(dtype)
    y = gemm(x.to(DEVICE), prepared(weight), bias=bias.to(DEVICE))
    assert_close_to_native(y, x, dense(weight), bias)


@pytest.mark.parametrize("group_size", [*GROUP_SIZES, None])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_group_has_its_own_scale_and_zero(triton: None, bits: int, group_size: int | None) -> None:
    weight = random_weight(17, 3 * 256 + 33, Precision(bits, group_size, zero="asym"))
    x = torch.eye(weight.shape[1])[31::32]  # the last column of each block, and the one after the last block
    assert torch.equal(gemm(x.to(DEVICE), prepared(weight)).cpu(), dense(weight).T[31::32])


@pytest.mark.parametrize(
    ("splits", "k"), [(2, STEP * 6), (3, STEP * 6 + 1), (4, STEP * 6), (7, STEP * 6 + 1), (4, 90), (7, 90)]
)
def test_splits_of_k_add_up(triton: None, monkeypatch: pytest.MonkeyPatch, splits: int, k: int) -> None:
    cut_into(splits, monkeypatch)
    precision = Precision(3, 64, zero="asym")
    weight, x, bias = random_weight(40, k, precision), torch.randn(9, k), torch.randn(40)
    w, x = prepared(weight), x.to(DEVICE)
    y = gemm(x, w, bias=bias.to(DEVICE))
    assert_close_to_native(y, x, dense(weight), bias)
    assert torch.equal(gemm(x, w, bias=bias.to(DEVICE)), y)
    assert torch.equal(gemm(x[4:5], w, bias=bias.to(DEVICE)), y[4:5])


def test_parts_are_written_whole_before_they_are_read(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(5, monkeypatch)
    x, w = torch.randn(3, 700, device=DEVICE), prepared(random_weight(21, 700, Precision(4, 32)))
    expected, out = gemm(x, w), torch.empty(3, 21, device=DEVICE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(math.nan))
    assert torch.equal(gemm(x, w, out=out), expected)


def test_memory_for_parts_does_not_grow_with_m(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, splits = 45, 21, 5
    x, w = torch.randn(m, 700, device=DEVICE), prepared(random_weight(n, 700, Precision(4, 32)))
    cut_into(splits, monkeypatch)
    expected, sizes, empty = gemm(x, w), [], torch.empty

    def counted(*size: Any, **options: Any) -> torch.Tensor:
        sizes.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(triton_gemm, "SCRATCH_BYTES", 4 * splits * n * 20)
    monkeypatch.setattr(torch, "empty", counted)
    assert torch.equal(gemm(x, w, out=torch.zeros_like(expected)), expected)
    assert sizes == [(splits, 16, n), (splits, 16, n), (splits, 13, n)]


@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_dequantize_writes_the_weights_by_definition_and_nothing_else(
    triton: None, bits: int, group_size: int | None
) -> None:
    for zero, scale_dtype, dtype, (n, k) in (
        ("sym", torch.float16, torch.float16, (43, 129)),
        ("asym", torch.bfloat16, torch.float32, (48, 160)),
        ("offset", torch.bfloat16, torch.bfloat16, (43, 129)),
    ):
        weight = random_weight(n, k, Precision(bits, group_size, zero), scale_dtype)
        assert isinstance(weight, QuantTensor)
        w = prepared(weight)
        for panel_start, rows in ((0, n), (2, 7)):
            around = torch.full((rows + 2, k), math.nan, dtype=dtype, device=DEVICE)
            dequantize(w, panel_start, around[1:-1])
            first = 16 * panel_start
            assert torch.equal(around[1:-1].cpu(), weight.dequantize(dtype)[first : first + rows])
            assert around[0].isnan().all() and around[-1].isnan().all()


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter shows addresses")
@pytest.mark.parametrize("zero", get_args(ZeroKind))
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_kernels_stay_inside_their_tensors(
    triton: None, monkeypatch: pytest.MonkeyPatch, bits: int, zero: ZeroKind
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    w = prepared(random_weight(81, 300, Precision(bits, 64, zero)))
    x, bias, out, weights = torch.randn(3, 300), torch.randn(81), torch.empty(3, 81), torch.empty(65, 300)
    ends = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in (*w.data, x, bias, out, weights)]

    def checked(access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def call(builder: object, pointers: Any, *arguments: Any) -> Any:
            active = np.broadcast_to(pointers.data, arguments[mask_at].data.shape)[arguments[mask_at].data.astype(bool)]
            assert np.any([(start <= active) & (active < end) for start, end in ends], axis=0).all()
            return access(builder, pointers, *arguments)

        return call

    for name, mask_at in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(InterpreterBuilder, name, checked(getattr(InterpreterBuilder, name), mask_at))
    gemm(x, w, bias=bias, out=out)
    dequantize(w, 1, weights)


def test_the_dequantized_path_multiplies_the_dequantized_weights(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_path, "is_fused", lambda *arguments: False)
    weight, x = random_weight(40, 70, Precision(3, 32)), torch.randn(5, 70, device=DEVICE)
    assert_close_to_native(gemm(x, prepared(weight)), x, dense(weight))


@pytest.mark.full
@pytest.mark.parametrize("case", [Case(**row) for row in covering_array({**FACTORS, "activations": ("a16",)})], ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_product_matches_float64_at_all_sizes(
    triton: None, monkeypatch: pytest.MonkeyPatch, splits: int, case: Case
) -> None:
    cut_into(splits, monkeypatch)
    weight = random_weight(case.n, case.k, case.precision, case.scale_dtype)
    x, bias = torch.randn(case.m, case.k).to(case.dtype), torch.randn(case.n) if case.bias else None
    y = gemm(x.to(DEVICE), prepared(weight), bias=None if bias is None else bias.to(DEVICE))
    assert_close_to_native(y, x, dense(weight), bias)


@pytest.mark.parametrize(("splits", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (3, torch.float32)], ids=str)
def test_a_residual_is_added_to_the_rounded_product(
    triton: None, monkeypatch: pytest.MonkeyPatch, splits: int, dtype: torch.dtype
) -> None:
    cut_into(splits, monkeypatch)
    w = prepared(random_weight(37, 3 * STEP, Precision(4, 32)))
    x, bias = torch.randn(20, 3 * STEP).to(DEVICE, dtype), torch.randn(37).to(DEVICE, dtype)
    residual = torch.randn(20, 50).to(DEVICE, dtype)[:, 5:42]
    found = gemm(x, w, bias=bias, residual=residual)
    assert torch.equal(found, gemm(x, w, bias=bias) + residual)


# What only a GPU runs: the inline assembly


@pytest.mark.parametrize("kind", [ptx.F16, ptx.BF16], ids=["float16", "bfloat16"])
def test_evaluator_s_numbers_are_torch_s(kind: ptx.Format) -> None:
    dtype = torch.float16 if kind is ptx.F16 else torch.bfloat16
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    numbers = bits.view(dtype).double()
    finite = numbers.isfinite()
    patterns, numbers = bits[finite].numpy().astype(np.int64) & 0xFFFF, numbers[finite].numpy()
    assert np.array_equal(kind.decode(patterns), numbers)
    assert np.array_equal(kind.encode(numbers), patterns)
    between = torch.empty(10_000).uniform_(-1e4, 1e4) * torch.arange(-24, 1).repeat_interleave(400).exp2()
    expected = between.to(dtype).view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    assert np.array_equal(kind.encode(between.double().numpy()), expected)


def test_the_evaluator_s_instructions_match_their_definitions() -> None:
    a, b, c = (np.array([word], dtype=np.uint32) for word in (0x89ABCDEF, 0x01234567, 0xF0F00F0F))
    assert ptx.run("lop3.b32 $0, $1, $2, $3, 0xEA;", a, b, c) == ((a & b) | c)
    assert ptx.run("lop3.b32 $0, $1, $2, $3, 0x96;", a, b, c) == a ^ b ^ c
    assert ptx.run("prmt.b32 $0, $1, $2, 0x7531;", a, b) == 0x014589CD
    assert ptx.run("prmt.b32 $0, $1, $2, 0xF0C8;", a, b) == 0x00EF00FF
    three_and_minus_half = np.array([0x4200B800], dtype=np.uint32)
    two_and_four = np.array([0x40004400], dtype=np.uint32)
    assert ptx.run("fma.rn.f16x2 $0, $1, $2, $1;", three_and_minus_half, two_and_four) == 0x4880C100  # 9 and -2.5
    assert ptx.run("{ .reg .b32 t; add.rn.f16x2 t, $1, $1; add.rn.f16x2 $0, t, $1; }", two_and_four) == 0x46004A00
    assert ptx.run("fma.rn.bf16x2 $0, $1, $1, $1;", np.array([0x40003F80])) == 0x40C04000  # 6 and 2
    assert ptx.run("add.rn.f32 $0, $1, $2;", np.array([0x4B000005]), np.array([0xCB000007])) == 0xC0000000  # -2
    with pytest.raises(KeyError):
        ptx.run("mul.f32 $0, $1, $1;", a)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_assembly_is_exact_for_every_code_position_and_zero(assembly: None, bits: int, dtype: torch.dtype) -> None:
    import triton.language as tl

    from llmpq.kernels.backends.triton_kernel import dequantize_kernel

    rows = 2**bits  # one for each zero, and each code at each position of an octet, or of a step where that matters
    period = 8 if bits == 8 else STEP
    position = torch.arange(rows * period)
    codes = ((position // period + position % period) % 2**bits).to(torch.uint8).expand(rows, -1)
    zeros = torch.arange(rows, dtype=torch.uint8)[:, None]
    scales, k = torch.ones(rows, 1, dtype=torch.float16), codes.shape[1]
    w = prepared(QuantTensor(pack(codes, bits), scales, zeros, Precision(bits, None, "asym"), (rows, k)))
    out = torch.empty(rows, k)
    half = tl.float16 if dtype == torch.float16 else tl.bfloat16
    dequantize_kernel[(1, k // STEP)](
        *w.data, out, rows, 1, K=k, BITS=bits, HAS_OFFSETS=False, GROUP_SIZE=k, dtype=half, BLOCK_N=max(16, rows)
    )
    assert torch.equal(out, codes.float() - zeros.float())


@pytest.mark.parametrize("zero", get_args(ZeroKind))
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_kernel_with_assembly_gives_the_bits_of_the_plain_one_in_tiles_of_any_height(
    triton: None, request: pytest.FixtureRequest, bits: int, zero: ZeroKind
) -> None:
    weight, x = random_weight(37, 200, Precision(bits, 64, zero)), torch.randn(65, 200).half()
    w = prepared(weight)
    plain = gemm(x.to(DEVICE), w)
    request.getfixturevalue("assembly")
    for m in (1, 9, 17, 65):  # tiles 8, 16, 32 and 64 rows high
        assert torch.equal(gemm(x[:m], w), plain[:m]), f"{m} rows"


# What there is to say where triton cannot run


def test_the_backend_is_unavailable_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
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
