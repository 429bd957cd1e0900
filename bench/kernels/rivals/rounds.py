"""Time several contenders in turn, when nothing else runs: neither other processes nor the threads of the last one."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

SHORTEST = 2e-3  # seconds that are timed at once at least
WARM = 20e-3  # seconds that several threads work before they are timed
FOREIGN_CORES = 0.05  # how much of a core others may use during a round
STEADY = 0.8  # of the best pace; AMX has a state at a quarter to a half of it, two processors on one core at two thirds
RETRIES = 2  # rounds to make for one that was disturbed
PATIENCE = 60.0  # seconds to wait for others in all
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")  # of /proc/stat


def _busy_seconds() -> float | None:
    """CPU seconds of everything on this machine, and those its host took away. None: the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _wait, *others = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(others)) / _TICKS_PER_S


def _settle() -> None:
    """Return when the threads of whoever was timed last have stopped spinning."""
    for _ in range(200):
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 0.2e-3:
            return


def _timed(sweep: Callable[[], object], repeats: int, warm: float) -> float:
    """Seconds of one sweep, of so many, after `warm` seconds of them."""
    _settle()
    start = time.perf_counter()
    while time.perf_counter() - start < warm:
        sweep()
    start = time.perf_counter()
    for _ in range(repeats):
        sweep()
    return (time.perf_counter() - start) / repeats


class _Load:
    """How many cores other processes use from when this is made. `own` gives the CPU seconds of those that are ours."""

    def __init__(self, own: Callable[[], float]) -> None:
        self._own = own
        self._start = (_busy_seconds(), own(), time.perf_counter())

    def foreign(self) -> float:
        """Less what /proc/stat may be off by."""
        busy, own, now = self._start
        busy_now, elapsed = _busy_seconds(), time.perf_counter() - now
        if busy is None or busy_now is None:
            return 0.0
        return max(0.0, busy_now - busy - (self._own() - own) - 1 / _TICKS_PER_S) / elapsed


def await_quiet(seconds: float, own: Callable[[], float] = time.process_time) -> None:
    """Return when processes that are not ours have paused, or after so many seconds."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        load = _Load(own)
        time.sleep(0.5)
        if load.foreign() <= FOREIGN_CORES:
            return


@dataclass(frozen=True)
class _Round(Generic[T]):
    result: T
    foreign: float  # cores that others used
    slowest: float  # pace that was seen

    def disturbed(self, best_pace: float) -> bool:
        return self.foreign > FOREIGN_CORES or self.slowest < STEADY * best_pace


def time_rounds(
    sweeps: Mapping[str, Callable[[], object]], rounds: int, threads: int, pace: Callable[[], float] = lambda: 0.0
) -> tuple[dict[str, list[float]], int, float]:
    """Seconds of each sweep in every round, how many of the rounds were disturbed, and the best pace seen.

    `pace` tells how fast the processor is now, and is asked before and after each sweep: a round in which it is ever
    much slower than at its best counts as disturbed, as one does in which others work.

    The order is shuffled in every round. Several threads get a moment to spread over the cores before each is timed:
    those that have slept may wake on one core, which they leave only some milliseconds later.
    """
    warm = WARM if threads > 1 else 0.0
    repeats = {name: max(1, round(SHORTEST / _timed(sweep, 1, warm))) for name, sweep in sweeps.items()}
    order = list(sweeps)
    shuffle = random.Random(0).shuffle
    paces: list[float] = []

    def once() -> dict[str, float]:
        shuffle(order)
        paces.append(pace())
        seconds = {}
        for name in order:
            seconds[name] = _timed(sweeps[name], repeats[name], warm)
            paces.append(pace())
        return seconds

    kept, disturbed = quietest(once, rounds, paces=paces)
    return {name: [seconds[name] for seconds in kept] for name in sweeps}, disturbed, max(paces)


def quietest(
    once: Callable[[], T], rounds: int, own: Callable[[], float] = time.process_time, paces: Sequence[float] = ()
) -> tuple[list[T], int]:
    """What `once` returned in the quietest rounds, and how many of these were disturbed.

    More rounds than asked for are made if some are disturbed. `own` gives the CPU seconds of processes that are ours.
    `paces`: to which `once` adds, if it does, how fast the processor was.
    """
    made: list[_Round[T]] = []
    quiet, patience, best = 0, PATIENCE, 0.0
    while quiet < rounds and len(made) < rounds * (1 + RETRIES):
        if len(made) > quiet and patience > 0:
            start = time.perf_counter()
            await_quiet(patience, own)
            patience -= time.perf_counter() - start
        load, before = _Load(own), len(paces)
        result = once()
        made.append(_Round(result, load.foreign(), min(paces[before:], default=0.0)))
        best = max(paces, default=0.0)
        quiet = sum(not one.disturbed(best) for one in made)
    kept = sorted(made, key=lambda one: (one.disturbed(best), one.foreign))[:rounds]
    return [one.result for one in kept], sum(one.disturbed(best) for one in kept)
