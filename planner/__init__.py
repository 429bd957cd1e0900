"""The planner: from measured costs and sensitivities to the best plan that fits memory and quality budget.

Reading order: objective.py (what is minimised), ilp.py (the integer program), memory.py, costs.py (its arrays),
search.py (what is decided around it). Data types of `llmpq.spec` in, a `Plan` out; it never sees a tensor.
"""

from planner.constraints import Constraints
from planner.predict import predict
from planner.search import baselines, solve

__all__ = ["Constraints", "baselines", "predict", "solve"]
