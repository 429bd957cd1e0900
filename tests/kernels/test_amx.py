"""Products of many rows in AMX: on a processor that has it, and on any x86-64 with AVX-512 whose AMX is emulated.

tests/support/amx/processor.cpp, preloaded, executes the instructions that the processor does not know, so that the
kernel runs as it was compiled. What that cannot show is what only the processor shows: speed, and whether
tests/support/amx/tile_state.h read the manual right.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch

from llmpq.kernels import available_backends
from llmpq.kernels.backends import cpu
from llmpq.runtime.launch import device_environment
from llmpq.spec import Device
from llmpq.spec.cluster import Isa
from llmpq.spec.precision import ZeroKind
from tests.support.grid import Case, covering_array
from tests.support.reference import random_weight

if (reason := available_backends()["cpu"]) is not None:
    pytest.skip(reason, allow_module_level=True)
if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("AMX is used on x86-64 Linux alone", allow_module_level=True)

ROOT = Path(__file__).parents[2]
Machine = Literal["processor", "emulated"]
EVERY_MACHINE = pytest.mark.parametrize("machine", get_args(Machine))

# Around one tile of x and four, for one term and two; blocks, pairs of them, groups; panels and four of them.
FACTORS: dict[str, tuple[Any, ...]] = {
    "m": (1, 3, 5, 6, 8, 9, 15, 16, 17, 31, 33, 63, 65, 100, 200),
    "k": (20, 32, 33, 64, 96, 100, 129, 200, 257, 320),
    "n": (1, 15, 16, 17, 40, 63, 64, 65, 100),
    "bits": (3, 4, 8),
    "group": (32, 64, 128, 256, None),
    "zero": get_args(ZeroKind),
    "activations": ("a8", "a8x2"),
    "dtype": (torch.float32, torch.bfloat16),
    "scale_dtype": (torch.float16, torch.bfloat16),
    "bias": (False, True),
}
PIECES = {"bits": 4, "scale_dtype": torch.float16, "dtype": torch.float32, "bias": False, "n": 20}
CASES = [Case(**row) for row in covering_array(FACTORS)] + [
    Case(m=81, k=4300, group=128, zero="asym", activations="a8", **PIECES),  # columns decoded in two pieces for L2
    Case(m=97, k=8192, group=None, zero="sym", activations="a8", **PIECES),  # one row more than is packed at once
    Case(m=49, k=8192, group=256, zero="offset", activations="a8x2", **PIECES),
]

# Computes the products, and tries what else is asked of tiles; in a process of its own, since an instruction set is
# chosen once.
PROGRAM = """
import ctypes, sys, torch
from llmpq import kernels
from llmpq.kernels.backends import cpu
from llmpq.quant import quantize
from llmpq.spec import Precision

library = ctypes.CDLL(sys.argv[1])
library.amx_products.restype = ctypes.c_long
cases, found = torch.load(sys.argv[2], weights_only=False), {"isa": cpu.isa()}
found["products"] = [
    kernels.gemm(x, kernels.prepare(weight, backend="cpu"), bias=bias, activations=mode)
    for x, weight, bias, mode in cases
]
torch.manual_seed(0)
x, w = torch.randn(70, 512), kernels.prepare(quantize(torch.randn(1030, 512), Precision(4, 64)), backend="cpu")
found["threads"], found["dense"] = [], []
dense = torch.randn(1030, 512).bfloat16()
for threads in (3, 1):
    torch.set_num_threads(threads)
    found["dense"].append(torch.nn.functional.linear(x.bfloat16(), dense))
    found["threads"].append(kernels.gemm(x, w, activations="a8x2"))
    found["dense"].append(torch.nn.functional.linear(x.bfloat16(), dense))
experts = torch.arange(30, dtype=torch.int32).remainder_(2).view(15, 2)  # each has 15 rows, every other one
out = kernels.grouped_gemm(x[:15], [w, w], experts, out=torch.empty(30, 1030), activations="a8x2")
found["grouped"] = out.view(15, 2, 1030)
found["emulated"] = library.amx_products()

def configuration():
    now = (ctypes.c_uint8 * 64)()
    library.amx_read_config(now)
    return bytes(now)

found["configurations"] = []  # of the thread before and after a product: with no tiles configured, and with some
for rows in (0, 3) if cpu.isa() == "amx" else ():
    if rows:
        mine = bytearray(64)
        mine[0], mine[16], mine[48] = 1, 12, rows
        library.amx_configure((ctypes.c_uint8 * 64)(*mine))
    before = configuration()
    kernels.gemm(x[:20], w, activations="a8")
    found["configurations"].append((before, configuration()))
torch.save(found, sys.argv[3])
"""
# Prints the instruction set. Linux refuses its permission while a thread has too small a stack for signals, on which
# the tiles are to be saved.
ISA = """
import ctypes, sys
if sys.argv[2:] == ["small stack"]:
    class Stack(ctypes.Structure):
        _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
    memory = ctypes.create_string_buffer(4096)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 4096)), None) == 0
sys.path.insert(0, sys.argv[1])
import _cpu
print(_cpu.isa())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/support/amx/processor.cpp, compiled."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("amx") / "processor.so"
    source = ROOT / "tests/support/amx/processor.cpp"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", str(source), "-o", str(path)]
    subprocess.run([*command, "-ldl"], check=True)
    return path


def run(program: str, *arguments: object, library: Path, machine: Machine, **variables: str) -> str:
    """What a program prints in a process of its own, with LLMPQ_ISA=amx; it must end well and not complain."""
    environment = {**os.environ, "LLMPQ_ISA": "amx", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    if machine == "emulated":
        environment |= {"LD_PRELOAD": str(library), "LLMPQ_AMX_EMULATED": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and ended.stderr == "", f"{ended.returncode}: {ended.stderr[-3000:]}"
    return ended.stdout.strip()


def isa(*arguments: str, library: Path, machine: Machine, **variables: str) -> str:
    """The instruction set that a process of its own chooses, with LLMPQ_ISA=amx."""
    return run(ISA, Path(cpu._cpu.__file__).parent, *arguments, library=library, machine=machine, **variables)


def skip_without_amx(library: Path, machine: Machine) -> None:
    if isa(library=library, machine=machine) != "amx":
        missing = "AVX-512" if machine == "emulated" else "AMX, or the system lets no program use it"
        pytest.skip(f"this processor has no {missing}")


@pytest.fixture(scope="module")
def operands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    cases = []
    for case in CASES:
        around = torch.full((case.m + 2, case.k + 16), torch.nan, dtype=case.dtype)
        x = around[1:-1, 8 : 8 + case.k].copy_(torch.randn(case.m, case.k))
        weight = random_weight(case.n, case.k, case.precision, case.scale_dtype)
        cases.append((x, weight, torch.randn(case.n) if case.bias else None, case.activations))
    path = tmp_path_factory.mktemp("operands") / "cases"
    torch.save(cases, path)
    return path


def results(operands: Path, library: Path, machine: Machine, **variables: str) -> dict[str, Any]:
    path = operands.with_name("_".join((machine, *variables.values())))
    run(PROGRAM, library, operands, path, library=library, machine=machine, **variables)
    found: dict[str, Any] = torch.load(path)
    return found


@pytest.fixture(scope="module")
def expected(operands: Path, library: Path) -> dict[str, Any]:
    """In AVX2, which tests/kernels/test_cpu_backend.py compares with float64."""
    found = results(operands, library, "processor", LLMPQ_ISA="avx2")
    if found["isa"] != "avx2":
        pytest.skip("this processor has no AVX2")
    return found


@pytest.fixture(scope="module", params=get_args(Machine))
def found(request: pytest.FixtureRequest, operands: Path, library: Path) -> dict[str, Any]:
    """In AMX."""
    skip_without_amx(library, request.param)
    found = results(operands, library, request.param)
    assert found["isa"] == "amx" and (found["emulated"] > 0) == (request.param == "emulated")
    return found


def test_products_have_the_bits_of_avx2(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for case, product, right in zip(CASES, found["products"], expected["products"], strict=True):
        assert torch.equal(product, right), case


def test_threads_do_not_disturb_each_others_tiles(found: dict[str, Any], expected: dict[str, Any]) -> None:
    several, one = found["threads"]
    assert torch.equal(several, one) and torch.equal(one, expected["threads"][0])


def test_grouped_products_have_the_bits_of_plain_ones(found: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = expected["threads"][0][:15, None]
    assert torch.equal(found["grouped"], plain.expand(15, 2, 1030))


def test_products_of_torch_in_between_are_the_same(found: dict[str, Any]) -> None:
    """On a processor with AMX they are made in it, with tiles that oneDNN configured."""
    before, after, alone, alone_after = found["dense"]
    assert torch.equal(before, after) and torch.equal(alone, alone_after)


def test_tiles_are_configured_after_a_product_as_they_were_before(found: dict[str, Any]) -> None:
    (none, after_none), (some, after_some) = found["configurations"]
    assert none == after_none == bytes(64)
    assert some == after_some != none


@EVERY_MACHINE
def test_without_permission_avx512_is_used_and_nothing_said(library: Path, machine: Machine) -> None:
    skip_without_amx(library, machine)
    if machine == "emulated":
        assert isa(library=library, machine=machine, AMX_REFUSED="1") == "avx512"
    else:
        assert isa("small stack", library=library, machine=machine) == "avx512"


@EVERY_MACHINE
@pytest.mark.parametrize("wanted", ["", "avx512"])
def test_amx_must_be_asked_for(library: Path, machine: Machine, wanted: str) -> None:
    skip_without_amx(library, machine)
    assert isa(library=library, machine=machine, LLMPQ_ISA=wanted) == "avx512"


def test_a_device_without_amx_keeps_the_libraries_of_torch_off_it(library: Path) -> None:
    skip_without_amx(library, "processor")
    program = "import torch; x = torch.ones(64, 64).bfloat16(); torch.nn.functional.linear(x, x)"

    def told(isa: Isa) -> str:
        environment = device_environment(Device("cpu0", "cpu", isa=isa)) | {"ONEDNN_VERBOSE": "1"}
        return run(program, library=library, machine="processor", **environment)

    assert "AMX" in told("amx") and "AMX" not in told("avx512")


def test_a_processor_without_amx_is_not_taken_for_one_that_has_it(library: Path) -> None:
    """The variable that announces the emulation, alone, makes the system refuse what the processor has not."""
    if isa(library=library, machine="processor") == "amx":
        pytest.skip("this processor has AMX")
    assert isa(library=library, machine="processor", LLMPQ_AMX_EMULATED="1") != "amx"
