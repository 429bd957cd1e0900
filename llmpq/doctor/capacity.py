"""How much of this host's cores and memory runs may have, and whether what a cluster file describes is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import get_args

from llmpq.doctor.finding import Finding, ok, problem, warning
from llmpq.host_limits import IDLE_WORKER_BYTES, Read, available_bytes, cpu_quota, free_bytes, memory_limit, read_file
from llmpq.spec import Device
from llmpq.spec.cluster import Isa
from llmpq.spec.formatting import format_bytes

_ISAS = get_args(Isa)  # in increasing width
_ROOM_BYTES = 2**30  # the demo takes about as much, its two processes included


def capacity_findings(usable: int, read: Read = read_file, present: int | None = None) -> Iterator[Finding]:
    """`usable` cores of the `present` ones may be used."""
    yield _cores(usable, read, present or os.cpu_count() or usable)
    yield _memory(read)


def device_findings(
    devices: Sequence[Device], usable: int, gpus: int | None, widest: Isa | None, read: Read = read_file
) -> Iterator[Finding]:
    """Whether devices that are to be on this host can be there together.

    It has so many cores that may be used and so many GPUs, None if torch did not say so in time; the kernels have
    instruction sets up to `widest`.
    """
    threads = sum(device.threads for device in devices if device.kind == "cpu")
    caps = sum(device.memory_bytes or 0 for device in devices if device.kind == "cpu")
    idle = IDLE_WORKER_BYTES * sum(device.kind == "cpu" for device in devices)
    free = free_bytes(read)
    for device in devices:
        where = (
            f"cuda:{device.index}" if device.kind == "cuda" else f"{device.threads} thread{'s' * (device.threads > 1)}"
        )
        if device.kind == "cuda" and gpus is None:
            found = f"whether {where} is here is not known: torch has not answered"
            yield warning("devices", device.name, found, "run it again, or see the lines on GPUs")
        elif device.kind == "cuda" and gpus is not None and device.index >= gpus:
            found = f"{where} is not here; torch sees {gpus} GPUs"
            yield problem("devices", device.name, found, "correct its index, or see the lines on GPUs")
        elif device.members > 1:
            found = f"stands for {device.members} devices that share a stage"
            yield warning(
                "devices", device.name, found, "list each by itself: such groups are planned for, but not run"
            )
        elif device.isa is not None and widest is not None and _ISAS.index(device.isa) > _ISAS.index(widest):
            found = f"is to use {device.isa}, and would use {widest}, the widest there is here"
            yield warning(
                "devices", device.name, found, "correct its isa, or profiles and plans are for another device"
            )
        else:
            yield ok("devices", device.name, f"here: {where}")
    if threads > usable:
        found = f"the CPUs have {threads} threads in all, but {usable} cores may be used"
        yield warning("devices", "threads", found, "give them fewer; threads that share a core wait for each other")
    if free is not None and caps + idle > free:
        found = (
            f"the CPUs' caps and idle processes add up to {format_bytes(caps + idle)}, and {format_bytes(free)} is free"
        )
        numbers = {"caps_bytes": float(caps + idle), "free_bytes": float(free)}
        yield warning("devices", "memory", found, "lower the caps, or runs may end for want of memory", numbers)


def _cores(usable: int, read: Read, present: int) -> Finding:
    quota = cpu_quota(read)
    found = f"{usable} of {present} may be used" if usable < present else f"{usable}"
    if quota is not None and quota < usable:
        found += f", for the time of {quota:g} (control group)"
        advice = f"give devices threads={max(1, int(quota))} in all, or raise the quota; threads beyond it are stopped"
        return warning("capacity", "cores", found, advice, {"cores": usable, "quota": quota})
    return ok("capacity", "cores", found, {"cores": usable})


def _memory(read: Read) -> Finding:
    free, available, group = free_bytes(read), available_bytes(read), memory_limit(read)
    if free is None:
        return warning("capacity", "memory", "this system does not say what is free", "give each device memory=SIZE")
    limited = group is not None and available is not None and group.left < available
    numbers = {"free_bytes": float(free)}
    found = f"{format_bytes(free)} free"
    advice = "end other programs"
    if group is not None and limited:
        found += f" of the {format_bytes(group.limit)} that the control group may have"
        numbers["limit_bytes"] = float(group.limit)
        advice = "raise the limit of the control group (docker run --memory, systemd's MemoryMax)"
    if free < IDLE_WORKER_BYTES:
        needed = format_bytes(IDLE_WORKER_BYTES)
        return problem("capacity", "memory", f"{found}, and an idle worker process takes {needed}", advice, numbers)
    if free < _ROOM_BYTES:
        found += f"; two processes and the demo take {format_bytes(_ROOM_BYTES)}"
        return warning("capacity", "memory", found, f"{advice}, or expect plans for a single small device", numbers)
    return ok("capacity", "memory", found, numbers)
