"""The script for a bare machine with a GPU: that all it names is there, and that it begins with next to nothing."""

from __future__ import annotations

import importlib
import json
import lzma
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from bench import extensions, gpu_all
from bench.kernels import gpu_small
from bench.machine import ROOT
from bench.timebox import Command, TimeBox
from llmpq.cli.main import build_parser

FILES = (*gpu_all.PRODUCT_TESTS, *gpu_all.OPERATION_TESTS)
ABSENT = ("mip", "cffi", "cbcbox", "highsbox", "highspy", "gguf", "plotly")  # on a machine with torch and little else


def commands() -> list[Command]:
    steps = gpu_all.steps(Path("state"))
    return [command for step in steps if step.name not in ("build", "build_cpu") for command in step.commands()]


def test_every_file_with_tests_for_a_gpu_is_run() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if re.search(r"mark\.gpu\b", path.read_text())]
    assert {str(path.relative_to(ROOT)) for path in marked} - {"tests/bench/test_gpu_all.py"} <= {*FILES}


def test_the_options_of_every_command_are_known() -> None:
    parsed = []
    for command in commands():
        if "-m" not in command.argv:
            continue
        at = command.argv.index("-m")
        name, arguments = command.argv[at + 1], [part.replace("{seconds}", "60") for part in command.argv[at + 2 :]]
        if name == "llmpq.run":
            build_parser().parse_args(["run", *arguments])
        elif name != "pytest":
            importlib.import_module(name).parse(arguments)
        parsed.append(name)
    assert {"bench.kernels.gpu_small", "bench.kernels.rivals_gpu", "llmpq.run", "pytest"} <= set(parsed)


def test_its_steps_name_steps() -> None:
    steps = gpu_all.steps(Path("state"))
    names = [step.name for step in steps]
    for i, step in enumerate(steps):
        assert set(step.needs + step.after) <= set(names[:i])
        assert step.share <= step.limit
    assert sum(step.share for step in steps if not step.background) <= gpu_all.parse([]).seconds


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bench.gpu_all", "nothing is no step; there are check, build,"),
        ("bench.extensions", "nothing is no extension; there are _cuda, _cpu"),
    ],
)
def test_it_needs_the_standard_library_only(name: str, said: str) -> None:
    """-S: no package is found."""
    command = [sys.executable, "-S", "-m", name, "nothing"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert said in found.stderr


def test_its_steps_are_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    """Two, as all of them take minutes; the options and tests of the others are looked at above and below."""
    chosen = ["check", "profiles"]
    command = [sys.executable, "-m", "bench.gpu_all", *chosen, "--rehearse", "--seconds", "100"]
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path)}
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=blind)
    assert found.returncode == 0, found.stdout[-3000:]
    rows = {row["step"]: row["state"] for row in json.loads((tmp_path / "gpu_all.json").read_text())["steps"]}
    assert rows == dict.fromkeys(chosen, "passed")


def test_an_extension_that_was_built_beforehand_is_taken_if_it_is_of_these_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    for name in ("csrc/cuda/gemm.cu", f"llmpq/{extensions.file_name('_cuda')}", "CMakeLists.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"built or read: {name}")
    monkeypatch.setattr(extensions, "ROOT", root)
    monkeypatch.setenv("LLMPQ_PREBUILT", str(tmp_path / "prebuilt"))
    monkeypatch.setenv("CUDAARCHS", "90a")

    def compiles() -> bool:
        return any("cmake" in command.argv for command in extensions.commands(tmp_path, "_cuda"))

    assert compiles()
    extensions.keep("_cuda")
    assert not compiles()
    library = root / "llmpq" / extensions.file_name("_cuda")
    library.unlink()
    assert extensions.main(["--place", "--rehearse", "_cuda"]) == 0 and not library.exists()
    assert extensions.main(["--place", "_cuda"]) == 0
    assert library.read_text().startswith("built or read: llmpq/_cuda")
    monkeypatch.setenv("CUDAARCHS", "80")
    assert compiles()
    monkeypatch.setenv("CUDAARCHS", "90a")
    (root / "csrc/cuda/gemm.cu").write_text("another")
    assert compiles()
    extensions.keep("_cuda")
    assert len([*(tmp_path / "prebuilt").iterdir()]) == 1


def test_its_tests_are_collected_where_packages_are_absent() -> None:
    blocked = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
    (command,) = gpu_all.tests(Path("state"), FILES, "not compiled")
    arguments = command.rehearsal[command.rehearsal.index("pytest") + 1 :]
    found = subprocess.run(
        [sys.executable, "-c", blocked, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
    )
    assert found.returncode == 0, found.stdout[-3000:]
    counts = dict(re.findall(r"^(tests/\S+): (\d+)$", found.stdout, re.MULTILINE))
    assert set(counts) == {name for name in FILES if (ROOT / name).exists()}


def test_wheels_and_a_packed_library_are_found_by_what_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = tmp_path / "rivals", tmp_path / "state"
    folder.mkdir()
    with zipfile.ZipFile(folder / "absent_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("absent_here.py", "name = 'from the wheel'")
        info = "absent_here-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: absent-here\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    (folder / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    (folder / "_C_stable_libtorch.abi3.so.xz").write_bytes(lzma.compress(b"a library"))
    for name in ("PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "LLMPQ_WHEELS", "LLMPQ_VLLM_LIBRARY"):
        monkeypatch.setenv(name, os.environ["PATH"] if name == "PATH" else "")  # so that it is as before afterwards
    monkeypatch.delenv("LLMPQ_VLLM_LIBRARY")
    monkeypatch.setenv("LLMPQ_RIVALS", str(folder))
    box = TimeBox(60, state, tmp_path / "results", (), "")
    gpu_all.install(box, state)
    say = "import absent_here, os; print(absent_here.name, open(os.environ['LLMPQ_VLLM_LIBRARY']).read())"
    assert box.call("check", Command((sys.executable, "-c", say)), 20) == "passed"
    assert "[check] from the wheel a library" in (tmp_path / "results" / "gpu_all.log").read_text()


TESTS = """
import os, pytest
def log(name):
    with open(os.environ["RAN"], "a") as ran: ran.write(f"{name} {os.getpid()}\\n")
def test_passes(): log("passes")
def test_is_skipped(): pytest.skip("for a reason")
def test_loses_the_device():
    log("loses")
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_comes_later(): log("later")
"""


@pytest.mark.slow
def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    record, ran = tmp_path / "record.jsonl", tmp_path / "ran"
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}

    def run(sources: str, *options: str) -> tuple[int, list[str], set[str]]:
        """Exit code, tests that ran in order, and their processes."""
        ran.write_text("")
        command = [sys.executable, "-m", "pytest", "-p", "tests.support.resume", "-n", "1", str(tmp_path), *options]
        environment = given | {"LLMPQ_TEST_RECORD": str(record), "LLMPQ_TEST_SOURCES": sources, "RAN": str(ran)}
        code = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode
        lines = [line.split() for line in ran.read_text().splitlines()]
        return code, [name for name, _ in lines], {process for _, process in lines}

    code, tests, processes = run("a")
    assert (code, tests, len(processes)) == (1, ["passes", "loses", "later"], 2)  # one that lost its device is replaced
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    outcomes = {row["test"].partition("::")[2]: row["outcome"] for row in rows}
    assert outcomes == {
        "test_passes": "passed",
        "test_is_skipped": "skipped",
        "test_loses_the_device": "failed",
        "test_comes_later": "passed",
    }
    assert any("illegal memory access" in row.get("reason", "") for row in rows)
    with record.open("a") as cut:
        cut.write('{"test": "cut o')
    assert run("a")[:2] == (1, ["loses"])
    assert run("a", "-k", "passes")[:2] == (0, [])  # that nothing is left is no failure
    assert run("b")[1] == ["passes", "loses", "later"]


def test_few_small_products_are_twelve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_small.wrong("reference", "cpu", few=True) == []
    monkeypatch.setattr(gpu_small, "gemm", lambda x, weight: torch.zeros(len(x), weight.n))
    assert len(gpu_small.wrong("reference", "cpu", few=True)) == 12
