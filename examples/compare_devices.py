"""What would a second GPU, more memory or another quality buy? Asked by solving again, not by guessing."""

from dataclasses import replace

from plan_by_hand import COSTS, DEVICES, LINKS, MODEL, SENSITIVITY, WORK

import planner
from llmpq.spec import Cluster, Link, Solved


def speed(solved: Solved) -> float:
    return solved.prediction.tokens_per_s


problem = planner.Problem(
    spec=MODEL,
    cluster=Cluster(DEVICES, LINKS),
    workload=WORK,
    profile=COSTS,
    sensitivity=SENSITIVITY,
    constraints=planner.Constraints(omega_budget=20.0, gap=0.005),
)
plan = planner.solve(problem)
print(f"as it is: {speed(plan):.1f} tokens/s")

# A second fast device: a new name, the costs of the first one, and a link like the others to each device.
second = replace(DEVICES[0], name="second", index=2)
pairs = [(a, b) for other in ("fast", "slow") for a, b in ((other, "second"), ("second", other))]
links = (*LINKS, *(Link(a, b, latency_s=20e-6, bytes_per_s=10e9) for a, b in pairs))
more = replace(
    problem,
    cluster=Cluster((*DEVICES, second), links),
    profile=replace(COSTS, tables={**COSTS.tables, "second": COSTS.tables["fast"]}, links=links),
)
print(f"a second fast device: {speed(planner.solve(more)):.1f} tokens/s")

found = planner.explain(plan, problem)
for change in sorted(found.changes, key=lambda change: -change.tokens_per_s):
    gain = change.tokens_per_s / speed(plan) - 1
    print(f"{change.what}: {change.tokens_per_s:.1f} tokens/s ({100 * gain:+.1f} %)")
for what in found.unmet:
    print(f"{what}: no plan")
