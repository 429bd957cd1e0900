"""What a host lets a process have, read from the files of hosts that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmpq.host_limits import MemoryLimit, cpu_quota, free_bytes, memory_limit, read_file, usable_cores

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"  # 8 GiB are free
V2 = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "0::/user.slice/job.scope\n",
    "/sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
    "/sys/fs/cgroup/user.slice/job.scope/memory.current": f"{GIB // 2}\n",
    "/sys/fs/cgroup/user.slice/memory.max": f"{2 * GIB}\n",
    "/sys/fs/cgroup/user.slice/memory.current": f"{GIB // 2}\n",
    "/sys/fs/cgroup/user.slice/job.scope/cpu.max": "150000 100000\n",
    "/sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
}
V1 = {  # a container's: its name in the files is the one that it has outside
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
    "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
    "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}
# Of used memory, the system gives up files that were read before. (In version 1, inactive_file is the group's own.)
CACHED_V2 = {**V2, "/sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB // 4}\nactive_file {GIB}\n"}
CACHED_V1 = {
    **V1,
    "/sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB}\n",
}
FREE = {
    "/proc/meminfo": MEMINFO,
    "/proc/self/cgroup": "5:memory:/\n3:cpu:/\n",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
    "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("files", "limit", "free", "quota"),
    [
        (V2, MemoryLimit(2 * GIB, GIB // 2), 3 * GIB // 2, 1.5),
        (V1, MemoryLimit(3 * GIB, GIB), 2 * GIB, 0.5),
        (CACHED_V2, MemoryLimit(2 * GIB, GIB // 4), 7 * GIB // 4, 1.5),
        (CACHED_V1, MemoryLimit(3 * GIB, GIB // 2), 5 * GIB // 2, 0.5),
        (FREE, None, 8 * GIB, None),
        ({"/proc/meminfo": MEMINFO}, None, 8 * GIB, None),
        ({}, None, None, None),
    ],
    ids=["version 2", "version 1", "files in version 2", "files in version 1", "no limits", "no groups", "no Linux"],
)
def test_the_strictest_control_group_counts(
    files: dict[str, str], limit: MemoryLimit | None, free: int | None, quota: float | None
) -> None:
    assert (memory_limit(files.get), free_bytes(files.get), cpu_quota(files.get)) == (limit, free, quota)


def test_this_host_is_read() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
    free = free_bytes()
    assert free is not None and 0 < free <= total * 1024
    assert usable_cores() >= 1
    assert read_file("/proc/there/is/none") is None
