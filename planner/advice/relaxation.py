"""Changes that make a plan possible where there is none: each alone, and as small as suffices.

Every relaxation comes with a plan that was found under it, so it suffices. Its size is found by bisection with short
searches, so a slightly smaller one may suffice too, the more so the less time there is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmpq.spec import Device, InfeasibleError, NotMeasuredError, Solved, UsageError, Workload, widths_of
from planner.clock import Clock
from planner.constraints import Constraints, DeviceLimit
from planner.problem import Problem
from planner.solver.search import best_plan

EACH_S = 5.0  # for one search
QUALITY_SHARE = 100.0  # the weight of sensitivity relative to time, where its least is sought
MEMORY_STEP = 0.05  # by which caps are widened, again and again
MEMORY_STEPS = 95  # at most: a hundred times the caps
MORE_DEVICES = 4  # at most, of a kind
ENOUGH = 3


@dataclass(frozen=True)
class Relaxation:
    """A change that makes a plan possible, in words, and such a plan."""

    change: str
    solved: Solved


def relaxations(problem: Problem, clock: Clock | None = None) -> tuple[Relaxation, ...]:
    """Those that help and are found before the clock, by default that of the time limit, runs out.

    Of a smaller batch, shorter context, lower quality, fewer bits, more memory, more devices.

    Then each kind of constraint (`Constraints.easier`) without which there is a plan. Where these are fewer than
    ENOUGH, also memory for one device alone, and memory together with less of something.
    """
    clock = clock or Clock.of(problem.constraints.time_limit_s)
    ways = [
        _smaller_batch,
        _shorter_context,
        _lower_quality,
        _fewer_bits,
        _more_memory,
        _more_devices,
        _fewer_constraints,
    ]
    further = [_more_memory_on_one, _less_and_more_memory]
    found: list[Relaxation] = []
    for i, way in enumerate((*ways, *further)):
        if way in ways or len(found) < ENOUGH:
            found += way(problem, clock.part(1 / (len(ways) + len(further) - i)))
    return tuple(found)


def _any_plan(problem: Problem, clock: Clock, **changes: Any) -> Solved | None:
    """The first plan that is found in time, if there is one, with these changes to the constraints."""
    limits: dict[str, Any] = {"gap": 1.0, **changes}
    if clock.over:
        return None
    try:
        return best_plan(
            replace(problem, constraints=replace(problem.constraints, **limits)), clock.part(1 / 2, most_s=EACH_S)
        )
    except (InfeasibleError, NotMeasuredError, UsageError):
        return None


def _least_sensitive_plan(problem: Problem, clock: Clock) -> Solved | None:
    """The plan of about the least summed sensitivity that memory allows."""
    solved = _any_plan(problem, clock, omega_budget=math.inf)
    if solved is None or solved.solution.omega == 0:
        return solved
    price = QUALITY_SHARE * (solved.prediction.prefill_s + solved.prediction.decode_s) / solved.solution.omega
    return _any_plan(problem, clock, omega_budget=math.inf, theta=price, gap=0.02) or solved


def _least(count: int, plan_at: Callable[[int], Solved | None]) -> tuple[int, Solved] | None:
    """The least step in 1..count at which there is a plan, if more steps never make it worse."""
    best = plan_at(count) if count > 0 else None
    if best is None:
        return None
    low, high = 0, count  # no plan at low, one at high
    while high - low > 1:
        middle = (low + high) // 2
        plan = plan_at(middle)
        if plan is None:
            low = middle
        else:
            high, best = middle, plan
    return high, best


def _smaller_batch(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    size, constraints = problem.workload.batch_size, problem.constraints
    least = max(constraints.prefill_microbatch or 1, constraints.decode_microbatch or 1)

    def smaller(less: int) -> Problem:
        return replace(problem, workload=replace(problem.workload, batch_size=size - less))

    if found := _least(size - least, lambda less: _any_plan(smaller(less), clock)):
        yield Relaxation(f"a batch of {size - found[0]} instead of {size}", found[1])


def _shorter_context(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    """Prompts and answers shortened alike, in sixteenths."""
    workload, parts = problem.workload, 16

    def shortened(less: int) -> Workload:
        return workload.with_lengths(lambda length: max(1, length * (parts - less) // parts))

    if found := _least(parts, lambda less: _any_plan(replace(problem, workload=shortened(less)), clock)):
        after = shortened(found[0])
        yield Relaxation(
            f"prompts of {after.longest_prompt} and answers of {after.output_len} tokens instead of "
            f"{workload.longest_prompt} and {workload.output_len}",
            found[1],
        )


def _lower_quality(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    budget = problem.constraints.budget(problem.spec, problem.sensitivity)
    if math.isinf(budget) or (solved := _least_sensitive_plan(problem, clock)) is None:
        return
    if solved.solution.omega > budget:
        yield Relaxation(f"a summed sensitivity of {solved.solution.omega:.4g} instead of {budget:.4g}", solved)


def _fewer_bits(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    constraints = problem.constraints
    lowest = _lowest(constraints)
    if constraints.fixed_bits is not None or constraints.min_bits <= lowest:
        return
    if (solved := _any_plan(problem, clock, min_bits=lowest)) is not None:
        chosen = {unit: solved.plan.precision(unit) for unit in problem.spec.units}
        fewer = [
            unit
            for unit, option in chosen.items()
            if any(isinstance(width, int) and width < constraints.min_bits for width in widths_of(option))
        ]
        yield Relaxation(f"fewer than {constraints.min_bits} bits for {_listed(fewer)}", solved)


def _lowest(constraints: Constraints) -> int:
    """The fewest bits that may be chosen if no more are asked for."""
    return min((width for width in constraints.bits if isinstance(width, int)), default=constraints.min_bits)


def _listed(units: list[str]) -> str:
    return ", ".join(units) if len(units) <= 4 else f"{', '.join(units[:3])} and {len(units) - 3} more"


def _widened(problem: Problem, only: Device | None, step: int) -> Problem:
    """Caps of all devices, or of one, that many steps wider."""
    factor = (1 + MEMORY_STEP) ** step
    devices = tuple(
        d if d.memory_bytes is None or only not in (None, d) else replace(d, memory_bytes=int(d.memory_bytes * factor))
        for d in problem.cluster.devices
    )
    return replace(problem, cluster=replace(problem.cluster, devices=devices))


def _least_memory(
    problem: Problem, clock: Clock, only: Device | None = None, most: int = MEMORY_STEPS
) -> tuple[int, Solved] | None:
    """How many steps wider caps must be, and a plan then."""
    return _least(most, lambda step: _any_plan(_widened(problem, only, step), clock))


def _percent(steps: int) -> str:
    return f"{100 * ((1 + MEMORY_STEP) ** steps - 1):.0f} % more memory"


def _more_memory(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    if found := _least_memory(problem, clock):
        yield Relaxation(f"{_percent(found[0])} on every device", found[1])


def _more_memory_on_one(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    devices = problem.cluster.devices
    for device in devices if len(devices) > 1 else ():
        if device.memory_bytes is not None and (found := _least_memory(problem, clock, device)):
            yield Relaxation(f"{_percent(found[0])} on {device.name} alone", found[1])


def _fewer_constraints(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    """Without one kind of constraint other than quality."""
    for what, easier in problem.constraints.easier():
        if (solved := _any_plan(replace(problem, constraints=easier), clock)) is not None:
            yield Relaxation(f"giving up {what}", solved)


def _less_and_more_memory(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    """The least of one thing, and the memory that is then still missing, if that is less than without."""
    workload, limits = problem.workload, problem.constraints
    most = found[0] - 1 if (found := _least_memory(problem, clock)) else MEMORY_STEPS
    narrowest = replace(limits, min_bits=_lowest(limits), omega_budget=math.inf)
    ways = {
        "a batch of 1": replace(problem, workload=replace(workload, batch_size=1)),
        "half the context": replace(problem, workload=workload.with_lengths(lambda length: -(-length // 2))),
        "a quarter of the context": replace(problem, workload=workload.with_lengths(lambda length: -(-length // 4))),
        "any quality": replace(problem, constraints=narrowest),
    }
    for what, less in ways.items():
        if less != problem and _any_plan(less, clock) is None and (found := _least_memory(less, clock, most=most)):
            yield Relaxation(f"{what} and {_percent(found[0])} on every device", found[1])


def _more_devices(problem: Problem, clock: Clock) -> Iterator[Relaxation]:
    """More devices like one of the cluster."""
    for like in problem.cluster.devices if len(problem.cluster.devices) > 1 else ():
        more = list(itertools.accumulate([like] * MORE_DEVICES, _with_twin, initial=problem))
        if found := _least(MORE_DEVICES, lambda count, more=more: _any_plan(more[count], clock)):  # type: ignore[misc]
            words = "another device" if found[0] == 1 else f"{found[0]} more devices"
            yield Relaxation(f"{words} like {like.name}", found[1])


def _with_twin(problem: Problem, like: Device) -> Problem:
    """With one more device, as far from the others as this one is, and as far from this one as the nearest of those."""
    devices, link = problem.cluster.devices, problem.profile.link
    others = [other.name for other in devices if other != like]
    name = next(name for i in itertools.count(2) if (name := f"{like.name}-{i}") not in others)
    nearest = min((link(like.name, other) for other in others), key=lambda found: found.latency_s)
    links = [
        *problem.profile.links,
        *(replace(link(like.name, other), source=name) for other in others),
        *(replace(link(other, like.name), target=name) for other in others),
        replace(nearest, source=name, target=like.name),
        replace(nearest, source=like.name, target=name),
    ]
    tables = {**problem.profile.tables, name: problem.profile.tables[like.name]}
    rules = (
        DeviceLimit({**rule.weights, name: rule.weight(like.name)}, rule.limit) for rule in problem.constraints.at_most
    )
    return replace(
        problem,
        constraints=replace(problem.constraints, at_most=tuple(rules)),
        cluster=replace(problem.cluster, devices=(*devices, replace(like, name=name))),
        profile=replace(problem.profile, tables=tables, links=tuple(links)),
    )
