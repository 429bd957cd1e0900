"""What a user would do without a planner: one bit width and an even split, or everything on one device.

Each is the best of its kind, all micro-batch sizes and device orders tried. They are candidates of the search, so a
plan is never worse than them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from planner.costs import Choice, Costs
from planner.found import Found
from planner.objective import Assignment
from planner.orders import Order

Baseline = Literal["uniform", "single"]


def best_baselines(costs: Costs, orders: Sequence[Order]) -> dict[Baseline, Found]:
    """The best feasible one of each kind: "uniform" (even split over all devices), "single" (one device)."""
    best: dict[Baseline, Found] = {}
    for order in orders:
        kind: Baseline
        if len(order) == 1:
            kind = "single"
        elif len(order) == len(costs.cluster.devices) <= costs.spec.num_layers:
            kind = "uniform"
        else:
            continue
        for found in _uniform(costs, order):
            if found.value.feasible and (kind not in best or found.value.objective < best[kind].value.objective):
                best[kind] = found
    return best


def _uniform(costs: Costs, order: Order) -> Iterator[Found]:
    """One option everywhere and layers split evenly, for each option and both micro-batch sizes."""
    layers = np.arange(costs.spec.num_layers) * len(order) // costs.spec.num_layers
    positions = np.concatenate([[0], layers, [len(order) - 1]])
    for prefill in costs.prefill:
        for decode in costs.decode:
            for option in range(len(costs.options)):
                assignment = Assignment(positions, np.full(len(positions), option))
                yield Found.of(costs, Choice(order, prefill, decode), assignment)
