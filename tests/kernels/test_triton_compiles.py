"""The Triton kernels compile for GPUs where there is none, to the instructions they were designed for."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llmpq.kernels.backends import triton_gemm
from llmpq.kernels.backends.triton_gemm import config
from llmpq.quant.packing import PACKED_BITS
from llmpq.spec import GROUP_SIZES, Precision

pytestmark = pytest.mark.slow

SUPPORT = Path(__file__).parents[1] / "support"
LAUNCHES = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from llmpq.kernels import PreparedWeight
from llmpq.kernels.backends import gpu_layout, triton_gemm
from llmpq.spec import Precision

class Driver:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *device: 0

driver.set_active(Driver())
JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: print(kernel.warmup(*a, grid=grid, **k).name, *grid)
triton_gemm._device = lambda device: ((9, 0), 132)
precision, n, k, cpu = Precision(4, 128), 512, 8192, torch.device("cpu")
data = gpu_layout.allocate(n, k, precision, torch.float16, cpu)
w = PreparedWeight("triton", n, k, precision, torch.float16, cpu, data)
for m, dtype in ((1, torch.float16), (20, torch.bfloat16)):
    x, bias, out = (torch.empty(size, dtype=dtype) for size in ((m, k), n, (m, n)))
    triton_gemm.gemm(x, w, bias, out, "a16")
triton_gemm.dequantize(w, 1, torch.empty(n - 16, k, dtype=torch.float16))
"""
SHARED_BYTES = {75: 64, 80: 163, 86: 99, 90: 227}  # KiB that one program may use
BLOCKS_M = (8, 16, 32, 64)
K = 32768  # so long that no loop is unrolled whole, and its instructions can be counted
Case = dict[str, Any]


def product(
    capability: tuple[int, int],
    bits: int,
    dtype: str,
    m: int,
    k: int,
    group_size: int = 128,
    n: int = 8192,
    **changes: int | bool,
) -> Case:
    """The kernel as it is launched for such a product."""
    precision = Precision(bits, None, "offset" if changes.get("offsets") else "sym")
    cut = config(capability, 132, precision, getattr(torch, dtype), m, n, k)
    major, minor = capability
    shape = {"kernel": "gemm", "capability": 10 * major + minor, "bits": bits, "dtype": dtype, "k": k}
    return shape | {"group_size": group_size} | asdict(cut) | changes


def dequantization(capability: int, bits: int, dtype: str, k: int, group_size: int) -> Case:
    shape = {"kernel": "dequantize", "capability": capability, "bits": bits, "dtype": dtype, "k": k}
    tensor_cores = capability >= 80 and dtype != "float32"
    launch = {"block_n": 32, "num_warps": 1, "num_stages": 3}
    return shape | {"group_size": group_size, "tensor_cores": tensor_cores} | launch


REDUCTION = {"kernel": "reduce", "capability": 90, "dtype": "bfloat16", "splits": 7}


def listed_sizes() -> list[tuple[int, int]]:
    """A size (n, k) that each entry of the table is for, and one for all others."""
    entries = triton_gemm._table()["tiles"] + triton_gemm._table()["splits"]
    sizes = {(entry.get("n", [8192])[0], entry.get("k", [8192])[0]) for entry in entries}
    return sorted(sizes | {(8192, 8192)})


def every_configuration() -> list[Case]:
    """All that the table or the heuristic choose, in both 16-bit dtypes."""
    return [
        product(capability, bits, dtype, m, k, n=n)
        for capability in ((8, 0), (8, 6), (9, 0))
        for bits, dtype, m in itertools.product(PACKED_BITS, ("float16", "bfloat16"), BLOCKS_M)
        for n, k in listed_sizes()
    ]


# Each width and each height of tiles, the highest where shared memory is smallest, in one dtype; the others, and other
# GPUs, are left to the full tests.
CONFIGURATIONS = every_configuration()
CHOSEN = {80: (8, 64), 86: (64,), 90: (16, 32)}
SOME = [
    case
    for case in CONFIGURATIONS
    if (case["dtype"] == "float16") == ((PACKED_BITS.index(case["bits"]) + BLOCKS_M.index(case["block_m"])) % 2 == 0)
    and case["block_m"] in CHOSEN[case["capability"]]
]
COUNTED, COUNTED_ON_A100 = (
    [product(capability, bits, dtype, 1, K, splits=1) for bits in PACKED_BITS for dtype in ("float16", "bfloat16")]
    for capability in ((9, 0), (8, 0))
)
OTHERS = [
    *(product((9, 0), bits, "float16", m, 1000, group_size=32) for bits, m in ((3, 1), (4, 64))),
    *(product((7, 5), bits, dtype, 1, 4096) for bits, dtype in ((3, "bfloat16"), (8, "float16"))),
    *(product((9, 0), bits, "float32", 1, 4096) for bits in (3, 4)),
    *(
        dequantization(80, bits, dtype, k, 64)
        for bits, dtype, k in ((3, "bfloat16", 576), (4, "float16", 4096), (8, "bfloat16", 1000))
    ),
    dequantization(90, 4, "float32", 4096, 4096),
    *(
        product((9, 0), bits, dtype, m, 4096, group_size=group_size, offsets=True)
        for bits, dtype, m, group_size in (
            (4, "float16", 1, 32),
            (4, "bfloat16", 64, 128),
            (3, "float16", 16, 64),
            (8, "bfloat16", 32, 4096),
        )
    ),
    product((7, 5), 4, "float16", 1, 4096, offsets=True),
    dequantization(80, 4, "float16", 1000, 32) | {"offsets": True},
    REDUCTION | {"block_n": 512, "num_warps": 4, "num_stages": 3},
]
REST = [
    *(case for case in CONFIGURATIONS if case not in SOME),
    *(
        product(capability, bits, dtype, m, k, group_size=group_size)
        for capability, bits, dtype in itertools.product(((8, 0), (9, 0)), PACKED_BITS, ("float16", "bfloat16"))
        for m, (k, group_size) in zip(itertools.cycle(BLOCKS_M), itertools.product((4096, 1000), (*GROUP_SIZES, K)))
    ),
    *(product(capability, bits, "float32", 1, 4096) for capability in ((7, 5), (8, 0), (9, 0)) for bits in PACKED_BITS),
    *(
        dequantization(capability, bits, dtype, 4096, 32)
        for capability, bits, dtype in itertools.product((75, 80, 90), PACKED_BITS, ("float16", "bfloat16", "float32"))
    ),
]


# Heads, kv heads and dimensions of a head: Llama 8B, SmolLM2 and OPT.
HEADS = [dict(zip(("heads", "kv_heads", "head_dim"), shape)) for shape in ((32, 8, 128), (9, 3, 64), (32, 32, 64))]
BOTH = [1, 70]  # new tokens: a sequence that is decoded, and one that is not


def operation(name: str, capability: int, dtype: str, **facts: Any) -> Case:
    return {"operation": name, "capability": capability, "dtype": dtype, "max_len": 4096, "context": 100, **facts}


# Each GPU with both dtypes and both sizes of heads, each thing there is beside once; OTHER_ATTENTION has the rest.
ATTENTION = [
    operation("attention", 80, "bfloat16", **HEADS[2], query_lens=BOTH),
    operation("attention", 90, "float16", **HEADS[0], query_lens=BOTH),
    # As gpt_oss has it, and with all that there is.
    operation(
        "attention",
        90,
        "bfloat16",
        **{**HEADS[0], "heads": 64, "head_dim": 64},
        query_lens=BOTH,
        window=128,
        capacity=384,
        of_heads=["sinks"],
    ),
    operation(
        "attention", 80, "float16", **HEADS[0], query_lens=BOTH, window=1000, cap=50.0, of_heads=["sinks", "slopes"]
    ),
    operation("attention", 90, "bfloat16", **HEADS[0], query_lens=BOTH, cache_dtype="int8"),
]
OTHER_ATTENTION = [
    *(
        operation("attention", capability, dtype, **heads, query_lens=BOTH)
        for capability in (80, 90)
        for dtype in ("float16", "bfloat16")
        for heads in HEADS
    ),
    *(
        operation("attention", 86, dtype, **{**HEADS[0], **changes}, query_lens=BOTH)
        for dtype, changes in (
            ("bfloat16", {"head_dim": 256, "kv_heads": 1}),
            ("bfloat16", {"head_dim": 256, "kv_heads": 8, "heads": 16, "window": 512, "capacity": 1024, "cap": 50.0}),
            ("float16", {"head_dim": 80, "max_len": 100, "context": 10}),
            ("float32", {"cache_dtype": "float16"}),
            ("float32", {"window": 300, "of_heads": ["sinks", "slopes"]}),
            ("bfloat16", {"cache_dtype": "float16"}),
            ("float32", {"cache_dtype": "int8"}),
        )
    ),
    *(
        operation("attention", capability, dtype, **heads, query_lens=BOTH, cache_dtype="int8")
        for capability, dtype, heads in (
            (75, "float16", HEADS[0]),
            (80, "float16", HEADS[0]),
            (86, "bfloat16", {**HEADS[0], "head_dim": 256}),
            (90, "float16", HEADS[1]),
        )
    ),
]
SMALL = [
    *(
        operation("rotate_and_store", 90, dtype, **heads, cache_dtype=kept, rotated=rotated, capacity=capacity)
        for dtype, kept, heads, rotated, capacity in (
            ("float16", "float16", HEADS[0], 128, 4096),
            ("float32", "int8", HEADS[1], 24, 1000),
            ("bfloat16", "float16", HEADS[2], 0, 4096),
        )
    ),
    *(operation("rows", 90, dtype, n=n) for n, dtype in ((576, "float32"), (28672, "bfloat16"))),
    operation("experts", 90, "bfloat16", n=2048, experts=[128, 8], sigmoid=False, tokens=32),
    operation("experts", 90, "float32", n=2048, experts=[1, 1], sigmoid=True),
]
OTHER_ROWS = [operation("rows", 90, dtype, n=n) for n, dtype in ((5120, "bfloat16"), (28672, "float16"))]


def _path() -> str:
    """For programs that import what tests share."""
    return os.pathsep.join(filter(None, (str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH"))))


def compile_all(
    cases: list[Case], folder: Path, program: str = "triton_compilation.py"
) -> list[tuple[Case, dict[str, float]]]:
    """What came of each, in as many processes as the tests leave processors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": _path()}
    count = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    processes = [
        subprocess.Popen(
            [sys.executable, SUPPORT / program, json.dumps(cases[i::count])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(min(count, len(cases)))
    ]
    results = []
    for i, process in enumerate(processes):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        results += zip(cases[i::count], json.loads(output), strict=True)
    return results


def check(case: Case, found: dict[str, float], spilled: float = 0.0) -> None:
    """`spilled`: the share of instructions that may access spilled registers."""
    assert found["shared_bytes"] <= SHARED_BYTES[case["capability"]] * 1024, case
    assert found["local_memory"] <= spilled * found["instructions"], f"{case} spills registers"
    if case["kernel"] == "gemm":
        assert (found["hmma"] > 0) == case["tensor_cores"], case
        assert found["wgmma"] == 0, f"{case} is multiplied by another instruction than small m"


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Case, dict[str, float]]]:
    """What came of SOME and COUNTED, compiled together: a process takes longer to start than to compile a kernel."""
    return compile_all([*SOME, *COUNTED], tmp_path_factory.mktemp("triton"))


def test_every_configuration_compiles_without_spills_and_uses_one_tensor_core_instruction(
    products: list[tuple[Case, dict[str, float]]],
) -> None:
    for case, found in products:
        check(case, found)


@pytest.mark.full
def test_odd_sizes_other_dtypes_and_the_small_kernels_compile(tmp_path: Path) -> None:
    for case, found in compile_all(OTHERS, tmp_path):
        check(case, found)


def test_triton_accepts_every_launch(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", LAUNCHES]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    split = [f"gemm_kernel 1 8 {config((9, 0), 132, Precision(4, 128), torch.float16, 1, 512, 8192).splits}"]
    assert result.stdout.splitlines() == [
        *split,
        "reduce_kernel 1 1",
        *split,
        "reduce_kernel 20 1",
        "dequantize_kernel 16 64",
    ]


def launches(cases: list[Case], folder: Path) -> list[tuple[Case, dict[str, Any]]]:
    """Each launch of each case, none of which needs more shared memory than there is."""
    found = [(case, launch) for case, of in compile_all(cases, folder, "triton_launches.py") for launch in of]
    for case, launch in found:
        assert launch["shared_bytes"] <= SHARED_BYTES[case["capability"]] * 1024, (case, launch)
    return found


TENSOR_CORES = {"grouped_kernel", "decode_kernel", "prefill_kernel"}


def test_operations_besides_products_compile_without_spills_and_attention_to_tensor_core_instructions(
    tmp_path: Path,
) -> None:
    found = launches([*ATTENTION, *SMALL], tmp_path)
    assert {launch["kernel"] for _, launch in found} == {
        *TENSOR_CORES,
        "merge_kernel",
        "rotate_and_store_kernel",
        "norm_kernel",
        "activation_kernel",
        "scale_kernel",
        "positions_kernel",
        "last_rows_kernel",
        "greatest_kernel",
        "first_greatest_kernel",
        "draw_kernel",
        "embedding_kernel",
        "route_kernel",
        "combine_kernel",
        "reduce_kernel",
    }
    for case, launch in found:
        assert launch["local_memory"] == 0, f"{case} spills registers in {launch}"
        expected = launch["kernel"] in TENSOR_CORES and case["dtype"] != "float32"
        assert (launch["tensor_cores"] > 0) == expected, (case, launch)


@pytest.mark.full
def test_rows_of_other_lengths_and_dtypes_compile_without_spills(tmp_path: Path) -> None:
    for case, launch in launches(OTHER_ROWS, tmp_path):
        assert launch["local_memory"] == 0 and launch["tensor_cores"] == 0, (case, launch)


@pytest.mark.full
def test_attention_of_other_shapes_and_dtypes_compiles(tmp_path: Path) -> None:
    """Where shared memory is smallest, too."""
    kernels = [launch["kernel"] for _, launch in launches(OTHER_ATTENTION, tmp_path)]
    assert kernels.count("decode_kernel") == kernels.count("prefill_kernel") == len(OTHER_ATTENTION)


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_everything_else_compiles_too(tmp_path: Path) -> None:
    for case, found in compile_all(REST, tmp_path):
        unrolled = (
            found["loop_per_weight"] == 0
        )  # ptxas does that to loops of a few steps, and then runs short of registers
        check(case, found, spilled=0.02 if unrolled else 0.0)


# Instructions of the main loop for each weight, at most. An H100 gets through 5.7 in the time in which it reads one
# weight of 4 bits, 4.4 of 3 bits and 11.4 of 8 bits; an H200 through 4.0, 3.0 and 8.0.
BUDGET = {
    ("float16", 3): 2.6,
    ("float16", 4): 2.4,
    ("float16", 8): 2.8,
    ("bfloat16", 3): 2.6,
    ("bfloat16", 4): 2.6,
    ("bfloat16", 8): 3.9,
}


def check_main_loop(case: Case, found: dict[str, float]) -> None:
    """It is within its budget, and dequantized weights go from registers to tensor cores."""
    check(case, found)
    assert 1.0 < found["loop_per_weight"] <= BUDGET[case["dtype"], case["bits"]], case
    assert found["loop"] > 0 and found["loop_stores_to_shared"] == 0, case


def test_main_loop_of_decoding_stays_within_its_budget_of_instructions(
    products: list[tuple[Case, dict[str, float]]],
) -> None:
    for case, found in products:
        if case in COUNTED:
            check_main_loop(case, found)


@pytest.mark.full
def test_main_loop_of_decoding_stays_within_its_budget_on_an_a100(tmp_path: Path) -> None:
    for case, found in compile_all(COUNTED_ON_A100, tmp_path):
        check_main_loop(case, found)
