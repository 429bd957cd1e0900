"""What this host lets a process have: cores, time on them, memory. No torch.

`read` stands for reading a file of the system, so that tests can tell of other hosts. Control groups are Linux's
(cgroup-v2.rst and cgroup-v1 of its documentation): each may limit those below it, and the strictest limit counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

Read = Callable[[str], str | None]  # the text of a file; None where it cannot be read

IDLE_WORKER_BYTES = 300 * 2**20  # what a CPU worker takes before it loads anything, with room to spare
_GROUPS = "/sys/fs/cgroup"
_UNLIMITED = 2**60  # version 1 writes a number about 2^63 where there is no limit


class MemoryLimit(NamedTuple):
    """Of a control group, in bytes."""

    limit: int
    used: int  # but for cached files that have not been read of late, which the system gives up

    @property
    def left(self) -> int:
        return max(0, self.limit - self.used)


def read_file(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota(read: Read = read_file) -> float | None:
    """How many cores' time control groups allow, of however many cores; None: all of it."""
    quotas = []
    for folder in _folders(read, "cpu"):
        both = (read(f"{folder}/cpu.max") or "").split()
        quota, period = (
            both if len(both) == 2 else (read(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
        )
        if (quota_us := _number(quota)) is not None and (period_us := _number(period)):
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def memory_limit(read: Read = read_file) -> MemoryLimit | None:
    """Of the control group that leaves the least memory; None: none limits it."""
    found = []
    for folder in _folders(read, "memory"):
        for limit_file, used_file, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = (_number(read(f"{folder}/{name}")) for name in (limit_file, used_file))
            if limit is not None and used is not None and limit < _UNLIMITED:
                found.append(MemoryLimit(limit, max(0, used - _stat(read(f"{folder}/memory.stat"), cached))))
    return min(found, key=lambda limit: limit.left, default=None)


def available_bytes(read: Read = read_file) -> int | None:
    """Memory that the system could still give to processes, whatever control groups say; None if that is not known."""
    lines = (read("/proc/meminfo") or "").splitlines()
    words = next((line.split() for line in lines if line.startswith("MemAvailable:")), [])
    return int(words[1]) * 1024 if len(words) > 1 and words[1].isdigit() else None


def free_bytes(read: Read = read_file) -> int | None:
    """Memory that this process could still get; None if that is not known."""
    available, limit = available_bytes(read), memory_limit(read)
    return available if available is None or limit is None else min(available, limit.left)


def _folders(read: Read, controller: str) -> Iterator[str]:
    """Where the limits of this process's control group and those above it stand; some may not be there.

    A container sees its own group as the uppermost, but in version 1 under the name that it has outside.
    """
    for line in (read("/proc/self/cgroup") or "").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inner = PurePosixPath(path.strip().lstrip("/"))
        for base in (_GROUPS,) if not controllers else (f"{_GROUPS}/{controllers}", f"{_GROUPS}/{controller}"):
            yield from (str(PurePosixPath(base) / part) for part in (inner, *inner.parents))


def _stat(text: str | None, name: str) -> int:
    """A number of a file with a name and a number to a line; 0 where it has none of that name."""
    pairs = (line.split() for line in (text or "").splitlines())
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == name and pair[1].isdigit()), 0)


def _number(text: str | None) -> int | None:
    """None for `max` and -1, too: there is no limit."""
    return int(text) if text is not None and text.strip().isdigit() else None
