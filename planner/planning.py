"""The planner as one function of what it is given."""

from __future__ import annotations

from dataclasses import replace

from llmpq.spec import Cluster, ModelSpec, Plan, Profile, Sensitivity, UsageError, Workload
from planner.constraints import Constraints
from planner.problem import Problem
from planner.solver.search import solve


def plan(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    costs: Profile,
    sensitivity: Sensitivity,
    quality: float | None = None,
    constraints: Constraints | None = None,
) -> Plan:
    """The best plan found: devices in order, layers and bits of each, and micro-batches of both phases.

    `model`        Architecture: what has to be placed, and how many bytes it takes.
    `cluster`      The devices there are, each with what it may hold in bytes (above the idle process; None: no cap).
    `workload`     Sequences in a batch, and the tokens of their prompts and answers.
    `costs`        Seconds of every operation on every device, by its name in the cluster, and the links between all of
                   them; measured by `llmpq profile` or made by hand.
    `sensitivity`  What each unit (embedding, layers, head) loses at each width, additive; 16 bit loses nothing.
    `quality`      The most that may be lost: the budget of the summed sensitivity, in its own unit. None: as much as
                   with 4 bits everywhere; math.inf: any loss.
    `constraints`  Everything else: allowed widths, pinned units, devices in use, limits of latency, the price of
                   sensitivity in seconds (theta), and how long to look. Its own budget must be unset if `quality` is
                   given.

    The plan says what is expected of it (`Plan.predicted`, seconds and bytes) and how good it is known to be
    (`Plan.solution`: bound and gap over all devices, orders and micro-batches). It is never worse than a baseline.

    Raises InfeasibleError if no plan meets caps, budget and constraints (`planner.relaxations` says what would help),
    NotMeasuredError if a cost is missing, UsageError for what contradicts itself.

    After LLM-PQ (arXiv 2403.01136, section 4), with another program: see ilp.py.
    """
    constraints = constraints or Constraints()
    if quality is not None:
        if not quality >= 0:
            raise UsageError(f"the quality budget is {quality}; it is a sum of sensitivities, 0 or more")
        if constraints.omega_budget is not None:
            raise UsageError("the quality budget is given twice; leave constraints.omega_budget out")
        constraints = replace(constraints, omega_budget=quality)
    if sensitivity.model_hash != model.content_hash:
        raise UsageError(
            f"the sensitivities are those of another model: {sensitivity.model} ({sensitivity.model_hash}), not "
            f"{model.name} ({model.content_hash})"
        )
    return solve(Problem(model, cluster, workload, costs, sensitivity, constraints))
