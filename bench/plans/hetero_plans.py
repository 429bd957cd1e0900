"""The plans that `python -m bench.plans.hetero` compares: ours, what others would do, and ours with one idea switched
off.

All of a problem have the same budget of summed sensitivity: that of 4 bit everywhere, or of 3 bit where an even split
of 4 bit does not fit the devices, so that the usual way is among them where it can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import planner
from llmpq.spec import InfeasibleError, Plan, Solved, Workload

OURS, EVEN = "llmpq", "uniform"
ONE_PHASE, ONE_WIDTH, ONE_SIZE, AS_PREDICTED = "one phase", "one width", "one size", "as predicted"
BUDGETS = (4, 3)  # bits


def omega(problem: planner.Problem, plan: Plan) -> float:
    """The summed sensitivity of a plan's weights."""
    return sum(problem.sensitivity.of(unit, plan.precision(unit)) for unit in problem.spec.units)


def contenders(problem: planner.Problem) -> tuple[planner.Problem, int, dict[str, Solved]]:
    """The problem with its budget, the bits that this is of, and our plan and every baseline by name.

    Raises InfeasibleError if there is no plan of ours.
    """
    found = []
    for bits in BUDGETS:
        precision = problem.constraints.precision(bits)
        budget = sum(problem.sensitivity.of(unit, precision) for unit in problem.spec.units)
        limited = replace(problem, constraints=replace(problem.constraints, omega_budget=budget))
        found.append((limited, bits, planner.baseline_plans(limited)))
        if EVEN in found[-1][2]:
            break
    else:  # no even split fits: what is asked for is 4 bit, then
        found = found[:1]
    limited, bits, others = found[-1]
    return limited, bits, {OURS: planner.solve(limited), **{str(kind): solved for kind, solved in others.items()}}


def ablations(problem: planner.Problem, full: Plan) -> dict[str, Plan]:
    """Our plan without one idea each, by its name; without those for which nothing is feasible.

    ONE_PHASE   Planned for prefill alone, with one size of micro-batches.
    ONE_WIDTH   The best plan with the same bits everywhere.
    ONE_SIZE    One micro-batch for each stage of the full plan in both phases.
    """
    constraints, workload = problem.constraints, problem.workload
    size = -(-workload.batch_size // len(full.stages))
    # What has to fit is all that decode will need, which a longer longest prompt stands for.
    only_prefill = Workload(workload.batch_size, workload.prompt_len, 1, max_prompt_len=workload.max_length - 1)
    widths = (replace(constraints, bits=(option.width,)) for option in constraints.options(problem.spec))
    candidates = {
        ONE_PHASE: [replace(problem, workload=only_prefill)],
        ONE_WIDTH: [replace(problem, constraints=one) for one in widths],
        ONE_SIZE: [replace(problem, constraints=replace(constraints, prefill_microbatch=size, decode_microbatch=size))],
    }
    best = {name: _best(problems) for name, problems in candidates.items()}
    if (one_phase := best[ONE_PHASE]) is not None:
        # The size of decode did not count. That of prefill fits, as memory is planned for the larger of both.
        best[ONE_PHASE] = replace(
            one_phase,
            workload=workload,
            max_length=workload.max_length,
            decode_microbatch=one_phase.prefill_microbatch,
        )
    return {name: plan for name, plan in best.items() if plan is not None}


def _best(problems: Iterable[planner.Problem]) -> Plan | None:
    """The best of their plans; None if none has one."""
    best, least = None, math.inf
    for problem in problems:
        try:
            solved = planner.solve(problem)
        except InfeasibleError:
            continue
        if solved.solution.objective < least:
            best, least = solved.plan, solved.solution.objective
    return best


def same_as(plans: dict[str, Plan]) -> dict[str, str]:
    """For each plan the first that does the very same: it need not run twice."""
    first: dict[Plan, str] = {}
    return {name: first.setdefault(plan, name) for name, plan in plans.items()}
