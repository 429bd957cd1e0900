"""The best plans under single changes: more memory, a device less, other bits, other quality.

Nothing is estimated: every change is another problem, which is solved for the same objective.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from llmpq.spec import (
    BITS,
    NATIVE,
    W16,
    InfeasibleError,
    Mixed,
    NotMeasuredError,
    Plan,
    Solved,
    UnitPrecision,
    UsageError,
    Width,
    widths_of,
)
from planner.clock import Clock
from planner.problem import Problem
from planner.solver.search import best_plan

Kind = Literal["memory", "device", "quality", "bits"]

MORE = 0.1  # of memory or of the quality budget, to see what it buys
LEAST_S, EACH_S = 0.5, 10.0  # for one search
FRONT = 7  # points of the front of the objective over quality


@dataclass(frozen=True)
class Change:
    """Something that could be different, and the best plan if it is."""

    what: str
    kind: Kind
    amount: float  # of bytes, devices, the budget (1: all of it) or bits per weight; negative: less. 0: not one number
    solved: Solved

    @property
    def tokens_per_s(self) -> float:
        return self.solved.prediction.tokens_per_s


@dataclass(frozen=True)
class _Way:
    """A change to try."""

    what: str
    kind: Kind
    amount: float
    problem: Callable[[], Problem]


def try_changes(plan: Plan, problem: Problem, clock: Clock) -> tuple[tuple[Change, ...], tuple[str, ...]]:
    """What changes lead to, and those with which no plan was found; those that there is no time for are left out."""
    ways = list(_ways(plan, problem))
    turns: Counter[Kind] = Counter()
    turn = {}
    for i, way in enumerate(ways):
        turns[way.kind] += 1
        turn[i] = turns[way.kind]
    tried = {}
    for done, i in enumerate(
        sorted(turn, key=turn.__getitem__)
    ):  # so there is something of each kind, where time is short
        if clock.over:
            break
        tried[i] = _best(ways[i].problem(), clock, len(ways) - done)
    found = [(ways[i], best) for i, best in sorted(tried.items(), key=lambda of_way: of_way[0])]
    return (
        tuple(Change(way.what, way.kind, way.amount, best) for way, best in found if best is not None),
        tuple(way.what for way, best in found if best is None),
    )


def _best(problem: Problem, clock: Clock, searches: int) -> Solved | None:
    """The best plan found in a fair share of the time left for so many searches."""
    share_s = max(LEAST_S, clock.left_s / searches)
    try:
        return best_plan(problem, clock.part(most_s=min(EACH_S, share_s)))
    except (InfeasibleError, NotMeasuredError, UsageError):
        return None


def _ways(plan: Plan, problem: Problem) -> Iterator[_Way]:
    yield from _memory(problem)
    yield from _devices(problem)
    yield from _quality(problem)
    yield from _bits(plan, problem)


def _constrained(problem: Problem, **limits: Any) -> Problem:
    return replace(problem, constraints=replace(problem.constraints, **limits))


def _with_memory(problem: Problem, i: int, more: int) -> Problem:
    """With so many bytes more on one device."""
    devices = list(problem.cluster.devices)
    devices[i] = replace(devices[i], memory_bytes=(devices[i].memory_bytes or 0) + more)
    return replace(problem, cluster=replace(problem.cluster, devices=tuple(devices)))


def _memory(problem: Problem) -> Iterator[_Way]:
    """More on each device that has a cap."""
    for i, device in enumerate(problem.cluster.devices):
        if device.memory_bytes is not None:
            more = int(device.memory_bytes * MORE)
            what = f"{100 * MORE:.0f} % more memory on {device.name}"
            yield _Way(what, "memory", more, partial(_with_memory, problem, i, more))


def _devices(problem: Problem) -> Iterator[_Way]:
    """Each one less, if it may be left out."""
    devices, excluded = problem.cluster.devices, problem.constraints.excluded
    for device in devices:
        if len(devices) > 1 and not problem.constraints.must_use(device.name) and device.name not in excluded:
            without = partial(_constrained, problem, excluded=(*excluded, device.name))
            yield _Way(f"without {device.name}", "device", -1, without)


def _quality(problem: Problem) -> Iterator[_Way]:
    """A larger and a smaller budget."""
    budget = problem.constraints.budget(problem.spec, problem.sensitivity)
    if math.isfinite(budget):
        for share, words in ((MORE, "more"), (-MORE, "less")):
            what = f"{100 * MORE:.0f} % {words} sensitivity allowed"
            yield _Way(what, "quality", share, partial(_constrained, problem, omega_budget=budget * (1 + share)))


def _bits(plan: Plan, problem: Problem) -> Iterator[_Way]:
    """All units one width wider or narrower, quality aside; and each of the outermost widths given up."""
    limits, units = problem.constraints, problem.spec.units
    now = {unit: plan.precision(unit) for unit in units}
    widths = [bits for bits in BITS if bits in limits.bits and bits >= limits.min_bits]
    for step, words in ((1, "wider"), (-1, "narrower")):
        then = {unit: _next(widths, option, step) for unit, option in now.items()} | dict(limits.unit_bits)
        if any(then[unit] != now[unit].width for unit in units):
            fixed = partial(_constrained, problem, fixed_bits=None, omega_budget=math.inf, unit_bits=then)
            amount = _bits_per_weight(problem, {u: limits.option(w) for u, w in then.items()})
            amount -= _bits_per_weight(problem, now)
            yield _Way(f"every unit one width {words}", "bits", amount, fixed)
    present = {width for option in now.values() for width in widths_of(option)}
    used = [option.width for option in limits.options(problem.spec) if option.width in present]
    if limits.fixed_bits is None and len(used) > 1:
        for given_up in (used[0], used[-1]):
            others = tuple(width for width in (*widths, NATIVE) if width in limits.bits and width != given_up)
            what = "no native unit" if given_up == NATIVE else f"no unit of {given_up} bits"
            yield _Way(what, "bits", 0, partial(_constrained, problem, bits=others))


def _next(widths: list[int], option: UnitPrecision, step: int) -> Width:
    """The next width, or this one if it is the last or not among them; of a mixed one its widest or narrowest."""
    if isinstance(option, Mixed):
        bits = [width for width in widths_of(option) if isinstance(width, int)]
        if step > 0:
            return NATIVE if NATIVE in widths_of(option) else max(bits)
        return min(bits)
    width = option.width
    at = widths.index(width) + step if isinstance(width, int) and width in widths else -1
    return widths[at] if 0 <= at < len(widths) else width


def _bits_per_weight(problem: Problem, options: dict[str, UnitPrecision]) -> float:
    spec = problem.spec
    size = {unit: spec.unit_bytes(unit, W16) for unit in options}
    return sum(size[unit] * spec.bits(unit, options[unit]) for unit in options) / sum(size.values())


def front(problem: Problem, least: float, clock: Clock) -> Iterator[Solved]:
    """The best plans within budgets from what the widest width but 16 everywhere loses to what the narrowest does.

    From the highest quality to the lowest, without those that are no better than one of higher quality. No budget is
    below `least`, the sensitivity that memory leaves no plan without. Sensitivity has no price in seconds (theta): the
    budget stands for it.
    """
    limits = problem.constraints
    if limits.fixed_bits is not None:
        return
    totals = [
        sum(problem.sensitivity.of(unit, option) for unit in problem.spec.units)
        for option in limits.options(problem.spec)
        if option.quantized
    ]
    positive = [total for total in totals if total > 0]
    if len(positive) < 2:
        return
    high, low = max(positive), max(min(positive), least)
    reached = math.inf
    for i in range(FRONT):
        if clock.over:
            return
        budget = low * (high / low) ** (i / (FRONT - 1))
        best = _best(_constrained(problem, theta=0.0, omega_budget=budget), clock, FRONT - i)
        if best is not None and best.solution.objective < reached:
            reached = best.solution.objective
            yield best
