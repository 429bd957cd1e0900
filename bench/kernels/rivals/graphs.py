"""Time several contenders in turn on a GPU, each as a CUDA graph of many calls over copies of its weight.

A graph leaves out what the host does for every call, and the copies leave nothing of a weight in the cache. All that
depends on the device is in a Clock, so that what is here runs without one, too.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from bench.kernels.rivals.timing import Checked, Timing, WrongProductError

CALLS = 20  # in a graph at least
LEAD_SECONDS = 10e-3  # below, the device is kept busy until what is timed begins
_LATENCIES = 30


class Clock(Protocol):
    """A device that does work and tells how long that took."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        """Work as a graph, which is not run yet. Raises RuntimeError if it cannot be one."""

    def seconds(self, play: Callable[[], object], lead: bool) -> float:
        """How long the device is at it. `lead`: play once before, so that it does not wait for the host."""

    def wait(self) -> None:
        """Until all is done. Raises RuntimeError if the device is in no state to go on."""


class CudaClock:
    """The current CUDA device."""

    def record(self, work: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # what compiles, tunes or allocates at the first call does so here
        torch.cuda.current_stream().wait_stream(stream)
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def seconds(self, play: Callable[[], object], lead: bool) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if lead:
            play()
        start.record()
        play()
        end.record()
        end.synchronize()
        return float(1e-3 * start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Take:
    """A contender ready to be timed with m rows."""

    checked: Checked
    play: Callable[[], object]
    calls: int  # in one play
    graphed: bool
    error: float | None
    keeps: object  # what a graph writes to: it does not keep tensors alive itself


def take(checked: Checked, x: torch.Tensor, clock: Clock) -> Take:
    """Record a contender's products of x, and check the first of a replay.

    What cannot be recorded is timed as it is called. Raises WrongProductError, and what the contender raises.
    """
    contender = checked.contender
    sweep = contender.bind(x)
    error = checked.accept(sweep())
    clock.wait()
    repeats = -(-CALLS // contender.copies)
    product: list[torch.Tensor] = []

    def work() -> None:
        product[:] = [sweep()]
        for _ in range(repeats - 1):
            sweep()

    calls = repeats * contender.copies
    try:
        play = clock.record(work)
        product[0].fill_(float("nan"))
        play()
        clock.wait()
        return Take(checked, play, calls, True, checked.accept(product[0]), work)
    except (RuntimeError, WrongProductError):
        clock.wait()  # raises if it was more than the recording that failed
        return Take(checked, work, calls, False, error, work)


def time_in_turn(takes: Mapping[str, Take], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of one call of each in every round. The order is shuffled in every round; one before is not counted."""
    leads = {name: clock.seconds(one.play, False) < LEAD_SECONDS for name, one in takes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    order = list(takes)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(clock.seconds(takes[name].play, leads[name]) / takes[name].calls)
    return seconds


def latency(call: Callable[[], object], clock: Clock) -> float:
    """Median seconds from calling until the result is there, with nothing else under way and without a graph."""
    found = []
    for _ in range(_LATENCIES):
        clock.wait()
        start = time.perf_counter()
        call()
        clock.wait()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def timings(takes: Mapping[str, Take], x: torch.Tensor, rounds: int, clock: Clock) -> dict[str, Timing]:
    """All that is measured of contenders with one number of rows."""
    found = {}
    for name, seconds in time_in_turn(takes, rounds, clock).items():
        one = takes[name]
        contender = one.checked.contender
        waited = None if contender.single is None else latency(partial(contender.single, x), clock)
        found[name] = Timing(seconds, one.error, contender.nbytes, one.graphed, waited)
    return found
