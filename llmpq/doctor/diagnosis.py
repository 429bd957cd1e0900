"""Asks everything at once, waits for no answer longer than there is time, and puts the findings in order."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from llmpq import cache
from llmpq.doctor.capacity import capacity_findings, device_findings
from llmpq.doctor.finding import Diagnosis, Finding, warning
from llmpq.doctor.gpus import driver_version, gpu_findings
from llmpq.doctor.link_speed import link_findings
from llmpq.doctor.packages import package_findings
from llmpq.doctor.probing import Answer, Probe, asking
from llmpq.doctor.processor import processor_findings, wants_amx
from llmpq.doctor.surroundings import cache_finding, interface_findings, solver_finding, temporary_finding
from llmpq.host_limits import Read, read_file, usable_cores
from llmpq.progress import Notify, silent
from llmpq.spec import Cluster

_MEASURING = 0.7  # of the time that is left: until then another link may be begun
_SMI = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


@dataclass(frozen=True)
class Times:
    """Seconds. All of it takes no more than `total` and a moment."""

    answers: float = 12.0
    total: float = 18.0


TIMES = Times()


def diagnose(cluster: Cluster | None = None, *, read: Read = read_file, notify: Notify = silent) -> Diagnosis:
    """Look at this host, and at what a cluster describes of it. Measures links if that names two devices here.

    `read`: files of the system; see llmpq/host_limits.py.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        asked = _Asked(stack, cluster, read)
        notify("asking torch, the kernels, the solver and the system")
        answers = asked.answers(began + TIMES.answers)
        findings = [*_host_findings(answers, read)]
        if cluster is not None:
            findings += _cluster_findings(cluster, answers, stack, began + TIMES.total, read, notify)
    return Diagnosis(tuple(findings), time.monotonic() - began)


class _Asked:
    """All questions that do not wait for another's answer, asked."""

    def __init__(self, stack: ExitStack, cluster: Cluster | None, read: Read) -> None:
        hosts = () if cluster is None else sorted({device.host for device in cluster.devices} - {"localhost"})
        folder = cache.folder()
        self._stack, self._probes = stack, dict[str, Probe]()
        self._ask("torch", asking("torch_build"))
        self._ask("kernels", asking("kernels"))
        self._ask("cpu", asking("module", "llmpq._cpu"))
        self._ask("cuda", asking("module", "llmpq._cuda"))
        self._ask("solver", asking("solver"))
        self._ask("network", asking("network", *hosts))
        self._ask("temporary", asking("folder", tempfile.gettempdir()))
        if folder is not None:
            self._ask("cache", asking("folder", str(folder)))
        if wants_amx(read):
            self._ask("amx", asking("module", "llmpq._cpu", environment={"LLMPQ_ISA": "amx"}))
        smi = shutil.which("nvidia-smi")
        if smi is not None:
            self._ask("smi", Probe([smi, *_SMI]))
        if smi is not None or driver_version(read) is not None:
            self._ask("gpus", asking("visible_gpus"))

    def _ask(self, name: str, probe: Probe) -> None:
        self._probes[name] = self._stack.enter_context(probe)

    def answers(self, until: float) -> dict[str, Answer]:
        return {
            name: probe.text(until) if name == "smi" else probe.answer(until) for name, probe in self._probes.items()
        }


def _gpu_count(answers: Mapping[str, Answer]) -> int | None:
    """How many torch sees; None if it has not said so in time."""
    answer = answers.get("gpus", Answer())
    return None if answer.late else len(answer.values.get("gpus", ()))


def _host_findings(answers: Mapping[str, Answer], read: Read) -> Iterator[Finding]:
    yield from package_findings()
    yield from processor_findings(answers["cpu"], answers.get("amx"), answers["torch"], answers["kernels"], read)
    yield from capacity_findings(usable_cores(), read)
    smi, seen = answers.get("smi"), answers.get("gpus")
    yield from gpu_findings(driver_version(read), smi, seen, answers["cuda"], answers["torch"])
    yield solver_finding(answers["solver"])
    folder = cache.folder()
    yield cache_finding(None if folder is None else str(folder), answers.get("cache", Answer()))
    yield temporary_finding(tempfile.gettempdir(), answers["temporary"])
    yield from interface_findings(answers["network"], _gpu_count(answers))


def _cluster_findings(
    cluster: Cluster, answers: Mapping[str, Answer], stack: ExitStack, until: float, read: Read, notify: Notify
) -> Iterator[Finding]:
    """Of its devices that are on this host, and its links."""
    ways = answers["network"].values.get("ways", {})
    here = [d for d in cluster.devices if d.host == "localhost" or ways.get(d.host, {}).get("here")]
    widest = answers["amx" if "amx" in answers else "cpu"].values.get("isa")
    findings = list(device_findings(here, usable_cores(), _gpu_count(answers), widest, read))
    yield from findings
    absent = {finding.subject for finding in findings if finding.status == "problem"}
    absent |= {device.name for device in cluster.devices if device.members > 1}  # only planned for
    measurable = [device for device in here if device.name not in absent]
    answer = Answer()
    if answers["torch"].problem:
        answer = Answer(problem=f"it takes torch ({answers['torch'].problem})")
    elif len(measurable) > 1:
        notify("measuring the links between devices of this host")
        described = json.dumps([device.to_dict() for device in measurable])
        left = max(0.0, until - time.monotonic())
        probe = stack.enter_context(asking("links", described, str(_MEASURING * left)))
        answer = probe.answer(until)
    known = [device for device in cluster.devices if device.name not in absent]
    if known:
        links = tuple(link for link in cluster.links if not {link.source, link.target} & absent)
        yield from link_findings(Cluster(tuple(known), links), [device.name for device in measurable], answer)
    if not here:
        hosts = ", ".join(sorted({device.host for device in cluster.devices}))
        if answers["network"].problem:
            found, advice = f"whether it is one of {hosts} is not known", "see the line on interfaces"
        else:
            found, advice = f"no device of the cluster is here, but on {hosts}", "run it there"
        yield warning("devices", "this host", found, advice)
