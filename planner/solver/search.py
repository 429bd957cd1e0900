"""The search around the integer programs: devices, their order, and both micro-batch sizes.

Best first: the node with the least lower bound is refined next. A node is a pair of micro-batch sizes, for pipelines
and single devices apart, and if cost is the objective for each set of devices apart, as the price of a second is then a
constant. Its bound comes from the linear relaxation of the program without an order (unordered_program.py), then from
that program itself, whose optimum is turned into plans (realization.py). If devices are few enough to list all their
orders, each order is a node next, with the linear relaxation of its program (ilp.py) and then that program. Otherwise
plans further and further from the optimum are tried.

Bounds alone find no plan, and there may be many. So about half of the time goes to the programs of likely nodes: those
whose relaxation is known, in the order of their bounds; all are tried once before any is tried for longer.

The search ends when the least bound left is within the gap of the best plan known, baselines included, or when time is
up. It reports the least bound, which holds for all devices, orders, and micro-batch sizes whose costs are known.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import get_args

from llmpq.spec import InfeasibleError, NotMeasuredError, Solved, UsageError
from planner.advice.infeasible import is_too_large, least_pools, no_plan
from planner.baselines.systems import Baseline, best_baselines
from planner.clock import Clock
from planner.cost_arrays import Configuration, Costs
from planner.objective import Program
from planner.problem import Problem
from planner.solver import ilp, unordered_program
from planner.solver.candidate import Candidate, to_solved
from planner.solver.orders import Order, device_sets, exhaustive
from planner.solver.pool import LayerCounts, Pool
from planner.solver.realization import realize
from planner.solver.solving import SOLVER

BASELINES = 0.2  # of the time, at most
REASON_S = 10.0  # for a plan that shows why there is none
FIRST_TRY_S = 2.0  # for one integer program; doubled whenever its turn comes again
FIRST_TRY = 0.2  # of the time left, at most
MARGIN_S = 1.0  # before the time limit: solvers stop a little late, and building a program takes time
LIKELY = 4  # linear programs after which the likeliest node has its turn, at least
PROGRAM = 1000  # linear programs that take about as long as an integer one, times the devices
MAX_SETS = 2000  # of devices, each of which is planned for, where cost is the objective
MAX_WINDOW = 16  # layers


def solve(problem: Problem, clock: Clock | None = None) -> Solved:
    """The best plan found before the clock, by default that of the time limit, runs out.

    Raises InfeasibleError, UsageError, NotMeasuredError.
    """
    clock = clock or Clock.of(problem.constraints.time_limit_s)
    if (solved := best_plan(problem, clock)) is not None:
        return solved
    raise _one_reason(problem, clock) or no_plan(Costs.of(problem), clock)


def best_plan(problem: Problem, clock: Clock) -> Solved | None:
    """The best plan found in time; None: there is none. Raises as `solve` does, also if time was too short to tell."""
    started, limit_s = time.perf_counter(), clock.left_s
    search = _Search(Costs.of(problem), Clock(clock.end - min(MARGIN_S, 0.05 * clock.left_s)))
    search.known(best_baselines(search.costs, search.clock.part(BASELINES)).values())
    if search.best is None:
        if is_too_large(search.costs, search.clock):
            return None
        search.fit()
    bound = search.run()
    if search.best is not None:
        return to_solved(search.costs, search.best, solver=SOLVER, bound=bound, seconds=time.perf_counter() - started)
    if bound == math.inf:
        return None
    if search.clock.over:
        raise InfeasibleError(f"no plan was found within {limit_s:.3g} s; allow more time")
    raise InfeasibleError(
        f"no plan was found, but not all orders of {len(search.costs.kinds)} devices were tried; exclude some, or ask "
        "for less"
    )


def _one_reason(problem: Problem, clock: Clock) -> InfeasibleError | None:
    """The error that names the one kind of constraint without which there is a plan, if there is such a kind."""
    easier = problem.constraints.easier()
    for i, (what, constraints) in enumerate(easier):
        try:
            share = clock.part(1 / (len(easier) + 1 - i), most_s=REASON_S)
            solved = best_plan(replace(problem, constraints=constraints), share)
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


def baseline_plans(
    problem: Problem, clock: Clock | None = None, kinds: Collection[Baseline] = get_args(Baseline)
) -> dict[Baseline, Solved]:
    """The best plan of each kind of baseline that is feasible under the same constraints, as far as time allows."""
    started = time.perf_counter()
    clock = clock or Clock.of(problem.constraints.time_limit_s)
    costs = Costs.of(problem)
    found = best_baselines(costs, clock, kinds)
    seconds = time.perf_counter() - started
    return {
        kind: to_solved(costs, best, solver="enumeration", bound=best.value.objective, seconds=seconds)
        for kind, best in found.items()
    }


class _Known(IntEnum):
    """The source of a node's bound, which determines the next step."""

    SET = -1  # least seconds of any devices, and the price of these
    NOTHING = 0
    RELAXED_POOL = 1
    POOL = 2
    ORDER = 3  # that of its pool
    RELAXED_ORDER = 4


@dataclass(frozen=True)
class _Node:
    """Plans with these micro-batch sizes and devices, or in one order of them; none is better than `bound`."""

    bound: float
    pool: Pool  # of a SET with any micro-batch sizes
    order: Order = ()  # of an ORDER and what follows; else any
    outline: LayerCounts | None = None  # an optimum of the pool
    window: int = 1  # layers by which plans may differ from that
    known: _Known = _Known.NOTHING
    try_s: float = FIRST_TRY_S  # for an integer program


@dataclass
class _Search:
    costs: Costs
    clock: Clock
    best: Candidate | None = None
    _open: list[tuple[float, int, _Node]] = field(default_factory=list)
    _likely: list[tuple[float, float, int, _Node]] = field(default_factory=list)  # of these the relaxed pools
    _left: set[int] = field(default_factory=set)  # the numbers of the open ones; a node may be in both queues
    _pushed: Iterator[int] = field(default_factory=itertools.count)

    def known(self, candidates: Iterable[Candidate]) -> None:
        """Take feasible candidates into account."""
        for found in candidates:
            if found.value.feasible and (self.best is None or found.value.objective < self.best.value.objective):
                self.best = found

    def fit(self) -> None:
        """Look for any plan that memory allows, where there are several devices."""
        pool = next(least_pools(self.costs), None)
        if pool is None or pool.alone:
            return
        short = unordered_program.shortage(pool, self.clock.part(1 / 2), relaxed=False)
        if short is not None:
            self.known(realize(pool, short.outline, self.clock.part(1 / 2), window=1, gap=self.costs.constraints.gap))

    def run(self) -> float:
        """Search all devices, orders and micro-batch sizes; returns the bound."""
        finished, every = self._push_sets(), max(LIKELY, PROGRAM // len(self.costs.kinds))
        left = LIKELY  # linear programs until it is the likeliest node's turn
        while True:
            least = self._least()
            if self._close_enough(min(finished, least)) or least == math.inf or self.clock.over:
                break
            node = self._pop_likeliest() if left <= 0 else None
            if node is not None:
                left = every
            else:
                node = self._pop()
                left -= 1 if node.known < _Known.RELAXED_POOL else every
            finished = min(finished, self._refine(node))
        return min(finished, self._least())

    def _push_sets(self) -> float:
        """Open a node for each set of devices to plan for; returns a bound of the sets that are left out."""
        costs, kinds = self.costs, self.costs.kinds
        prefill, decode = costs.prefill[0], costs.decode[0]
        every = tuple(sorted(kinds, key=lambda d: (kinds[d], d)))
        by_set = costs.constraints.objective == "cost"
        sets = list(itertools.islice(device_sets(kinds, least=costs.least_devices), MAX_SETS)) if by_set else [every]
        seconds = min(
            Pool(costs, *sizes, every, alone=False).floor() for sizes in itertools.product(costs.prefill, costs.decode)
        ) / costs.per_second(every)
        for devices in sets:
            if len(devices) > 1 and costs.required <= set(devices):
                pool = Pool(costs, prefill, decode, devices, alone=False, all_used=by_set)
                self._push(_Node(seconds * costs.per_second(devices), pool, known=_Known.SET))
        for d in sorted(set(kinds.values())):
            if costs.required <= {d}:
                pool = Pool(costs, prefill, decode, (d,), alone=True)
                self._push(_Node(seconds * costs.per_second(pool.devices), pool, known=_Known.SET))
        if len(sets) < MAX_SETS:
            return math.inf
        cheapest = sorted(every, key=lambda d: costs.cluster.devices[d].price_per_hour)[: len(sets[-1])]
        return seconds * costs.per_second(cheapest)

    def _refine(self, node: _Node) -> float:
        """Take the next step with a node; returns its bound if that was the last one, else inf."""
        if node.known == _Known.SET:
            for prefill, decode in itertools.product(self.costs.prefill, self.costs.decode):
                pool = replace(node.pool, prefill=prefill, decode=decode)
                self._push(_Node(max(node.bound, pool.floor()), pool))
        elif node.known == _Known.NOTHING:
            bound = max(node.bound, unordered_program.bound(node.pool, self.clock))
            self._push(replace(node, bound=bound, known=_Known.RELAXED_POOL))
        elif node.known == _Known.RELAXED_POOL:
            self._solve_pool(node)
        elif node.known == _Known.POOL and not exhaustive(self.costs.kinds):
            return self._look_further(node)
        elif node.known == _Known.POOL:
            for order in self.costs.orders():
                if _suits(order, node.pool):
                    self._push(replace(node, order=order, known=_Known.ORDER))
        elif node.known == _Known.ORDER:
            bound = max(node.bound, ilp.bound(self._program(node), self.clock))
            self._push(replace(node, bound=bound, known=_Known.RELAXED_ORDER))
        else:
            return self._solve_order(node)
        return math.inf

    def _close_enough(self, bound: float) -> bool:
        return self.best is not None and bound >= self.best.value.objective * (1 - self.costs.constraints.gap)

    def _push(self, node: _Node) -> None:
        if node.bound < math.inf:
            number = next(self._pushed)
            self._left.add(number)
            heapq.heappush(self._open, (node.bound, number, node))
            if node.known == _Known.RELAXED_POOL:
                heapq.heappush(self._likely, (node.try_s, node.bound, number, node))

    def _least(self) -> float:
        """The least bound of the open nodes."""
        while self._open and self._open[0][1] not in self._left:
            heapq.heappop(self._open)
        return self._open[0][0] if self._open else math.inf

    def _pop(self) -> _Node:
        """The open node of the least bound."""
        *_, number, node = heapq.heappop(self._open)
        self._left.remove(number)
        return node

    def _pop_likeliest(self) -> _Node | None:
        """An open node whose relaxation is known: of the least tried, the one of the least bound, if worth it."""
        while self._likely:
            *_, number, node = heapq.heappop(self._likely)
            if number in self._left and not self._close_enough(node.bound):
                self._left.remove(number)
                return node
        return None

    def _try(self, node: _Node) -> Clock:
        return self.clock.part(FIRST_TRY * node.try_s / FIRST_TRY_S, most_s=node.try_s)

    def _solve_pool(self, node: _Node) -> None:
        """Solve the program without an order, and make a plan of its optimum."""
        optimum = unordered_program.solve(node.pool, self._try(node), gap=self.costs.constraints.gap / 2)
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
            gap = self.costs.constraints.gap / 2
            self.known(realize(node.pool, node.outline, self._try(node), window=node.window, gap=gap))

    def _solve_order(self, node: _Node) -> float:
        """Solve the program of one order; returns its bound if it is done with, inf if it goes back into the queue."""
        result = ilp.solve(self._program(node), self._try(node), gap=self.costs.constraints.gap)
        if result.assignment is not None:
            self.known([Candidate.of(self.costs, self._choice(node), result.assignment)])
        bound = max(node.bound, result.bound)
        if result.proven:
            return bound
        self._push(replace(node, bound=bound, try_s=2 * node.try_s))
        return math.inf

    def _choice(self, node: _Node) -> Configuration:
        return Configuration(node.order, node.pool.prefill, node.pool.decode)

    def _program(self, node: _Node) -> Program:
        return self.costs.program(self._choice(node))


def _suits(order: Order, pool: Pool) -> bool:
    """Whether the pool includes plans in this order."""
    if pool.alone or pool.all_used:
        return set(order) == set(pool.devices)
    return len(order) > 1
