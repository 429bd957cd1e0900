"""The shape of the project: who imports whom, and what files may be called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).parents[2]
SOURCES = ("llmpq", "planner", "csrc", "bench", "tests", "examples")
NAMELESS = ("util", "utils", "helper", "helpers", "common", "misc")


def run_python(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr


def test_imports_point_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("module", ["llmpq", "llmpq.spec", "planner"])
def test_import_does_not_bring_torch_along(module: str) -> None:
    run_python(f"import {module}, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules")


def test_kernels_import_no_backend_before_one_is_asked_for() -> None:
    run_python(
        "import llmpq.kernels, sys\n"
        "for name in ('llmpq._cpu', 'llmpq._cuda', 'triton',"
        " 'llmpq.kernels.backends.cuda', 'llmpq.kernels.backends.triton_gemm'):\n"
        "    assert name not in sys.modules, name\n"
    )


def test_every_file_has_a_name_that_says_what_it_owns() -> None:
    files = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if path.stem.lower() in NAMELESS] == []


def test_no_torch_header_in_the_extensions() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text, path
        assert "pybind11" not in text or path.stem.startswith("bindings_"), path
