"""The search around the integer programs: devices, their order, and both micro-batch sizes.

Best first: the node with the least lower bound is refined next. A node is a pair of micro-batch sizes, for pipelines
and single devices apart, and if cost is the objective for each set of devices apart, as the price of a second is then a
constant. Its bound comes from the linear relaxation of the program without an order (unordered_program.py), then from
that program itself, whose optimum is turned into plans (realization.py). If devices are few enough to list all their
orders, each order is a node next, with the linear relaxation of its program (ilp.py) and then that program. Otherwise
plans further and further from the optimum are tried.

The search ends when the least bound left is within the gap of the best plan known, baselines included, or when time is
up. It reports the least bound, which holds for all devices, orders, and micro-batch sizes whose costs are known.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from llmpq.spec import InfeasibleError, NotMeasuredError, Solved, UsageError
from planner.advice.infeasible import no_plan
from planner.baselines.systems import Baseline, best_baselines
from planner.cost_arrays import Configuration, Costs
from planner.objective import Program
from planner.problem import Problem
from planner.solver import ilp
from planner.solver.candidate import Candidate, to_solved
from planner.solver.orders import Order, device_orders, device_sets, exhaustive
from planner.solver.realization import realize
from planner.solver.unordered_program import LayerCounts, UnorderedProgram

REASON_S = 10.0  # for a plan that shows why there is none
FIRST_TRY_S = 2.0  # for one integer program; doubled whenever its turn comes again
MARGIN_S = 1.0  # before the time limit: solvers stop a little late, and building a program takes time
MAX_WINDOW = 16  # layers


def solve(problem: Problem) -> Solved:
    """The best plan found in time. Raises InfeasibleError, UsageError, NotMeasuredError."""
    if (solved := _searched(problem)) is not None:
        return solved
    costs = Costs.of(problem)
    raise _one_reason(problem) or no_plan(costs, _orders(costs))


def _searched(problem: Problem) -> Solved | None:
    """The best plan found in time; None: there is none. Raises as `solve` does, also if time was too short to tell."""
    started, limit_s = time.perf_counter(), problem.constraints.time_limit_s
    costs = Costs.of(problem)
    orders = _orders(costs)
    search = _Search(costs, deadline=started + limit_s - min(MARGIN_S, 0.05 * limit_s))
    search.known(best_baselines(costs, orders).values())
    bound = search.run(orders)
    if search.best is None:
        if bound < math.inf and time.perf_counter() >= search.deadline:
            raise InfeasibleError(f"no plan was found within {limit_s:g} s; allow more time")
        if bound < math.inf:
            raise InfeasibleError(
                f"no plan was found, but not all orders of {len(costs.kinds)} devices were tried; exclude some, or ask "
                "for less"
            )
        return None
    return to_solved(costs, search.best, solver=ilp.SOLVER, bound=bound, seconds=time.perf_counter() - started)


def _one_reason(problem: Problem) -> InfeasibleError | None:
    """The error that names the one kind of constraint without which there is a plan, if there is such a kind."""
    for what, easier in problem.constraints.easier():
        try:
            solved = _searched(replace(problem, constraints=replace(easier, time_limit_s=REASON_S)))
        except (InfeasibleError, NotMeasuredError, UsageError):
            continue
        if solved is None:
            continue
        ttft_s, rounds = solved.prediction.prefill_s, problem.workload.rounds or 1
        return InfeasibleError(
            f"no plan keeps to {what}; without that there is one, with a TTFT of {ttft_s:.3g} s and a TPOT of "
            f"{solved.prediction.decode_s / rounds:.3g} s: relax it"
        )
    return None


def baseline_plans(problem: Problem) -> dict[Baseline, Solved]:
    """The best plan of each kind of baseline that is feasible under the same constraints."""
    started = time.perf_counter()
    costs = Costs.of(problem)
    return {
        kind: to_solved(
            costs,
            found,
            solver="enumeration",
            bound=found.value.objective,
            seconds=time.perf_counter() - started,
        )
        for kind, found in best_baselines(costs, _orders(costs)).items()
    }


def _orders(costs: Costs) -> list[Order]:
    def together(order: Order) -> bool:
        return costs.constraints.together([costs.cluster.devices[d].name for d in order])

    return device_orders(costs.kinds, required=costs.required, max_stages=costs.spec.num_layers + 2, together=together)


class _Known(IntEnum):
    """The source of a node's bound, which determines the next step."""

    NOTHING = 0
    RELAXED_POOL = 1
    POOL = 2
    ORDER = 3  # that of its pool
    RELAXED_ORDER = 4


@dataclass(frozen=True)
class _Node:
    """Plans with these micro-batch sizes and devices, or in one order of them; none is better than `bound`."""

    bound: float
    pool: UnorderedProgram
    order: Order | None = None
    outline: LayerCounts | None = None  # an optimum of the pool
    window: int = 1  # layers by which plans may differ from that
    known: _Known = _Known.NOTHING
    try_s: float = FIRST_TRY_S  # for an integer program


@dataclass
class _Search:
    costs: Costs
    deadline: float
    best: Candidate | None = None
    _open: list[tuple[float, int, _Node]] = field(default_factory=list)
    _pushed: Iterator[int] = field(default_factory=itertools.count)

    def known(self, candidates: Iterable[Candidate]) -> None:
        """Take feasible candidates into account."""
        for found in candidates:
            if found.value.feasible and (self.best is None or found.value.objective < self.best.value.objective):
                self.best = found

    def run(self, orders: Sequence[Order]) -> float:
        """Search all devices, orders and micro-batch sizes; returns the bound. `orders` are tried if they are all."""
        for pool in self._pools():
            self._push(_Node(pool.floor(), pool))
        finished = math.inf
        while self._open:
            least, _, node = self._open[0]
            if self._close_enough(least) or time.perf_counter() >= self.deadline:
                break
            heapq.heappop(self._open)
            if node.known == _Known.NOTHING:
                bound = max(node.bound, node.pool.bound())
                self._push(replace(node, bound=bound, known=_Known.RELAXED_POOL))
            elif node.known == _Known.RELAXED_POOL:
                self._solve_pool(node)
            elif node.known == _Known.POOL and not exhaustive(self.costs.kinds):
                finished = min(finished, self._look_further(node))
            elif node.known == _Known.POOL:
                for order in orders:
                    if _suits(order, node.pool):
                        self._push(replace(node, order=order, known=_Known.ORDER))
            elif node.known == _Known.ORDER:
                bound = max(node.bound, ilp.bound(self._program(node)))
                self._push(replace(node, bound=bound, known=_Known.RELAXED_ORDER))
            else:
                finished = min(finished, self._solve_order(node))
        left = self._open[0][0] if self._open else math.inf
        return min(finished, left)

    def _pools(self) -> Iterator[UnorderedProgram]:
        kinds, required = self.costs.kinds, self.costs.required
        by_set = self.costs.constraints.objective == "cost"
        sets = device_sets(kinds) if by_set else [tuple(sorted(kinds, key=lambda d: (kinds[d], d)))]
        several = [devices for devices in sets if len(devices) > 1 and required <= set(devices)]
        alone = [(d,) for d in sorted(set(kinds.values())) if required <= {d}]
        for prefill, decode in itertools.product(self.costs.prefill, self.costs.decode):
            for devices in several:
                yield UnorderedProgram(self.costs, prefill, decode, devices, alone=False, all_used=by_set)
            for devices in alone:
                yield UnorderedProgram(self.costs, prefill, decode, devices, alone=True)

    def _close_enough(self, bound: float) -> bool:
        return self.best is not None and bound >= self.best.value.objective * (1 - self.costs.constraints.gap)

    def _push(self, node: _Node) -> None:
        if node.bound < math.inf:
            heapq.heappush(self._open, (node.bound, next(self._pushed), node))

    def _time_for(self, node: _Node) -> float:
        return min(node.try_s, max(0.1, self.deadline - time.perf_counter()))

    def _solve_pool(self, node: _Node) -> None:
        """Solve the program without an order, and make a plan of its optimum."""
        optimum = node.pool.solve(time_limit_s=self._time_for(node), gap=self.costs.constraints.gap / 2)
        node = replace(node, bound=max(node.bound, optimum.bound), outline=optimum.outline)
        if not self._close_enough(node.bound):
            self._realize(node)
        if optimum.proven:
            self._push(replace(node, known=_Known.POOL, try_s=FIRST_TRY_S))
        else:
            self._push(replace(node, try_s=2 * node.try_s))

    def _look_further(self, node: _Node) -> float:
        """Look for plans further from the outline; returns the node's bound if that was the last time, else inf."""
        if node.outline is None or node.window >= MAX_WINDOW:
            return node.bound
        node = replace(node, window=2 * node.window, try_s=2 * node.try_s)
        self._realize(node)
        self._push(node)
        return math.inf

    def _realize(self, node: _Node) -> None:
        if node.outline is not None:
            limits = {"time_limit_s": self._time_for(node), "gap": self.costs.constraints.gap / 2}
            self.known(realize(node.pool, node.outline, window=node.window, **limits))

    def _solve_order(self, node: _Node) -> float:
        """Solve the program of one order; returns its bound if it is done with, inf if it goes back into the queue."""
        gap = self.costs.constraints.gap
        result = ilp.solve(self._program(node), time_limit_s=self._time_for(node), gap=gap)
        if result.assignment is not None:
            self.known([Candidate.of(self.costs, self._choice(node), result.assignment)])
        bound = max(node.bound, result.bound)
        if result.proven:
            return bound
        self._push(replace(node, bound=bound, try_s=2 * node.try_s))
        return math.inf

    def _choice(self, node: _Node) -> Configuration:
        assert node.order is not None
        return Configuration(node.order, node.pool.prefill, node.pool.decode)

    def _program(self, node: _Node) -> Program:
        return self.costs.program(self._choice(node))


def _suits(order: Order, pool: UnorderedProgram) -> bool:
    """Whether the pool includes plans in this order."""
    if pool.alone or pool.all_used:
        return set(order) == set(pool.devices)
    return len(order) > 1
