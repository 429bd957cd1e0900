"""This machine's devices: how much memory each has free, and which of torch's devices each is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from llmpq.spec import Cluster, Device, UsageError

_IDLE_WORKER_BYTES = 300 * 2**20  # what a CPU worker takes before it loads anything, with room to spare
_LEAST_BYTES = 2**20  # of a cap, where nothing is free: too little for any plan, as it will say


def use(device: Device) -> torch.device:
    """Make a device this process's own: its threads, or the current GPU. Raises UsageError for a missing GPU."""
    if device.kind == "cpu":
        torch.set_num_threads(device.threads)
        return torch.device("cpu")
    check_present(device)
    torch.cuda.set_device(device.index)
    return torch.device("cuda", device.index)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_present(device: Device) -> None:
    """Raise UsageError for a GPU that this machine lacks."""
    if device.kind == "cuda" and device.index >= torch.cuda.device_count():
        raise UsageError(f"device cuda:{device.index} does not exist here; there are {torch.cuda.device_count()}")


def with_memory(cluster: Cluster) -> Cluster:
    """The cluster with a cap on every device.

    CPUs without one share what is free beyond the others' caps and the workers themselves; a GPU gets 90 % of what is
    free on it. Raises UsageError for a missing GPU.
    """
    cpus = [device for device in cluster.devices if device.kind == "cpu"]
    uncapped = sum(device.memory_bytes is None for device in cpus)
    share = 0
    if uncapped:
        taken = sum(device.memory_bytes or 0 for device in cpus) + _IDLE_WORKER_BYTES * len(cpus)
        share = max(_LEAST_BYTES, (_free_bytes() - taken) // uncapped)

    def cap(device: Device) -> int:
        if device.memory_bytes is not None:
            return device.memory_bytes
        if device.kind == "cpu":
            return share
        check_present(device)
        return int(0.9 * torch.cuda.mem_get_info(device.index)[0])

    return replace(cluster, devices=tuple(replace(device, memory_bytes=cap(device)) for device in cluster.devices))


def same_devices(described: Cluster, planned: Cluster) -> bool:
    """Whether a plan's devices are those of a description, which may leave caps open."""
    if len(described.devices) != len(planned.devices):
        return False
    pairs = zip(described.devices, planned.devices, strict=True)
    return all(d == (p if d.memory_bytes is not None else replace(p, memory_bytes=None)) for d, p in pairs)


def _free_bytes() -> int:
    """Memory this machine could still give to processes, in bytes (Linux), within the limits of its control group."""
    available = _first_number("/proc/meminfo", "MemAvailable:")
    if available is None:
        raise UsageError("the free memory of this system is unknown; give each device memory=SIZE")
    free = available * 1024
    limit, used = _first_number("/sys/fs/cgroup/memory.max"), _first_number("/sys/fs/cgroup/memory.current")
    return free if limit is None or used is None else min(free, limit - used)


def _first_number(path: str, start: str = "") -> int | None:
    """The number after `start` in the first line of a file that begins with it; None where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    words = [line.removeprefix(start).split()[0] for line in lines if line.startswith(start) and line.strip()]
    return int(words[0]) if words and words[0].isdigit() else None
