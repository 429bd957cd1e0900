"""How much memory a worker uses above its idle self, and its device's cap on that.

On a CPU that is anonymous resident memory: pages of its own, not those of files it maps. It is sampled, so a cap is
held twice: a limit on the data segment makes the allocation that would break it fail (Linux), and a sampler notices
pages that the limit let through. Systems without /proc only know the peak of all resident memory, and have no limit
that works: there, caps hold as often as they are sampled.

On a GPU it is what torch's allocator has reserved, which the cap limits, and what others than this allocator take:
modules, graphs, buffers of NCCL. Of these only the sum of all processes on the GPU is known. What it has grown by since
the worker was idle counts as the worker's if no other stage is there; else it does not count.
"""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llmpq.host_limits import free_bytes
from llmpq.runtime.control import Status
from llmpq.spec import Device, DeviceMemoryError
from llmpq.spec.formatting import format_bytes

_PERIOD_S = 0.025
_PAGE = resource.getpagesize()
# The limit counts reserved addresses, touched or not: stacks of threads still to start, and the allocator's reserve.
_SLACK_PER_THREAD = 8 * 2**20
_SLACK = 16 * 2**20


def resident_bytes() -> int:
    """Anonymous resident memory of this process; where there is no /proc, the peak of all resident memory."""
    try:
        with open("/proc/self/statm") as file:
            fields = file.read().split()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (int(fields[1]) - int(fields[2])) * _PAGE


def _data_bytes() -> int:
    """What the limit on the data segment counts (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmData in /proc/self/status")


def _outside_allocator(index: int) -> int:
    """Bytes in use on a GPU, by all processes, less what this one's allocator has reserved."""
    free, total = torch.cuda.mem_get_info(index)
    return total - free - torch.cuda.memory_reserved(index)


def is_failed_allocation(error: BaseException) -> bool:
    """Whether there was no memory for something."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        re.search("can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory", str(error))
    )


class MemoryWatch:
    """Watches one worker from the moment it is made, when it counts as idle."""

    def __init__(
        self,
        device: Device,
        worker: str,
        status: Status,
        on_excess: Callable[[DeviceMemoryError], None],
        *,
        alone: bool = True,
    ) -> None:
        """`worker` is its name in messages; `on_excess` is called once, from a thread, with an error to report.

        `alone`: no other stage is on this GPU.
        """
        self._device, self._worker, self._status, self._on_excess = device, worker, status, on_excess
        self._cuda = device.kind == "cuda"
        self.idle_bytes = 0 if self._cuda else resident_bytes()
        self._idle_outside = _outside_allocator(device.index) if self._cuda and alone else None
        self._lock = threading.Lock()  # of the peak and the cap: a worker begins anew while the thread looks
        self._peak, self._cap = 0, device.memory_bytes
        self._limited = False
        self._limit()
        threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def lift(self) -> None:
        """Nothing is limited on a CPU until `renew`, and the peak so far does not count."""
        with self._lock:
            self._peak, self._cap = 0, None
        if self._limited:
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))

    def renew(self, device: Device, worker: str, held_bytes: int) -> None:
        """The worker of a CPU begins anew by this name, holding so much above its idle self."""
        with self._lock:
            self._device, self._worker = device, worker
            self._peak, self._cap = 0, device.memory_bytes
        self._limit(held_bytes)

    def _limit(self, held_bytes: int = 0) -> None:
        """Limit memory to the device's cap."""
        device, cap = self._device, self._device.memory_bytes
        if cap is not None and self._cuda:
            total = torch.cuda.get_device_properties(device.index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device.index)
        elif cap is not None and sys.platform == "linux":
            self._idle_data = _data_bytes() - held_bytes
            limit = self._idle_data + cap + _SLACK + device.threads * _SLACK_PER_THREAD
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
            self._limited = True

    def _watch(self) -> None:
        while True:
            time.sleep(_PERIOD_S)
            if (error := self._excess()) is not None:
                self._on_excess(error)
                return

    def _excess(self) -> DeviceMemoryError | None:
        """An error to report if the peak is above the cap."""
        with self._lock:
            peak = self._look()
            return self._error(peak) if self._cap is not None and peak > self._cap else None

    def _allocated(self) -> int:
        """The peak above idle so far of what is limited, in bytes, the present included."""
        with self._lock:
            return self._look()

    def _look(self) -> int:
        """The same, for who has the lock: what is seen before a worker begins anew must not count after it."""
        now = torch.cuda.max_memory_reserved(self._device.index) if self._cuda else resident_bytes() - self.idle_bytes
        self._peak = self._status.memory_bytes = max(self._peak, now)
        return self._peak

    def sample(self) -> int:
        """The peak above idle so far, in bytes, the present included."""
        if self._idle_outside is None:
            return self._allocated()
        # Not for each look of the thread: the driver may have others wait meanwhile.
        return self._allocated() + max(0, _outside_allocator(self._device.index) - self._idle_outside)

    def explain(self, error: BaseException) -> DeviceMemoryError | None:
        """An error for the user if `error`, or what it was raised from, is a failed allocation, else None."""
        if (cause := error.__cause__) is not None and (explained := self.explain(cause)) is not None:
            return explained
        if not is_failed_allocation(error):
            return None
        tried = re.search(r"tried to allocate (\d+) bytes", str(error))
        reserved = _data_bytes() - self._idle_data if self._limited else self.sample()
        return self._error(reserved + (int(tried[1]) if tried else 0))

    def _error(self, needed: int) -> DeviceMemoryError:
        cap = self._device.memory_bytes
        if cap is not None:
            what = f"its cap is {format_bytes(cap)}"
        else:
            free = torch.cuda.mem_get_info(self._device.index)[0] if self._cuda else free_bytes()
            what = "the system has no more" if free is None else f"{format_bytes(free)} are available"
        return DeviceMemoryError(
            f"{self._worker} ran out of memory while {self._status.doing}: it needs at least {format_bytes(needed)} "
            f"above the idle worker, {what}; give {self._device.name} more memory, or plan for it again"
        )
