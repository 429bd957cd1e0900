"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: the backend's tests on a build that stops.

A copy of the project is built with LLMPQ_SANITIZE and tested there. torch's tensors come from malloc, which
AddressSanitizer surrounds with memory that nobody may touch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from llmpq.spec.cluster import Isa

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the build takes half a minute where nothing else runs
ROOT = Path(__file__).parents[2]
ISAS: tuple[Isa, ...] = get_args(Isa)
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)


def sample(*few: Isa) -> pytest.MarkDecorator:
    """Every instruction set; those that are not among `few` in `make test-full` alone."""
    return pytest.mark.parametrize(
        "isa", [isa if isa in few else pytest.param(isa, marks=pytest.mark.full) for isa in ISAS]
    )


FAULTS = {  # an operand that is smaller than the kernel is told, or not where its type must be; how, and what is said
    "x": ("a8x2", r"heap-buffer-overflow[\s\S]*1152-byte region"),
    "y": ("a16", r"heap-buffer-overflow[\s\S]*768-byte region"),
    "weight": ("a8", r"heap-buffer-overflow[\s\S]*(4608|288)-byte region"),  # codes or scales
    "address": ("a8", "runtime error: load of misaligned address"),
    "nothing": ("a8", "^$"),
}
# Each in a process of its own, whose reports are in a file of its name.
FAULTY_CALLS = f"""
import os, torch
from dataclasses import replace
from llmpq.kernels import prepare
from llmpq.kernels.backends import cpu
from llmpq.quant import quantize
from llmpq.spec import Precision

FAULTS = {[(fault, mode) for fault, (mode, _) in FAULTS.items()]}

def call(fault, mode):
    m, n, k = 4, 64, 96
    x, y = torch.zeros(m - (fault == "x"), k), torch.zeros(m - (fault == "y"), n)
    w = prepare(quantize(torch.randn(n - 16 * (fault == "weight"), k), Precision(8, 32)), backend="cpu")
    weight = cpu.handle(replace(w, n=n))
    cpu._cpu.gemm(weight, x.data_ptr(), 0, y.data_ptr(), m, k, n, False, cpu._MODES[mode], 1, 0)
    ids = torch.zeros(2, dtype=torch.int64)
    cpu._cpu.embedding(weight, ids.data_ptr() + (fault == "address"), y.data_ptr(), 1, 1)

for fault, mode in FAULTS:
    if (child := os.fork()) == 0:
        os.dup2(os.open(fault, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        call(fault, mode)
        os._exit(0)
    print(fault, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@dataclass(frozen=True)
class SanitizedProject:
    """A copy of the project whose CPU extension is sanitized, and the runtime library that such code needs."""

    root: Path
    runtime: str

    def python(self, *arguments: str, isa: Isa) -> subprocess.CompletedProcess[str]:
        """Run Python there with `isa` at most; skip the test if this machine lacks it."""
        environment = {
            **os.environ,
            "LD_PRELOAD": self.runtime,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch never free much of what they allocate
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "LLMPQ_ISA": isa,
            "OMP_NUM_THREADS": "1",  # several hold each other up; tests that are about threads set their number
        }

        def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

        found = run(self.root / "llmpq", "-c", "import _cpu; print(_cpu.isa())")
        assert found.returncode == 0, found.stderr
        if found.stdout.strip() != isa:
            pytest.skip(f"this machine has no {isa}")
        return run(self.root, *arguments)

    def check(self, *selection: str, isa: Isa) -> None:
        """Run selected tests. Reports are not captured with the output of a test, which dies with it."""
        result = self.python("-m", "pytest", "-vv", "--capture=sys", *selection, isa=isa)
        assert result.returncode == 0, f"{result.stdout[-1500:]}\n{result.stderr[:6000]}"
        assert re.search(r"\d+ passed", result.stdout), result.stdout[-1500:]


@pytest.fixture(scope="module")
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SanitizedProject:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{compiler} has no AddressSanitizer that can be preloaded")
    root = tmp_path_factory.mktemp("sanitized")
    for folder in ("csrc", "llmpq", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("CMakeLists.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, root)
    options = f"{os.environ.get('CMAKE_ARGS', '')} -DLLMPQ_SANITIZE=ON"
    if "full" not in request.config.option.markexpr:  # no test here is for it then, and it takes as long as another
        options += " -DLLMPQ_HAS_AVXVNNI=OFF"
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=root,
        env={**os.environ, "CMAKE_ARGS": options, "LLMPQ_NO_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, f"{build.stdout[-6000:]}\n{build.stderr[-2000:]}"
    return SanitizedProject(root, runtime)


@sample("portable")
def test_a_faulty_call_is_stopped(sanitized: SanitizedProject, isa: Isa) -> None:
    result = sanitized.python("-c", FAULTY_CALLS, isa=isa)
    assert result.returncode == 0, result.stderr
    ended = dict(line.split() for line in result.stdout.splitlines())
    assert {*ended} == {*FAULTS}
    for fault, (_, report) in FAULTS.items():
        said = (sanitized.root / fault).read_text()
        assert (ended[fault] == "0") == (fault == "nothing"), (fault, said)
        assert re.search(report, said), (fault, said)


@sample("portable", "avx512", "amx")
def test_a_small_grid_runs_without_a_fault(sanitized: SanitizedProject, isa: Isa) -> None:
    # All but products is AVX-512's there.
    names = ("gemm", "experts") if isa == "amx" else ("gemm", "experts", "kv_attention", "attention_options", "rows")
    sanitized.check(
        *(f"tests/kernels/test_{name}.py" for name in names),
        "-k",
        "cpu and (matches_float64 or around_it or function_of_its_name or argmax or grouped or where_they_lie)",
        "--cases=40",
        isa=isa,
    )


@pytest.mark.full
@pytest.mark.timeout(3600)
@EVERY_ISA
def test_every_test_of_the_backend_runs_without_a_fault(sanitized: SanitizedProject, isa: Isa) -> None:
    names = ("gemm", "kv_attention", "attention_options", "rows", "cpu_backend")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    sanitized.check(*files, "-k", "cpu", "-m", "full or not full", isa=isa)
