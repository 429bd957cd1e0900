"""This machine's devices: how much memory each has free, and which of torch's devices each is."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from llmpq.host_limits import IDLE_WORKER_BYTES, free_bytes
from llmpq.spec import Cluster, Device, UsageError

_IDLE_GPU_WORKER_BYTES = 512 * 2**20  # of a GPU's memory: the CUDA context; an estimate, not yet measured
_GPU_SHARE = 0.9  # of what is free on a GPU
_LEAST_BYTES = 2**20  # of a cap, where nothing is free: too little for any plan, as it will say


def use(device: Device) -> torch.device:
    """Make a device this process's own: its threads, or the current GPU. Raises UsageError for a missing GPU."""
    if device.kind == "cpu":
        torch.set_num_threads(device.threads)
        return torch.device("cpu")
    check_present(device)
    torch.cuda.set_device(device.index)
    return torch.device("cuda", device.index)


def check_present(device: Device) -> None:
    """Raise UsageError for a GPU that this machine lacks."""
    if device.kind == "cuda" and device.index >= torch.cuda.device_count():
        raise UsageError(f"device cuda:{device.index} does not exist here; there are {torch.cuda.device_count()}")


def with_memory(cluster: Cluster) -> Cluster:
    """The cluster with a cap on every device.

    Those without one share what is free beyond the others' caps and the workers themselves: CPUs the machine's memory,
    devices on one GPU 90 % of what is free on it. Raises UsageError for a missing GPU.
    """

    @functools.cache
    def share(kind: str, index: int) -> int:
        beside = [device for device in cluster.devices if (device.kind, device.index) == (kind, index)]
        if kind == "cpu":
            free, idle = _free_bytes(), IDLE_WORKER_BYTES
        else:
            check_present(beside[0])
            free, idle = int(_GPU_SHARE * torch.cuda.mem_get_info(index)[0]), _IDLE_GPU_WORKER_BYTES
        taken = sum(device.memory_bytes or 0 for device in beside) + idle * len(beside)
        return max(_LEAST_BYTES, (free - taken) // sum(device.memory_bytes is None for device in beside))

    caps = [share(d.kind, d.index) if d.memory_bytes is None else d.memory_bytes for d in cluster.devices]
    devices = tuple(replace(device, memory_bytes=cap) for device, cap in zip(cluster.devices, caps, strict=True))
    return replace(cluster, devices=devices)


def same_devices(described: Cluster, planned: Cluster) -> bool:
    """Whether a plan's devices are those of a description, which may leave caps open."""
    if len(described.devices) != len(planned.devices):
        return False
    pairs = zip(described.devices, planned.devices, strict=True)
    return all(d == (p if d.memory_bytes is not None else replace(p, memory_bytes=None)) for d, p in pairs)


def _free_bytes() -> int:
    """Memory this machine could still give to processes, in bytes (Linux), within the limits of its control groups."""
    free = free_bytes()
    if free is None:
        raise UsageError("the free memory of this system is unknown; give each device memory=SIZE")
    return free
