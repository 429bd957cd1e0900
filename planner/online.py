"""Plans for requests that come at random: the most of them a second, within limits of what each may wait.

What requests wait for each other is in no closed form. So nothing here is optimal but what the integer programs say of
a batch; the rest is searched, and judged by simulations of the runtime's own schedule (simulation.py):

- Candidates are the best plans for batches (solver/search.py) of 1, 2, 4, ... sequences up to the workload's: these are
  then the slots. Each is solved with any micro-batch of prefill, and with one of a single sequence, which holds those
  up least who decode.
- The rate that a plan attains is bisected to PRECISION, between none and the requests a second of a queue that is
  there from the start; more would only make the queue longer. It is assumed that what keeps to the limits at one rate
  does so at lower ones. A plan that does not do better than the best one so far is left after two simulations.
- From the best candidate on, micro-batch sizes, the chunks in which prompts are computed beside others, the widths of
  stages' KV caches and the layers at the ends of stages are changed one at a time, as long as memory and the quality
  budget allow and the rate rises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, islice, product

from llmpq.spec import (
    Attained,
    Demand,
    InfeasibleError,
    Latency,
    NotMeasuredError,
    Plan,
    Solution,
    Solved,
    UsageError,
)
from llmpq.spec.demand import PERCENT, at_percent
from planner.chunks import batch_prediction, fits, near_chunks, with_chunks
from planner.clock import Clock
from planner.objective import SLACK
from planner.problem import Problem
from planner.simulation import simulate
from planner.solver.search import best_plan, solve

PRECISION = 0.01  # relative, of a rate
PROGRAMS = 0.6  # of the time, at most; what is left is for the search around the best candidate
_HALVINGS = 20  # of a rate, until it is none
_SOLVER = "programs and simulation"


def solve_online(problem: Problem, demand: Demand, clock: Clock | None = None) -> Solved:
    """The plan found before the clock runs out that attains the most requests a second within the demand's limits.

    `problem.workload.batch_size` is the most that are computed at once. The objective of the solution is seconds for a
    request, without a bound. Raises InfeasibleError if no plan does what is demanded, with what is attainable;
    UsageError, NotMeasuredError.
    """
    started, constraints = time.perf_counter(), problem.constraints
    if not (math.isinf(constraints.max_ttft_s) and math.isinf(constraints.max_tpot_s)):
        raise UsageError("the limits of latency are those of a batch, or of a demand; give them once")
    if constraints.objective != "time":
        raise UsageError(f"a demand asks for most requests, not for least {constraints.objective}; leave that out")
    names = [device.name for device in problem.cluster.devices]
    constraints.check(problem.spec, names, problem.workload.batch_size)
    clock = clock or Clock.of(constraints.time_limit_s)
    judge = _Judge(problem, demand)
    best, most = None, 0.0
    found = []
    for candidate in _candidates(problem, clock.part(PROGRAMS)):
        found.append(candidate.plan)
        if (rate := judge.most(candidate.plan, most)) > most:
            best, most = candidate, rate
    if not found:
        least = replace(problem.workload, batch_size=_slots(problem)[-1])
        solve(replace(problem, workload=least), clock)  # raises why there is none
        raise InfeasibleError("no plan was found in time; allow more")
    if best is None:
        raise judge.impossible(found)
    plan, most = _improved(judge, best.plan, most, clock)
    if demand.rate is not None and most < demand.rate:
        raise InfeasibleError(
            f"no plan was found that answers {demand.rate:g} requests/s within the limits; {most:.3g} are attainable"
        )
    omega = best.solution.omega if plan == best.plan else problem.omega(plan)
    solution = Solution(_SOLVER, 1 / most, 0.0, time.perf_counter() - started, omega, best.solution.omega_budget)
    prediction = best.prediction if plan == best.plan else batch_prediction(plan, problem)
    online = Attained(demand, most, judge.latency(plan, demand.rate or most))
    return Solved(plan, prediction, solution, online=online)


def _candidates(problem: Problem, clock: Clock) -> Iterator[Solved]:
    """The best plans of batches, the largest ones first; of those that are alike one."""
    given = problem.constraints.prefill_microbatch
    tries = [*product((None, 1) if given is None else (given,), _slots(problem))]
    seen: set[Plan] = set()
    for i, (prefill, size) in enumerate(tries):
        constraints = replace(problem.constraints, prefill_microbatch=prefill)
        batch = replace(problem, workload=replace(problem.workload, batch_size=size), constraints=constraints)
        try:
            solved = best_plan(batch, clock.part(1 / (len(tries) - i)))
        except (InfeasibleError, NotMeasuredError):
            continue
        if solved is not None and solved.plan not in seen:
            seen.add(solved.plan)
            yield with_chunks(solved, problem, clock)


def _slots(problem: Problem) -> list[int]:
    """How many sequences at once are tried, most first: no fewer than a micro-batch that is asked for."""
    most, constraints = problem.workload.batch_size, problem.constraints
    least = max(constraints.prefill_microbatch or 1, constraints.decode_microbatch or 1)
    return sorted({most, least, *(2**i for i in range(most.bit_length()) if 2**i > least)}, reverse=True)


def _improved(judge: _Judge, plan: Plan, most: float, clock: Clock) -> tuple[Plan, float]:
    """The plan that small changes lead to, each of which attains more, and what it attains."""
    improved = True
    while improved:
        improved = False
        for changed in _changed(plan, judge.problem):
            if clock.over:
                return plan, most
            if _allowed(changed, judge.problem) and (rate := judge.most(changed, most)) > most:
                plan, most, improved = changed, rate, True
                break
    return plan, most


def _allowed(plan: Plan, problem: Problem) -> bool:
    """Whether memory and the quality budget allow it."""
    budget = problem.constraints.budget(problem.spec, problem.sensitivity)
    return fits(plan, problem) and problem.omega(plan) <= budget * (1 + SLACK)


def _changed(plan: Plan, problem: Problem) -> Iterator[Plan]:
    """With other sizes of micro-batches and chunks, another KV cache, or a layer at the end of a stage on the next one.

    As the constraints allow.
    """
    constraints = problem.constraints
    if constraints.prefill_microbatch is None:
        for size in _near(plan.prefill_microbatch, plan.slots):
            yield replace(plan, prefill_microbatch=size)
    if constraints.decode_microbatch is None:
        for size in _near(plan.decode_microbatch, plan.slots):
            yield replace(plan, decode_microbatch=size)
    for tokens in near_chunks(plan):
        yield replace(plan, chunk_tokens=tokens)
    for i, stage in enumerate(plan.stages):
        for bits in constraints.kv_bits:
            if bits != stage.kv_bits and stage.precisions:
                changed = replace(stage, kv_bits=bits)
                yield replace(plan, stages=(*plan.stages[:i], changed, *plan.stages[i + 1 :]))
    for i, (before, after) in enumerate(zip(plan.stages, plan.stages[1:])):
        (first, border), (_, end) = before.layers, after.layers
        precisions = before.precisions + after.precisions
        for at in (border - 1, border + 1):
            moved = f"layer.{min(at, border)}"
            if first < at < end and moved not in constraints.pinned:
                stages = list(plan.stages)
                stages[i] = replace(before, layers=(first, at), precisions=precisions[: at - first])
                stages[i + 1] = replace(after, layers=(at, end), precisions=precisions[at - first :])
                yield replace(plan, stages=tuple(stages))


def _near(size: int, most: int) -> list[int]:
    return sorted(other for other in {size // 2, size - 1, size + 1, 2 * size} - {size} if 1 <= other <= most)


class _Judge:
    """Simulates plans under a demand."""

    def __init__(self, problem: Problem, demand: Demand) -> None:
        self.problem, self.demand = problem, demand
        workload = problem.workload
        sample = list(zip(workload.prompt_lens, workload.output_lens, strict=True))
        lengths = islice(cycle(sample or [(workload.prompt_len, workload.output_len)]), demand.requests)
        self._prompt_lens, self._output_lens = map(list, zip(*lengths, strict=True))

    def latency(self, plan: Plan, rate: float) -> Latency:
        """Of requests that come at this rate; inf: all at once. Raises NotMeasuredError."""
        arrivals_s = None if math.isinf(rate) else self.demand.arrivals_s(rate)
        problem, lens = self.problem, (self._prompt_lens, self._output_lens)
        return simulate(plan, problem.spec, problem.profile, *lens, arrivals_s).latency

    def most(self, plan: Plan, least: float = 0.0) -> float:
        """Requests a second that a plan attains; 0 if not more than `least`, or if its costs are not known."""
        try:
            return self._most(plan, least * (1 + PRECISION))
        except NotMeasuredError:
            return 0.0

    def _most(self, plan: Plan, least: float) -> float:
        high = self.latency(plan, math.inf).requests_per_s
        if high <= least or (least and not self._keeps(plan, least)):
            return 0.0
        if self._keeps(plan, high):
            return high
        low = least or next((rate for i in range(_HALVINGS) if self._keeps(plan, rate := high / 2 ** (i + 1))), 0.0)
        high = high if least else min(high, 2 * low)
        while high > low * (1 + PRECISION):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._keeps(plan, middle) else (low, middle)
        return low

    def _keeps(self, plan: Plan, rate: float) -> bool:
        return self.demand.kept_by(self.latency(plan, rate))

    def impossible(self, plans: Sequence[Plan]) -> InfeasibleError:
        """Why none of them attains anything: what requests take that come one by one."""
        found = []
        for plan in plans:
            with suppress(NotMeasuredError):
                found.append(self.latency(plan, self.latency(plan, math.inf).requests_per_s / 2**_HALVINGS))
        if not found:
            return InfeasibleError("the costs do not reach the lengths of the requests; measure them for these")
        ttft_s = min(at_percent(latency.ttft_s) for latency in found if latency.ttft_s is not None)
        tpot_s = min((at_percent(latency.tpot_s) for latency in found if latency.tpot_s is not None), default=0.0)
        return InfeasibleError(
            f"no plan was found that keeps to the limits, however few requests come: {PERCENT} % of them take a TTFT "
            f"of {ttft_s:.3g} s and a TPOT of {tpot_s:.3g} s at least; allow more"
        )
