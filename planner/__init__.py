"""The planner: from measured costs and sensitivities to the best plan that fits memory and quality budget.

Reading order: objective.py (what is minimised), ilp.py (the integer program), pool.py (the one without an order),
memory.py, costs.py (their arrays), search.py (what is decided around them); baselines.py with line.py, adabits.py and
transfer.py (what others do); relax.py and explain.py (what could be otherwise). Data types of `llmpq.spec` in, a `Plan`
out; it never sees a tensor.
"""

from planner.constraints import Constraints
from planner.explain import Explanation, explain
from planner.predict import predict
from planner.problem import Problem
from planner.relax import Relaxation, relaxations
from planner.search import baselines, solve

__all__ = [
    "Constraints",
    "Explanation",
    "Problem",
    "Relaxation",
    "baselines",
    "explain",
    "predict",
    "relaxations",
    "solve",
]
