"""The planner: from measured costs and sensitivities to the best plan that fits memory and quality budget.

Reading order: problem.py and constraints.py (what is given), objective.py (what is minimised), ilp.py (the integer
program), unordered_program.py (the one without an order), lengths.py, memory.py, cost_arrays.py (their arrays),
search.py with orders.py, realization.py and candidate.py (what is decided around them); simulation.py (what will
happen, step by step); systems.py with ordered_costs.py, adabits.py and transfer.py (what others do); infeasible.py,
relaxation.py, changes.py and explanation.py (why, and what could be otherwise); device_groups.py (stages of several
devices, on paper); planning.py (all of it as one function). Data types of `llmpq.spec` in, a `Plan` out; it never sees
a tensor.
"""

from planner.advice.changes import Change
from planner.advice.explanation import Explanation, explain
from planner.advice.relaxation import Relaxation, relaxations
from planner.constraints import Constraints, DeviceLimit
from planner.device_groups import with_groups
from planner.planning import plan
from planner.problem import Problem
from planner.simulation import Simulation, predict, replay, simulate
from planner.solver.search import baseline_plans, solve

__all__ = [
    "Change",
    "Constraints",
    "DeviceLimit",
    "Explanation",
    "Problem",
    "Relaxation",
    "Simulation",
    "baseline_plans",
    "explain",
    "plan",
    "predict",
    "relaxations",
    "replay",
    "simulate",
    "solve",
    "with_groups",
]
