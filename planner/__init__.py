"""The planner: from measured costs and sensitivities to the best plan that fits memory and quality budget.

`solve(Problem(...))` is all that most users need; for a server, `solve_online(Problem(...), Demand(...))`. Reading
order:

    problem.py, constraints.py          the inputs
    objective.py                        what is minimised
    mixed.py                            what units may be stored in, where linears of a layer may differ
    lengths.py, memory.py, step_costs.py    steps, bytes and seconds
    cost_arrays.py                      all of these, as arrays over units, devices and options
    clock.py                            when a call must have answered
    solver/ilp.py                       the integer program of one device order
    solver/unordered_program.py         the one without an order, which counts layers; pool.py has what it is given
    solver/search.py                    the search around both
    solver/realization.py               from the optimum without an order to plans: link_order.py, local_search.py
    simulation.py                       a plan step by step, for the lengths that occur
    online.py                           plans for requests that come at random, judged by the simulation
    baselines/                          what other systems would do: systems.py, with a file for each of their methods
    advice/                             why a plan is as it is, and what would help where there is none
    device_groups.py                    stages of several devices (tensor parallelism), on paper

It imports data types of `llmpq.spec` only, never torch.
"""

from planner.advice.changes import Change
from planner.advice.explanation import Explanation, explain
from planner.advice.relaxation import Relaxation, relaxations
from planner.advice.usual_ways import UsualWay, find_usual_ways
from planner.chunks import with_chunks
from planner.clock import Clock
from planner.constraints import Constraints, DeviceLimit
from planner.device_groups import with_groups
from planner.online import solve_online
from planner.problem import Problem
from planner.reach import check_measured
from planner.simulation import Simulation, predict, replay, simulate
from planner.solver.search import baseline_plans, solve

__all__ = [
    "Change",
    "Clock",
    "Constraints",
    "DeviceLimit",
    "Explanation",
    "Problem",
    "Relaxation",
    "Simulation",
    "UsualWay",
    "baseline_plans",
    "check_measured",
    "explain",
    "find_usual_ways",
    "predict",
    "relaxations",
    "replay",
    "simulate",
    "solve",
    "solve_online",
    "with_chunks",
    "with_groups",
]
