"""`llmpq doctor` as a whole: on this host, on one whose kernels are not there, and where something hangs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from llmpq.cli.main import main
from llmpq.doctor import diagnosis
from llmpq.doctor.finding import Diagnosis, Finding
from llmpq.spec import Cluster, Device

ROOT = Path(__file__).parents[2]


def by_subject(found: Diagnosis) -> dict[str, Finding]:
    return {finding.subject: finding for finding in found.findings}


def test_a_host_that_works_and_its_links(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("LLMPQ_ISA", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(diagnosis, "TIMES", diagnosis.Times(100, 200))  # whatever else runs here
    file = tmp_path / "cluster.json"
    Cluster((Device("a", "cpu"), Device("b", "cpu", isa="avx2"), Device("far", "cpu", host="192.0.2.99"))).save(file)
    assert main(["doctor", "--cluster", str(file), "--json"]) == 0
    found = by_subject(Diagnosis.from_dict(json.loads(capfd.readouterr().out)))
    assert all(finding.status != "problem" for finding in found.values())
    for name in ("a → b", "b → a"):
        assert found[name].status == "ok"
        assert found[name].numbers["latency_s"] > 0 and found[name].numbers["bytes_per_s"] > 0
    assert "a → far" in found["localhost → 192.0.2.99"].found
    assert found["kernels"].status == found["solver"].status == "ok"


def test_a_host_whose_kernels_are_broken_and_that_has_no_cache_says_so_and_what_to_do(tmp_path: Path) -> None:
    for package in ("llmpq", "planner"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("_cpu.*", "__pycache__"))
    (tmp_path / "llmpq" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF is how it begins")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LLMPQ_CACHE": "/dev/null/cache", "COLUMNS": "200"}
    patient = "from llmpq.doctor import diagnosis; diagnosis.TIMES = diagnosis.Times(100, 200); "
    command = [sys.executable, "-c", patient + "from llmpq.cli.main import main; raise SystemExit(main(['doctor']))"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 7, result.stderr
    assert "llmpq: runs would not work here: processor, llmpq._cpu; see what to do above" in result.stderr
    (line,) = (line for line in result.stdout.splitlines() if "llmpq._cpu" in line)
    assert "cannot be loaded: ImportError" in line and "problem" in line
    assert "run `pip install .`" in result.stdout and "set LLMPQ_CACHE to a folder" in result.stdout
    assert "1 problem, " in result.stdout and "Traceback" not in result.stdout + result.stderr


def test_nothing_that_hangs_holds_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nsleep 600\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(diagnosis, "TIMES", diagnosis.Times(0.1, 0.2))
    found = by_subject(diagnosis.diagnose(Cluster((Device("a", "cpu"), Device("b", "cpu")))))
    assert found["nvidia-smi"].status == "warning" and "no answer within" in found["nvidia-smi"].found
    assert found["import"].status == "problem"  # torch takes longer than that
    assert found["a → b"].status == "warning" and "out of time" in found["a → b"].found
