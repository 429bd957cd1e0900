"""The pool that shares loops out to threads, under ThreadSanitizer: no item is lost or doubled, nothing is raced."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(120)
def test_each_item_of_a_loop_is_done_once(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    sources = ROOT / "tests" / "support" / "thread_loops.cpp", ROOT / "csrc" / "cpu" / "threads.cpp"
    options = "-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", "-pthread"
    program = tmp_path / "thread_loops"
    built = subprocess.run([compiler, *options, *sources, "-o", program], capture_output=True, text=True)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip(f"{compiler} has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    found = subprocess.run([program], capture_output=True, text=True)
    if "unexpected memory mapping" in found.stderr:
        pytest.skip("ThreadSanitizer does not run where addresses are as random as here")
    assert found.returncode == 0, found.stderr[:6000]
    assert found.stdout == "0 wrong, shared, woken\n"
