"""The search around the integer program: devices, their order, and both micro-batch sizes.

Best first over lower bounds that are refined only where they matter. For each set of devices and pair of sizes: every
unit where it is fastest; then the linear relaxation with the devices in any order; then that of each order; then the
integer program itself. It ends when the least bound left is within the gap of the best plan known, baselines included,
or when time is up; the bound it reports is that least bound.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmpq.spec import Cluster, InfeasibleError, ModelSpec, Plan, Profile, Sensitivity, Workload
from planner import ilp
from planner.baselines import Baseline, best_baselines
from planner.constraints import Constraints
from planner.costs import Choice, Costs, Phase
from planner.found import Found, to_plan
from planner.infeasible import explain
from planner.objective import FloatArray, Program, decode_seconds, prefill_seconds
from planner.orders import Order, device_orders

FIRST_TRY_S = 2.0  # for one integer program; doubled whenever its turn comes again


def solve(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    profile: Profile,
    sensitivity: Sensitivity,
    constraints: Constraints,
) -> Plan:
    """The best plan found in time. Raises InfeasibleError, UsageError, NotMeasuredError."""
    started = time.perf_counter()
    costs = Costs.of(spec, cluster, workload, profile, sensitivity, constraints)
    orders = _orders(costs)
    search = _Search(costs, deadline=started + constraints.time_limit_s)
    search.known(best_baselines(costs, orders).values())
    bound = search.run(orders)
    if search.best is None:
        if bound < math.inf:
            raise InfeasibleError(f"no plan was found within {constraints.time_limit_s:g} s; allow more time")
        raise explain(costs, orders)
    return to_plan(costs, search.best, solver=ilp.SOLVER, bound=bound, seconds=time.perf_counter() - started)


def baselines(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    profile: Profile,
    sensitivity: Sensitivity,
    constraints: Constraints,
) -> dict[Baseline, Plan]:
    """The best plan of each kind of baseline that is feasible under the same constraints."""
    started = time.perf_counter()
    costs = Costs.of(spec, cluster, workload, profile, sensitivity, constraints)
    return {
        kind: to_plan(
            costs,
            found,
            solver="enumeration",
            bound=found.value.objective,
            seconds=time.perf_counter() - started,
        )
        for kind, found in best_baselines(costs, _orders(costs)).items()
    }


def _orders(costs: Costs) -> list[Order]:
    return device_orders(
        costs.cluster,
        costs.profile,
        all_devices=costs.constraints.all_devices,
        max_stages=costs.spec.num_layers + 2,
    )


@dataclass(frozen=True)
class _Node:
    """Plans with these device orders (of one set of devices) and sizes; none of them is better than `bound`."""

    bound: float
    orders: tuple[Order, ...]
    prefill: Phase
    decode: Phase
    relaxed: bool = False  # whether the bound is already that of the linear relaxation
    try_s: float = FIRST_TRY_S  # for the integer program


@dataclass
class _Search:
    costs: Costs
    deadline: float
    best: Found | None = None
    _open: list[tuple[float, int, _Node]] = field(default_factory=list)
    _pushed: Iterator[int] = field(default_factory=itertools.count)

    def known(self, candidates: Iterable[Found]) -> None:
        """Take feasible candidates into account."""
        for found in candidates:
            if found.value.feasible and (self.best is None or found.value.objective < self.best.value.objective):
                self.best = found

    def run(self, orders: Sequence[Order]) -> float:
        """Search these orders with all micro-batch sizes; returns the bound."""
        sets: dict[frozenset[int], list[Order]] = {}
        for order in orders:
            sets.setdefault(frozenset(order), []).append(order)
        for of_set in sets.values():
            for prefill in self.costs.prefill:
                for decode in self.costs.decode:
                    program = self._any_order(of_set, prefill, decode)
                    self._push(_Node(_crude_bound(program), tuple(of_set), prefill, decode))
        finished = math.inf
        while self._open:
            least, _, node = self._open[0]
            if self.best is not None and least >= self.best.value.objective * (1 - self.costs.constraints.gap):
                break
            if time.perf_counter() >= self.deadline:
                break
            heapq.heappop(self._open)
            if not node.relaxed:
                self._relax(node)
            elif len(node.orders) > 1:
                for order in node.orders:
                    self._relax(replace(node, orders=(order,)))
            else:
                finished = min(finished, self._solve(node))
        left = self._open[0][0] if self._open else math.inf
        return min(finished, left)

    def _push(self, node: _Node) -> None:
        if node.bound < math.inf:
            heapq.heappush(self._open, (node.bound, next(self._pushed), node))

    def _relax(self, node: _Node) -> None:
        if len(node.orders) == 1:
            bound = ilp.bound(self.costs.program(Choice(node.orders[0], node.prefill, node.decode)))
        else:
            bound = ilp.bound(self._any_order(node.orders, node.prefill, node.decode), ordered=False)
        self._push(replace(node, bound=max(node.bound, bound), relaxed=True))

    def _solve(self, node: _Node) -> float:
        """Solve one integer program; returns its bound if it is done with, inf if it goes back into the queue."""
        choice = Choice(node.orders[0], node.prefill, node.decode)
        time_limit_s = min(node.try_s, max(0.1, self.deadline - time.perf_counter()))
        result = ilp.solve(self.costs.program(choice), time_limit_s=time_limit_s, gap=self.costs.constraints.gap)
        if result.assignment is not None:
            self.known([Found.of(self.costs, choice, result.assignment)])
        bound = max(node.bound, result.bound)
        if result.proven:
            return bound
        self._push(replace(node, bound=bound, try_s=2 * node.try_s))
        return math.inf

    def _any_order(self, orders: Sequence[Order], prefill: Phase, decode: Phase) -> Program:
        """A program that costs no more than that of any of these orders: the least buffers, the fastest links."""
        programs = [self.costs.program(Choice(order, prefill, decode)) for order in orders]
        fixed = [p.memory_fixed[[order.index(d) for d in orders[0]]] for p, order in zip(programs, orders)]
        return replace(
            programs[0],
            memory_fixed=np.min(fixed, axis=0),
            prefill_links=np.min([np.sort(p.prefill_links) for p in programs], axis=0),
            decode_links=np.min([np.sort(p.decode_links) for p in programs], axis=0),
        )


def _crude_bound(program: Program) -> float:
    """Every unit where and how it is fastest, and all stages equal."""
    positions = program.shape[1]

    def resources(units: FloatArray, step: FloatArray, links: FloatArray) -> FloatArray:
        mean = (units.min(axis=(1, 2)).sum() + step.sum()) / positions
        return np.concatenate([np.full(positions, mean), links])

    prefill = resources(program.prefill, program.prefill_step, program.prefill_links)
    decode = resources(program.decode, program.decode_step, program.decode_links)
    return (
        prefill_seconds(prefill, program.prefill_microbatches)
        + decode_seconds(decode, program.decode_microbatches, program.output_len)
        + program.theta * float(program.omega.min(axis=1).sum())
    )
