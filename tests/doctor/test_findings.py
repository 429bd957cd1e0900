"""What is made of answers: deliberate faults of a host, one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from llmpq.doctor import questions
from llmpq.doctor.capacity import capacity_findings, device_findings
from llmpq.doctor.finding import Finding
from llmpq.doctor.gpus import driver_version, gpu_findings
from llmpq.doctor.link_speed import link_findings
from llmpq.doctor.packages import package_findings
from llmpq.doctor.probing import Answer
from llmpq.doctor.processor import processor_findings, wants_amx
from llmpq.doctor.surroundings import cache_finding, interface_findings, solver_finding, temporary_finding
from llmpq.spec import Cluster, Device, InvalidField, Link

GIB, MIB = 2**30, 2**20
ISA = Answer({"isa": "avx512"})
TORCH, KERNELS = Answer({"version": "2.13.0", "cuda": None, "gloo": True}), Answer({"error": 1e-7})
LATE = Answer(problem="no answer within 12 s", late=True)
ABSENT = Answer(problem="ModuleNotFoundError: No module named 'llmpq._cpu'")
CPUINFO = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 fma f16c amx_tile amx_int8\nprocessor\t: 1\n"


def only(findings: Iterable[Finding], subject: str) -> Finding:
    (found,) = (finding for finding in findings if finding.subject == subject)
    return found


def host(free: int, limit: int | None = None, quota: str = "max") -> dict[str, str]:
    files = {"/proc/meminfo": f"MemAvailable: {free // 1024} kB\n", "/sys/fs/cgroup/cpu.max": f"{quota} 100000"}
    if limit is not None:
        files |= {"/sys/fs/cgroup/memory.max": str(limit), "/sys/fs/cgroup/memory.current": "0"}
    return files


def test_what_is_not_ok_says_what_to_do() -> None:
    with pytest.raises(InvalidField, match="advice"):
        Finding("a", "b", "warning", "c")


@pytest.mark.parametrize(
    ("extension", "subject", "words"),
    [
        (ABSENT, "llmpq._cpu", "are not built"),
        (Answer(problem="ImportError: /x/_cpu.so: file too short"), "llmpq._cpu", "cannot be loaded: ImportError"),
        (Answer(problem="the process that was to find out was ended by SIGILL"), "llmpq._cpu", "SIGILL"),
        (Answer(problem="ValueError: LLMPQ_ISA is 'sse', expected portable"), "LLMPQ_ISA", "'sse'"),
    ],
)
def test_an_extension_that_cannot_be_used_is_a_problem(extension: Answer, subject: str, words: str) -> None:
    findings = list(processor_findings(extension, None, TORCH, Answer(problem="it fails, too"), {}.get, {}))
    found = only(findings, subject)
    assert found.status == "problem" and words in found.found
    assert ("pip install ." in found.advice) == (subject == "llmpq._cpu")
    assert [f.subject for f in findings if f.status == "problem"] == [subject]  # the rest follows from it


def test_what_the_kernels_use_and_could_use() -> None:
    found = list(processor_findings(ISA, Answer({"isa": "amx"}), TORCH, KERNELS, {"/proc/cpuinfo": CPUINFO}.get, {}))
    assert {finding.status for finding in found} == {"ok"}
    assert only(found, "name").found == "Xeon x 2"
    assert only(found, "instruction set").found == "avx512 is used; the processor has avx2"
    assert "permitted" in only(found, "AMX").found
    refused = only(processor_findings(ISA, ISA, TORCH, KERNELS, {}.get, {}), "AMX")
    assert refused.status == "warning" and refused.found == "the processor has it, but avx512 is used in its place"
    crashed = only(processor_findings(ISA, Answer(problem="ended by SIGILL"), TORCH, KERNELS, {}.get, {}), "AMX")
    assert crashed.status == "warning" and crashed.found.endswith("ended by SIGILL")
    assert wants_amx({"/proc/cpuinfo": CPUINFO}.get) and not wants_amx({}.get)
    portable = processor_findings(Answer({"isa": "portable"}), None, TORCH, KERNELS, {}.get, {})
    assert only(portable, "instruction set").status == "warning"
    environment = {"LLMPQ_ISA": "portable"}
    capped = processor_findings(Answer({"isa": "portable"}), None, TORCH, KERNELS, {}.get, environment)
    assert only(capped, "instruction set").status == "ok"


def test_kernels_that_are_wrong_and_a_torch_that_cannot_be_imported_are_problems() -> None:
    def problems(torch: Answer, kernels: Answer) -> dict[str, str]:
        found = processor_findings(ISA, None, torch, kernels, {}.get, {})
        return {finding.subject: finding.found for finding in found if finding.status == "problem"}

    assert [*problems(TORCH, Answer({"error": 0.01}))] == ["kernels"]
    assert problems(TORCH, Answer(problem="ended by SIGILL")) == {"kernels": "ended by SIGILL"}
    assert [*problems(Answer({**TORCH.values, "gloo": False}), KERNELS)] == ["gloo"]
    broken = Answer(problem="ImportError: libtorch.so")
    assert problems(broken, broken) == {"import": "ImportError: libtorch.so"}


def test_what_is_only_late_is_a_warning() -> None:
    found = list(processor_findings(LATE, LATE, LATE, LATE, {}.get, {}))
    found += processor_findings(Answer({"isa": "avx512"}), LATE, LATE, LATE, {}.get, {})
    found += [solver_finding(LATE), temporary_finding("/tmp", LATE), cache_finding("x", LATE)]
    found += [*interface_findings(LATE, None, {}), *gpu_findings("580.1", LATE, LATE, LATE, LATE, {})]
    found += device_findings([Device("g", "cuda", index=1)], 2, None, None, host(GIB).get)
    assert {finding.status for finding in found} == {"ok", "warning"}
    for subject in ("llmpq._cpu", "AMX", "import", "solver", "temporary", "interfaces"):
        late = next(finding for finding in found if finding.subject == subject)
        assert "no answer within 12 s" in late.found and late.advice.startswith("run it again")
    assert "is not known" in only(found, "g").found
    assert "without CUDA" not in only(found, "devices").found  # as nothing is known of torch's build


@pytest.mark.parametrize(
    ("free", "limit", "status", "words"),
    [
        (16 * GIB, None, "ok", "16.00 GiB free"),
        (16 * GIB, 200 * MIB, "problem", "200.0 MiB free of the 200.0 MiB that the control group may have"),
        (16 * GIB, 600 * MIB, "warning", "two processes and the demo take 1.00 GiB"),
        (100 * MIB, None, "problem", "an idle worker process takes 300.0 MiB"),
    ],
)
def test_little_memory_is_seen_whoever_limits_it(free: int, limit: int | None, status: str, words: str) -> None:
    found = only(capacity_findings(4, host(free, limit).get, 4), "memory")
    assert found.status == status and words in found.found
    assert found.numbers["free_bytes"] == min(free, limit or free)
    assert ("control group" in found.advice) == (limit is not None)


def test_cores_that_are_there_and_may_not_be_used() -> None:
    found = only(capacity_findings(2, host(GIB).get, 8), "cores")
    assert (found.status, found.found) == ("ok", "2 of 8 may be used")
    throttled = only(capacity_findings(8, host(GIB, quota="250000").get, 8), "cores")
    assert throttled.status == "warning" and "time of 2.5" in throttled.found and "threads=2" in throttled.advice


def test_devices_that_are_not_here_or_too_many() -> None:
    devices = [Device("g", "cuda", index=1), Device("a", "cpu", threads=3, isa="amx", memory_bytes=GIB)]
    found = list(device_findings(devices, 2, 1, "avx512", host(GIB).get))
    assert only(found, "g").status == "problem" and "cuda:1 is not here" in only(found, "g").found
    assert "would use avx512" in only(found, "a").found
    assert only(found, "threads").status == only(found, "memory").status == "warning"
    fits = device_findings([Device("a", "cpu", threads=2, memory_bytes=MIB)], 2, 0, "avx512", host(GIB).get)
    assert [finding.status for finding in fits] == ["ok"]


def gpus(driver: str | None, listed: Answer | None, seen: Answer | None, cuda: str | None, **variables: str) -> Finding:
    """The first finding that is not ok, else that on the devices."""
    found = list(gpu_findings(driver, listed, seen, ABSENT, Answer({"cuda": cuda}), variables))
    return next((f for f in found if f.status != "ok"), next((f for f in found if f.subject == "devices"), found[0]))


def test_gpus_or_why_there_are_none() -> None:
    one, no_smi = Answer({"text": "NVIDIA H200, 143771 MiB, 580.1\n"}), None
    assert "no driver of NVIDIA's is loaded" in gpus(None, no_smi, None, "13.0").found
    hanging = gpus("580.1", Answer(problem="no answer within 12 s"), Answer({"gpus": []}), "13.0")
    assert (hanging.status, hanging.subject) == ("warning", "nvidia-smi")
    assert "torch is a build without CUDA" in gpus("580.1", one, Answer(problem="AssertionError"), None).found
    assert "hides them" in gpus("580.1", one, Answer({"gpus": []}), "13.0", CUDA_VISIBLE_DEVICES="").found
    old = gpus("450.2", one, Answer(problem="RuntimeError: the driver is too old"), "13.0")
    assert old.status == "warning" and "too old" in old.found
    gpu = {"name": "H200", "capability": "9.0", "memory_bytes": 4 * GIB, "free_bytes": GIB}
    refused = {"cuda": "not built", "triton": None}
    half = gpus("580.1", one, Answer({"gpus": [{**gpu, "refused": refused}]}), "13.0")
    assert (half.status, half.subject) == ("warning", "llmpq._cuda")
    nothing = gpus("580.1", one, Answer({"gpus": [{**gpu, "refused": {**refused, "triton": "not there"}}]}), "13.0")
    assert nothing.subject == "cuda:0" and "no kernels: not built; not there" in nothing.found
    file = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\nGCC version: 12.3.0\n"
    assert driver_version({"/proc/driver/nvidia/version": file}.get) == "580.82.07"


def test_a_cache_that_cannot_be_written_is_a_warning_and_temporary_files_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError) as error:
        questions.folder(str(file / "cache"))
    answer = Answer(problem=f"NotADirectoryError: {error.value}")
    found = cache_finding(str(file / "cache"), answer)
    assert found.status == "warning" and "LLMPQ_CACHE" in found.advice and "Not a directory" in found.found
    assert temporary_finding("/tmp", answer).status == "problem"
    assert cache_finding(None, Answer()).status == "warning"
    there = Answer(questions.folder(str(tmp_path / "not" / "yet")))
    assert cache_finding("x", there).status == temporary_finding("x", there).status == "ok"
    assert not (tmp_path / "not").exists()
    assert cache_finding("x", Answer({"free_bytes": 5 * MIB})).status == "warning"


def test_a_solver_that_is_missing_wrong_or_slow() -> None:
    assert solver_finding(Answer({"solver": "HIGHS", "right": True})).status == "ok"
    assert solver_finding(Answer({"solver": "HIGHS", "right": False})).status == "problem"
    assert solver_finding(Answer(problem="ModuleNotFoundError: No module named 'mip'")).status == "problem"
    assert solver_finding(Answer({"solver": "CBC", "right": True})).status == "warning"


def test_interfaces_that_are_down_missing_or_lead_nowhere() -> None:
    ways = {"b": {"address": "10.0.0.1", "interface": "eth0"}, "c": {"problem": "Name or service not known"}}
    answer = Answer({"interfaces": {"lo": True, "eth0": True}, "ways": ways})
    found = list(interface_findings(answer, 2, {}))
    assert only(found, "interfaces").found == "lo, eth0" and "eth0 (10.0.0.1)" in only(found, "to b").found
    assert only(found, "c").status == "problem"
    found = list(interface_findings(answer, 0, {"GLOO_SOCKET_IFNAME": "eth0,ib0"}))  # names, not prefixes
    assert only(found, "gloo").status == "warning" and "lo, eth0" in only(found, "gloo").advice
    assert only(found, "gloo").found.endswith("this host has no ib0")
    assert only(interface_findings(answer, 0, {"GLOO_SOCKET_IFNAME": "eth0"}), "gloo").status == "ok"
    down = Answer({"interfaces": {"lo": False}, "ways": {}})
    assert only(interface_findings(down, 0, {}), "interfaces").status == "problem"


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("eth", "eth0, eth1"),
        ("eth1,ib", "eth1"),
        ("^lo", "eth0, eth1"),
        ("=eth0,lo", "lo, eth0"),
        ("^=lo,eth", "eth0, eth1"),
        ("=eth", None),
        ("^lo,eth", None),
        ("ib0", None),
    ],
)
def test_interfaces_of_nccl_are_prefixes_and_only_matter_among_gpus(wanted: str, chosen: str | None) -> None:
    answer = Answer({"interfaces": {"lo": True, "eth0": True, "eth1": True}, "ways": {}})
    environment = {"NCCL_SOCKET_IFNAME": wanted}
    found = only(interface_findings(answer, 2, environment), "NCCL")
    assert found.status == ("problem" if chosen is None else "ok")
    assert found.found == f"{chosen}, as NCCL_SOCKET_IFNAME={wanted} says" or chosen is None
    for gpus in (0, 1, None):
        assert only(interface_findings(answer, gpus, environment), "NCCL").status == "ok"


def test_packages_that_are_missing_or_too_old() -> None:
    wanted = ["numpy>=999", "no-such-package>=1", "gguf>=0.1", "triton>=99; extra == 'test'"]
    found = list(package_findings(wanted))
    assert only(found, "numpy").status == "problem" and "numpy>=999 is needed" in only(found, "numpy").found
    assert only(found, "no-such-package").status == "problem"
    assert only(found, "gguf").status == only(found, "triton").status == "ok"
    assert [f.subject for f in package_findings(wanted) if f.status != "ok"] == ["numpy", "no-such-package"]


def test_links_are_compared_with_what_the_cluster_says() -> None:
    devices = tuple(
        Device(name, "cpu", host=host) for name, host in (("a", "localhost"), ("b", "localhost"), ("c", "x"))
    )
    fast, slow = (1e-5, 1e9), (1e-2, 1e6)
    links = (Link("a", "b", *fast), Link("b", "a", *slow, emulated=True), Link("b", "c", *slow))
    cluster = Cluster(devices, links)

    def found(*speeds: object) -> dict[str, Finding]:
        answer = Answer({"links": [*speeds]})
        return {finding.subject: finding for finding in link_findings(cluster, ["a", "b"], answer)}

    right = found(["a", "b", *fast], ["b", "a", *fast])
    assert right["a → b"].status == right["b → a"].status == "ok"
    assert right["a → b"].numbers == {"latency_s": 1e-5, "bytes_per_s": 1e9}
    assert "not reachable from here" in right["b → c"].found and "iperf3" in right["b → c"].advice
    assert "a → c" in right["localhost → x"].found and "c → a, c → b" in right["x → localhost"].found
    wrong = found(["a", "b", *slow], ["b", "a", 1.0, 1e6])
    assert "but the cluster file says" in wrong["a → b"].found
    assert "cannot be emulated" in wrong["b → a"].found
    assert found(["a", "b", *fast])["b → a"].found == "not measured: out of time"
    failed = {f.subject: f for f in link_findings(cluster, ["a", "b"], Answer(problem="it was lost"))}
    assert failed["a → b"].found == "not measured: it was lost"
