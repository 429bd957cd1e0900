"""From an outline, which counts layers, to plans: an order of its devices, and a place and an option of every layer."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np

from planner.clock import Clock
from planner.cost_arrays import Configuration
from planner.objective import Assignment, BoolArray, FloatArray, IntArray
from planner.solver import ilp
from planner.solver.candidate import Candidate
from planner.solver.link_order import fastest_links
from planner.solver.local_search import improved
from planner.solver.orders import Order
from planner.solver.pool import LayerCounts, Pool

MAX_ORDERS = 120  # of an outline's devices that are drafted
MAX_MENDED = 40  # drafts that are improved
MAX_TRIED = 3  # of these, those that the integer program improves
PINNED_WINDOW = 8  # layers by which a stage may end elsewhere where units are pinned: an outline only counts them


def realize(pool: Pool, outline: LayerCounts, clock: Clock, *, window: int, gap: float) -> Iterator[Candidate]:
    """Plans close to an outline, each the best in one order of its devices if stages may end `window` layers off.

    Every order is drafted first. Of the drafts that exceed the quality budget least, and of these the best, changes one
    by one mend the limits and the objective; the integer program improves the best of those. Where a draft has other
    groups of layers on a device than the outline, its stages may end further off.
    """
    costs = pool.costs
    drafts: list[tuple[float, float, int, Candidate]] = []
    mended: list[tuple[float, int, Candidate]] = []
    for order in _orders(pool, outline, clock.part(1 / 4)):
        choice = Configuration(tuple(pool.devices[d] for d in order), pool.prefill, pool.decode)
        found = Candidate.of(costs, choice, draft(outline, order, costs.groups, costs.omega))
        excess = max(0.0, found.value.omega - costs.omega_budget)
        drafts.append((excess, found.value.objective, len(drafts), found))
        if found.value.feasible:
            yield found
        if clock.over:
            break
    half = clock.part(1 / 2)
    for *_, found in sorted(drafts)[:MAX_MENDED]:
        assignment, broken = improved(costs.program(found.choice), found.assignment, half)
        found = Candidate.of(costs, found.choice, assignment)
        mended.append((found.value.objective * (1 + broken), len(mended), found))
        if found.value.feasible:
            yield found
        if half.over:
            break
    best = sorted(mended)[:MAX_TRIED]
    for *_, found in best:
        width = max(window, _displaced(pool, outline, found), 0 if costs.allowed is None else PINNED_WINDOW)
        near = windows(found.assignment.positions, len(found.choice.order), width)
        result = ilp.solve(costs.program(found.choice), clock.part(1 / 2), gap=gap, near=near)
        if result.assignment is not None:
            yield Candidate.of(costs, found.choice, result.assignment)


def _orders(pool: Pool, outline: LayerCounts, clock: Clock) -> list[Order]:
    """Orders of the outline's devices (numbers in the pool) from its first to its last one; if many, a sample.

    The first of the sample has the fastest links that are found; the next has devices in the order of the mean position
    of their layers' groups in the model.
    """
    if outline.first == outline.last:
        return [(outline.first,)]
    middle = [d for d in outline.used if d not in (outline.first, outline.last)]
    if math.factorial(len(middle)) <= MAX_ORDERS:
        permutations = [list(p) for p in itertools.permutations(middle)]
    else:
        generator = random.Random(0)
        groups = pool.costs.groups
        center = np.bincount(groups, weights=np.arange(len(groups))) / pool.costs.group_sizes
        layers = outline.counts.sum(axis=2)
        mean = {d: float(layers[d] @ center) / max(1, int(layers[d].sum())) for d in middle}
        permutations = [
            list(fastest_links(pool, outline, clock)[1:-1]),
            sorted(middle, key=mean.__getitem__),
            *(generator.sample(middle, len(middle)) for _ in range(MAX_ORDERS - 2)),
        ]
    orders: list[Order] = [(outline.first, *p, outline.last) for p in permutations]
    return [order for order in orders if _keeps_pinned(pool, order)] or orders


def _keeps_pinned(pool: Pool, order: Order) -> bool:
    """Whether units that are pinned to devices come in the order of these devices."""
    allowed = pool.costs.allowed
    if allowed is None:
        return True
    places = [np.flatnonzero(allowed[u, [pool.devices[d] for d in order]].any(axis=1)) for u in range(len(allowed))]
    pinned = [int(at[0]) for at in places if len(at) == 1]
    return pinned == sorted(pinned)


def _displaced(pool: Pool, outline: LayerCounts, found: Candidate) -> int:
    """Layers of the groups that a device has in the outline and not in a draft; the most of any device."""
    groups, layers = pool.costs.groups, found.assignment.positions[1:-1]
    most = 0
    for position, device in enumerate(found.choice.order):
        drafted = np.bincount(groups[layers == position], minlength=len(pool.costs.group_sizes))
        counted = outline.counts[pool.devices.index(device)].sum(axis=1)
        most = max(most, int(np.maximum(counted - drafted, 0).sum()))
    return most


def draft(outline: LayerCounts, order: Order, groups: IntArray, omega: FloatArray) -> Assignment:
    """As many layers as the outline counts, device after device, and their options; `groups` [layers]."""
    positions, options = [0], [outline.first_option]
    for position, device in enumerate(order):
        counts = outline.counts[device]
        start, end = len(positions), len(positions) + int(counts.sum())
        positions += [position] * (end - start)
        options += _match_groups(omega[start:end], groups[start - 1 : end - 1], counts).tolist()
    return Assignment(
        np.array([*positions, len(order) - 1], dtype=np.int64),
        np.array([*options, outline.last_option], dtype=np.int64),
        None if outline.narrow is None else outline.narrow[list(order)],
    )


def _match_groups(omega: FloatArray, groups: IntArray, counts: IntArray) -> IntArray:
    """Options [layers] as often as counts [groups, options] says of each group; else, of all of them together."""
    if not np.array_equal(np.bincount(groups, minlength=len(counts)), counts.sum(axis=1)):
        return match(omega, counts.sum(axis=0))
    chosen = np.empty(len(omega), dtype=np.int64)
    for group, of_group in enumerate(counts):
        chosen[groups == group] = match(omega[groups == group], of_group)
    return chosen


def match(omega: FloatArray, counts: IntArray) -> IntArray:
    """Options [layers] for omega [layers, options], each as often as counts [options] says, of a small sum.

    Option after option goes to the layers for which the others would gain least. With two options the sum is the least.
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
