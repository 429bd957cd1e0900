"""What the usual ways to split a model over devices would make of the same problem, or why they do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmpq.spec import NotMeasuredError, Solved, UsageError
from llmpq.spec.formatting import format_bytes
from planner.baselines.systems import Baseline
from planner.clock import Clock
from planner.problem import Problem
from planner.solver.search import baseline_plans

USUAL: dict[Baseline, str] = {
    "uniform": "even split, one width",
    "proportional": "split by memory, one width",
    "single": "one device, one width",
}
MOST_S = 1.0  # to spend on what is only told beside a plan
_ROOMY = 1000  # times the memory of every device: a split by memory stays what it is


@dataclass(frozen=True)
class UsualWay:
    """One way, its best plan under the same constraints, and where there is none, the reason."""

    name: str
    solved: Solved | None
    reason: str = ""


def find_usual_ways(problem: Problem, clock: Clock | None = None) -> tuple[UsualWay, ...]:
    """Each of USUAL, as far as it is found before the clock, by default one of at most a second, runs out.

    Raises what `planner.solve` raises for a problem that contradicts itself.
    """
    clock = clock or Clock.of(min(MOST_S, problem.constraints.time_limit_s))
    # How many devices a way uses is part of it; no device may be left out of the plan it is compared with.
    problem = replace(problem, constraints=replace(problem.constraints, all_devices=False))
    found = baseline_plans(problem, clock, USUAL.keys())
    unlimited = [] if USUAL.keys() <= found.keys() else list(_unlimited(problem, clock))
    return tuple(
        UsualWay(name, found[kind]) if kind in found else UsualWay(name, None, _reason(kind, problem, unlimited, clock))
        for kind, name in USUAL.items()
    )


def _unlimited(problem: Problem, clock: Clock) -> Iterator[dict[Baseline, Solved]]:
    """The plans at each width that is within the quality budget, on devices with more memory than any needs.

    On all devices, then on each alone.
    """
    roomy = tuple(
        device if device.memory_bytes is None else replace(device, memory_bytes=_ROOMY * device.memory_bytes)
        for device in problem.cluster.devices
    )
    roomy_problem = replace(problem, cluster=replace(problem.cluster, devices=roomy))
    names = [device.name for device in roomy]
    for width, alone in itertools.product(problem.constraints.bits, (None, *names)):
        if clock.over:
            return
        excluded = () if alone is None else tuple(name for name in names if name != alone)
        limits = replace(problem.constraints, bits=(width,), excluded=(*problem.constraints.excluded, *excluded))
        try:
            yield baseline_plans(replace(roomy_problem, constraints=limits), clock, USUAL.keys())
        except (UsageError, NotMeasuredError):  # a width or a device that is not allowed, or was not measured
            continue


def _reason(kind: Baseline, problem: Problem, unlimited: list[dict[Baseline, Solved]], clock: Clock) -> str:
    """The least memory that is short, of all widths; or that no width is good enough; or that time is up."""
    short = [_shortage(problem, plans[kind]) for plans in unlimited if kind in plans]
    if not short and clock.over:
        return "there was no time to see why not"
    if not short:
        return "no width keeps to the quality budget and the other constraints"
    _, reason = min(short)
    return reason


def _shortage(problem: Problem, solved: Solved) -> tuple[float, str]:
    """By how much a plan exceeds the device that it exceeds most, as a share of its memory; and in words."""
    short = []
    for stage, needed in zip(solved.plan.stages, solved.prediction.memory_bytes, strict=True):
        room = problem.constraints.room(problem.cluster.device(stage.device))
        short.append((needed / room, f"{stage.device} would need {format_bytes(needed)}, and has {format_bytes(room)}"))
    return max(short)
