"""From an outline to plans: an order for its devices, and for every layer a place and an option."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np

from planner.cost_arrays import Configuration
from planner.objective import Assignment, BoolArray, FloatArray, IntArray
from planner.solver import ilp
from planner.solver.candidate import Candidate
from planner.solver.orders import Order
from planner.solver.unordered_program import LayerCounts, UnorderedProgram

MAX_ORDERS = 120  # of an outline's devices that are looked at
MAX_TRIED = 3  # of these, that are given to the integer program
PINNED_WINDOW = 8  # layers by which it may move the end of a stage where units are pinned: an outline only counts them


def realize(
    pool: UnorderedProgram, outline: LayerCounts, *, window: int, time_limit_s: float, gap: float
) -> Iterator[Candidate]:
    """Plans close to an outline, each the best in one order of its devices if stages may end `window` layers off.

    First each order as it is: what it lacks in quality, then its objective, says how promising it is.
    """
    costs = pool.costs
    drafts: list[tuple[float, float, int, Candidate]] = []
    for order in _orders(pool, outline):
        choice = Configuration(tuple(pool.devices[d] for d in order), pool.prefill, pool.decode)
        found = Candidate.of(costs, choice, draft(outline, order, costs.omega))
        excess = max(0.0, found.value.omega - costs.omega_budget)
        drafts.append((excess, found.value.objective, len(drafts), found))
        if found.value.feasible:
            yield found
    for *_, found in sorted(drafts)[:MAX_TRIED]:
        program = costs.program(found.choice)
        width = window if costs.allowed is None else max(window, PINNED_WINDOW)
        near = windows(found.assignment.positions, len(found.choice.order), width)
        result = ilp.solve(program, time_limit_s=time_limit_s / MAX_TRIED, gap=gap, near=near)
        if result.assignment is not None:
            yield Candidate.of(costs, found.choice, result.assignment)


def _orders(pool: UnorderedProgram, outline: LayerCounts) -> list[Order]:
    """Orders of the outline's devices (numbers in the pool) from its first to its last one; a sample of many."""
    if outline.first == outline.last:
        return [(outline.first,)]
    middle = [d for d in outline.used if d not in (outline.first, outline.last)]
    if math.factorial(len(middle)) <= MAX_ORDERS:
        permutations = [list(p) for p in itertools.permutations(middle)]
    else:
        generator = random.Random(0)
        permutations = [middle, *(generator.sample(middle, len(middle)) for _ in range(MAX_ORDERS - 1))]
    orders: list[Order] = [(outline.first, *p, outline.last) for p in permutations]
    return [order for order in orders if _keeps_pinned(pool, order)] or orders


def _keeps_pinned(pool: UnorderedProgram, order: Order) -> bool:
    """Whether units that are pinned to devices come in the order of those."""
    allowed = pool.costs.allowed
    if allowed is None:
        return True
    places = [np.flatnonzero(allowed[u, [pool.devices[d] for d in order]].any(axis=1)) for u in range(len(allowed))]
    pinned = [int(at[0]) for at in places if len(at) == 1]
    return pinned == sorted(pinned)


def draft(outline: LayerCounts, order: Order, omega: FloatArray) -> Assignment:
    """The outline's counts, device after device; on each, options go to the layers that mind them least."""
    positions, options = [0], [outline.first_option]
    for position, device in enumerate(order):
        counts = outline.counts[device]
        start = len(positions)
        positions += [position] * int(counts.sum())
        options += match(omega[start : start + int(counts.sum())], counts).tolist()
    return Assignment(
        np.array([*positions, len(order) - 1], dtype=np.int64),
        np.array([*options, outline.last_option], dtype=np.int64),
    )


def match(omega: FloatArray, counts: IntArray) -> IntArray:
    """Options [layers] for omega [layers, options], each as often as counts [options] says; the sum is kept small.

    Option after option goes to those layers for which the others would gain least. With two options that is the best.
    """
    chosen = np.full(len(omega), -1, dtype=np.int64)
    left = counts.copy()
    for option in range(len(counts)):
        open_ = np.flatnonzero(chosen < 0)
        later = [o for o in range(option + 1, len(counts)) if left[o]]
        if not later:
            chosen[open_] = option
            break
        loss = omega[open_, option] - omega[open_][:, later].mean(axis=1)
        chosen[open_[np.argsort(loss, kind="stable")[: left[option]]]] = option
    return chosen


def windows(positions: IntArray, stages: int, width: int) -> BoolArray:
    """Which positions [units, stages] a unit may have if every stage may end up to `width` layers sooner or later."""
    last = len(positions) - 1
    allowed = np.zeros((len(positions), stages), dtype=bool)
    for unit in range(len(positions)):
        for at in range(max(0, unit - width), min(last, unit + width) + 1):
            allowed[unit, positions[at]] = True
    return allowed
