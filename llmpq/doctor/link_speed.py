"""The links of a cluster: measured where both ends are on this host, else what to run."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

from llmpq.doctor.finding import Finding, ok, warning
from llmpq.doctor.probing import Answer
from llmpq.runtime.launch import Program, device_environment
from llmpq.runtime.peers import among_us
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import Cluster, Device, Link
from llmpq.spec.formatting import format_bytes, format_seconds
from llmpq.temporary import working_folder

LARGE_BYTES = 8 * 2**20  # of the message by which bandwidth is measured
_MESSAGE_BYTES = 2**20  # by which links are compared: hidden states of a prefill step
_FACTOR = 2.0  # that what a file says may be off by


class Speed(NamedTuple):
    """Of a link, as `Link` has it."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, size: float) -> float:
        return self.latency_s + size / self.bytes_per_s

    def __str__(self) -> str:
        return f"{format_bytes(self.bytes_per_s)}/s, latency {format_seconds(self.latency_s)}"


def measure(devices: Sequence[Device], seconds: float) -> dict[tuple[str, str], Speed]:
    """Links between devices of this host, from a process on each; as many as can be had in about that time.

    Raises LlmpqError if a process fails.
    """
    until = time.monotonic() + seconds
    found: dict[tuple[str, str], Speed] = {}
    with working_folder() as folder:
        described = json.dumps([device.to_dict() for device in devices])
        common = ("--devices", described, "--store", f"file:{folder / 'store'}")
        transports = among_us()
        programs = [
            Program(
                f"the process on {device.name}",
                "llmpq.doctor.link_worker",
                (*common, "--rank", str(rank)),
                device_environment(device, 1) | transports,
            )
            for rank, device in enumerate(devices)
        ]
        with WorkerGroup(programs) as group:
            group.await_start(lambda step=None, /: None)
            for source, target in permutations(range(len(devices)), 2):
                if time.monotonic() > until:
                    break
                found[devices[source].name, devices[target].name] = _measured(group, source, target)
    return found


def _measured(group: WorkerGroup, source: int, target: int) -> Speed:
    for rank in (source, target):
        group.workers[rank].send("exchange", source=source, target=target)
    events = [group.receive()[1] for _ in range(2)]
    small_s, large_s = next((event["small_s"], event["large_s"]) for event in events if event["source"])
    # The large one's answer is a small message, too, and so is half of the small ones' time.
    return Speed(small_s / 2, LARGE_BYTES / max(large_s - small_s, 1e-9))


def link_findings(cluster: Cluster, here: Collection[str], answer: Answer) -> Iterator[Finding]:
    """`here`: the names of devices on this host; `answer`: the speeds between them, or why there are none."""
    given = {(link.source, link.target): link for link in cluster.links}
    measured = {(a, b): Speed(*speed) for a, b, *speed in answer.values.get("links", ())}
    unknown: dict[tuple[str, str], list[str]] = {}  # of hosts: links of which nothing is known
    for source, target in permutations(cluster.devices, 2):
        ends, hosts = (source.name, target.name), (source.host, target.host)
        name, link = " → ".join(ends), given.get(ends)
        if ends in measured:
            yield _compared(name, measured[ends], link)
        elif set(ends) <= set(here):
            why = answer.problem or "out of time"
            yield warning("links", name, f"not measured: {why}", "run it again when less runs here")
        elif link is not None:
            speed = Speed(link.latency_s, link.bytes_per_s)
            found = f"not reachable from here; the cluster file says {speed}"
            yield ok("links", name, found, _numbers(speed), _how_to_measure(*hosts))
        else:
            unknown.setdefault(hosts, []).append(name)
    for hosts, names in unknown.items():
        found = f"not reachable from here, and the cluster file does not say how fast {', '.join(names)} is"
        yield warning("links", " → ".join(hosts), found, _how_to_measure(*hosts))


def _how_to_measure(source: str, target: str) -> str:
    """A link between devices of two hosts, or of one that is not this one."""
    if source == target:
        return f"run `llmpq doctor --cluster FILE` on {source}"
    return (
        f"run `iperf3 -s` on {target}, and on {source} `iperf3 -c ADDRESS` and `ping ADDRESS` with the address of "
        f"{target}; write bytes_per_s, and half of ping's time as latency_s, into the cluster file"
    )


def _compared(name: str, speed: Speed, given: Link | None) -> Finding:
    if given is None:
        return ok("links", name, str(speed), _numbers(speed))
    said = Speed(given.latency_s, given.bytes_per_s)
    ratio = speed.seconds(_MESSAGE_BYTES) / said.seconds(_MESSAGE_BYTES)
    if given.emulated and ratio > 1:
        advice = "describe a slower link: an emulated one only holds messages back"
        return warning("links", name, f"{speed}; it cannot be emulated as {said}", advice, _numbers(speed))
    if given.emulated:
        return ok("links", name, f"{speed}; held back to {said}, as emulated", _numbers(speed))
    if not 1 / _FACTOR <= ratio <= _FACTOR:
        advice = "correct the cluster file, or leave the link out: then it is measured for each plan"
        return warning("links", name, f"{speed}, but the cluster file says {said}", advice, _numbers(speed))
    return ok("links", name, f"{speed}; the cluster file says {said}", _numbers(speed))


def _numbers(speed: Speed) -> dict[str, float]:
    return {"latency_s": speed.latency_s, "bytes_per_s": speed.bytes_per_s}
