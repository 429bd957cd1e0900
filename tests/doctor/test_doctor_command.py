"""`llmpq doctor` as a whole: on this host, on one whose kernels are not there, and where something hangs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path

import pytest

from llmpq.cli.main import main
from llmpq.doctor import diagnosis
from llmpq.doctor.finding import Diagnosis, Finding
from llmpq.doctor.probing import Answer, Probe, asking
from llmpq.doctor.processor import processor_findings
from llmpq.runtime.peers import loopback
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


ENDS = list(permutations(("a", "b", "g"), 2))
LINKS = {f"{source} → {target}" for source, target in ENDS}
GPU = {"name": "GPU", "capability": "9.0", "memory_bytes": 2**30, "free_bytes": 2**30, "refused": {"triton": None}}
ANSWERS: dict[str, dict[str, object]] = {
    "module": {"isa": "avx2"},
    "torch_build": {"version": "2.13.0", "cuda": "13.0", "gloo": True},
    "kernels": {"error": 1e-7},
    "visible_gpus": {"gpus": [GPU]},
    "solver": {"solver": "HIGHS", "right": True},
    "folder": {"free_bytes": 2**40},
    "network": {"interfaces": {loopback(): True}, "ways": {}},
    "links": {"links": [[*ends, 1e-5, 1e9] for ends in ENDS]},
}


@pytest.mark.parametrize(
    ("hangs", "late"),
    [
        ("", set()),
        ("torch_build", {"import", *LINKS}),
        ("module", {"llmpq._cpu", "llmpq._cuda"}),
        ("links", LINKS),
        ("visible_gpus", {"devices"}),
    ],
)
def test_what_hangs_is_late_and_all_else_is_answered(
    hangs: str, late: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asking(question: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Probe:
        if question == hangs:
            return Probe(["sleep", "60"])
        probe = Probe(["echo", json.dumps(ANSWERS[question])])
        probe._process.wait()  # however busy this host is: it has answered before anything is late
        return probe

    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nsleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(diagnosis, "asking", asking)
    monkeypatch.setattr(diagnosis, "TIMES", diagnosis.Times(0.2, 0.4))
    devices = Cluster((Device("a", "cpu"), Device("b", "cpu"), Device("g", "cuda")))
    found = [f for f in diagnosis.diagnose(devices).findings if f.topic not in ("capacity", "versions")]
    unanswered = {finding.subject for finding in found if "no answer within" in finding.found}
    assert unanswered - {"AMX"} == late | {"nvidia-smi"}
    assert not any(finding.status == "problem" for finding in found)


def test_a_failure_of_the_kernels_is_none_of_torch() -> None:
    wrong = {"LLMPQ_ISA": "bogus"}
    with asking("torch_build", environment=wrong) as first, asking("kernels", environment=wrong) as second:
        torch, kernels = (probe.answer(time.monotonic() + 100) for probe in (first, second))
    found = processor_findings(Answer({"isa": "avx2"}), None, torch, kernels)
    (failed,) = (finding for finding in found if finding.status == "problem")
    assert failed.subject == "kernels" and "LLMPQ_ISA is 'bogus'" in failed.found
