"""The processes that descend from one: what they use of the processors, and how all of them are stopped at once."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")  # of /proc/PID/stat
_AWAKE_S = 0.1  # for what a process does first when it may go on, such as saying that it is still there


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    seconds: float  # on a core


def _processes() -> dict[int, _Process]:
    """All of this machine, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()  # from the state on: the name may have spaces
            found[int(path.parent.name)] = _Process(int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
    return found


def _descendants(pid: int, processes: Mapping[int, _Process]) -> list[int]:
    """Those that are alive, parents before their children."""
    children: dict[int, list[int]] = {}
    for child, process in processes.items():
        children.setdefault(process.parent, []).append(child)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found[1:]


def _signal(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and to all that descend from it."""
    for one in [pid, *_descendants(pid, _processes())]:
        with suppress(ProcessLookupError):
            os.kill(one, number)


def stop(pid: int) -> None:
    """Stop a process and all that descend from it, until `go_on`.

    The threads of an engine that poll or spin while they have nothing to do take time from whoever is measured.
    """
    _signal(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    _signal(pid, signal.SIGCONT)


@contextmanager
def awake(pid: int) -> Iterator[None]:
    """A process that was stopped goes on in the context, with what descends from it, and is stopped again after it."""
    go_on(pid)
    time.sleep(_AWAKE_S)
    try:
        yield
    finally:
        stop(pid)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM raises SystemExit in the context: who is killed cannot end what he has stopped."""
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_seconds() -> float:
    """CPU seconds of this process and of all that descend from it and are alive."""
    processes = _processes()
    return time.process_time() + sum(processes[pid].seconds for pid in _descendants(os.getpid(), processes))


def settle(seconds: Sequence[float] = (0.05,) * 40) -> None:
    """Return when the threads of whoever answered last have stopped spinning, or after two seconds."""
    for pause in seconds:
        before = own_seconds()
        time.sleep(pause)
        if own_seconds() - before <= 1 / _TICKS_PER_S:
            return
