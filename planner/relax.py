"""What could be given up where there is no plan: each way alone, as little of it as makes a plan possible.

Every relaxation comes with a plan that was found under it, so it is known to suffice. How little suffices is found by
bisection over what was feasible in a short search, so a little less might do, too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from llmpq.spec import InfeasibleError, Link, NotMeasuredError, Plan, UsageError, Workload
from planner.problem import Problem
from planner.search import solve

EACH_S = 5.0  # for one search
QUALITY_SHARE = 100.0  # how much more than time sensitivity weighs, where the least of it is sought
MEMORY_STEP = 0.05  # by which caps are widened
MAX_MEMORY = 4.0  # times the caps, at most


@dataclass(frozen=True)
class Relaxation:
    """A change that makes a plan possible, in words, and such a plan."""

    change: str
    plan: Plan


def relaxations(problem: Problem) -> tuple[Relaxation, ...]:
    """Those that help, of a smaller batch, shorter context, lower quality, fewer bits, more memory, another device."""
    ways = (_smaller_batch, _shorter_context, _lower_quality, _fewer_bits, _more_memory, _another_device)
    return tuple(found for way in ways for found in way(problem))


def _any_plan(problem: Problem, **changes: Any) -> Plan | None:
    """The first plan that is found in time, if there is one, with these changes to the constraints."""
    limits: dict[str, Any] = {"gap": 1.0, "time_limit_s": EACH_S, **changes}
    try:
        return solve(replace(problem, constraints=replace(problem.constraints, **limits)))
    except (InfeasibleError, NotMeasuredError, UsageError):
        return None


def _least_sensitive_plan(problem: Problem) -> Plan | None:
    """The plan of about the least summed sensitivity that memory allows."""
    plan = _any_plan(problem, omega_budget=math.inf)
    if plan is None or plan.solution is None or plan.solution.omega == 0:
        return plan
    price = QUALITY_SHARE * plan.solution.objective / plan.solution.omega
    return _any_plan(problem, omega_budget=math.inf, theta=price, gap=0.02) or plan


def _least(count: int, plan_at: Callable[[int], Plan | None]) -> tuple[int, Plan] | None:
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


def _smaller_batch(problem: Problem) -> Iterator[Relaxation]:
    size = problem.workload.batch_size

    def smaller(less: int) -> Problem:
        return replace(problem, workload=replace(problem.workload, batch_size=size - less))

    if found := _least(size - 1, lambda less: _any_plan(smaller(less))):
        yield Relaxation(f"a batch of {size - found[0]} instead of {size}", found[1])


def _shorter_context(problem: Problem) -> Iterator[Relaxation]:
    """Prompts and answers shortened alike, in sixteenths."""
    workload, parts = problem.workload, 16

    def shortened(less: int) -> Workload:
        def part(length: int) -> int:
            return max(1, length * (parts - less) // parts)

        longest = part(workload.max_prompt_len) if workload.max_prompt_len else 0
        return replace(
            workload,
            prompt_len=part(workload.prompt_len),
            output_len=part(workload.output_len),
            max_prompt_len=longest,
        )

    if found := _least(parts, lambda less: _any_plan(replace(problem, workload=shortened(less)))):
        after = shortened(found[0])
        yield Relaxation(
            f"prompts of {after.longest_prompt} and answers of {after.output_len} tokens instead of "
            f"{workload.longest_prompt} and {workload.output_len}",
            found[1],
        )


def _lower_quality(problem: Problem) -> Iterator[Relaxation]:
    budget = problem.constraints.budget(problem.spec, problem.sensitivity)
    if math.isinf(budget) or (plan := _least_sensitive_plan(problem)) is None or plan.solution is None:
        return
    if plan.solution.omega > budget:
        yield Relaxation(f"a summed sensitivity of {plan.solution.omega:.4g} instead of {budget:.4g}", plan)


def _fewer_bits(problem: Problem) -> Iterator[Relaxation]:
    constraints = problem.constraints
    lowest = min(constraints.bits)
    if constraints.fixed_bits is not None or constraints.min_bits <= lowest:
        return
    if (plan := _any_plan(problem, min_bits=lowest)) is not None:
        units = [unit for unit in problem.spec.units if plan.precision(unit).bits < constraints.min_bits]
        yield Relaxation(f"fewer than {constraints.min_bits} bits for {_listed(units)}", plan)


def _listed(units: list[str]) -> str:
    return ", ".join(units) if len(units) <= 4 else f"{', '.join(units[:3])} and {len(units) - 3} more"


def _more_memory(problem: Problem) -> Iterator[Relaxation]:
    steps = round((MAX_MEMORY - 1) / MEMORY_STEP)

    def widened(step: int) -> Problem:
        factor = 1 + step * MEMORY_STEP
        devices = tuple(
            replace(d, memory_bytes=None if d.memory_bytes is None else int(d.memory_bytes * factor))
            for d in problem.cluster.devices
        )
        return replace(problem, cluster=replace(problem.cluster, devices=devices))

    if found := _least(steps, lambda step: _any_plan(widened(step))):
        yield Relaxation(f"{100 * found[0] * MEMORY_STEP:.0f} % more memory on every device", found[1])


def _another_device(problem: Problem) -> Iterator[Relaxation]:
    """One more like one of those there are, as far from the others as that one is."""
    devices = problem.cluster.devices
    names = {device.name for device in devices}
    for like in devices:
        name = next(name for i in itertools.count(2) if (name := f"{like.name}-{i}") not in names)
        twin = replace(like, name=name)
        nearest = min(
            (problem.profile.link(like.name, other.name) for other in devices if other != like),
            key=lambda link: link.latency_s,
            default=None,
        )
        links = [*problem.profile.links]
        for other in devices:
            if other != like:
                there, back = problem.profile.link(like.name, other.name), problem.profile.link(other.name, like.name)
                links.append(Link(name, other.name, there.latency_s, there.bytes_per_s))
                links.append(Link(other.name, name, back.latency_s, back.bytes_per_s))
        if nearest is not None:
            links.append(Link(name, like.name, nearest.latency_s, nearest.bytes_per_s))
            links.append(Link(like.name, name, nearest.latency_s, nearest.bytes_per_s))
        tables = {**problem.profile.tables, name: problem.profile.tables[like.name]}
        more = replace(
            problem,
            cluster=replace(problem.cluster, devices=(*devices, twin)),
            profile=replace(problem.profile, tables=tables, links=tuple(links)),
        )
        if nearest is not None and (plan := _any_plan(more)) is not None:
            yield Relaxation(f"another device like {like.name}", plan)
