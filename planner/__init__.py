"""The planner: from measured costs and sensitivities to the best plan that fits memory and quality budget.

Reading order: problem.py and constraints.py (what is given), objective.py (what is minimised), ilp.py (the integer
program), pool.py (the one without an order), lengths.py, memory.py, costs.py (their arrays), search.py with orders.py,
realize.py and found.py (what is decided around them); predict.py (what will happen, step by step); baselines.py with
line.py, adabits.py and transfer.py (what others do); infeasible.py, relax.py, changes.py and explain.py (why, and what
could be otherwise); tensor.py (stages of several devices, on paper); planning.py (all of it as one function). Data
types of `llmpq.spec` in, a `Plan` out; it never sees a tensor.
"""

from planner.changes import Change
from planner.constraints import AtMost, Constraints
from planner.explain import Explanation, explain
from planner.planning import plan
from planner.predict import Simulation, predict, replay, simulate
from planner.problem import Problem
from planner.relax import Relaxation, relaxations
from planner.search import baselines, solve
from planner.tensor import with_groups

__all__ = [
    "AtMost",
    "Change",
    "Constraints",
    "Explanation",
    "Problem",
    "Relaxation",
    "Simulation",
    "baselines",
    "explain",
    "plan",
    "predict",
    "relaxations",
    "replay",
    "simulate",
    "solve",
    "with_groups",
]
