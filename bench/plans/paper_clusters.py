"""The eleven clusters of LLM-PQ's paper (arXiv 2403.01136), planned for from public figures; and some of today's.

    python -m bench.plans.paper_clusters [--only CLUSTER ...] [--out FILE]

Batch 32, prompt 512, 100 tokens, analytic devices (analytic.py) in two worlds of kernels, 100 and 800 Gbit/s between
nodes, three synthetic sensitivities. As in the paper, plans of one width have the first of 16, 8, 4 and 3 bits that
fits; ours is compared with each at no more than its summed sensitivity. Devices, models and published tokens/s are
those of the scripts and notebooks of LLM-PQ's repository. It says neither which cluster has which network nor which
GPUs share a host: here those of one type do, but for cluster 4, which has three hosts.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import planner
from bench.machine import describe, write_results
from bench.plans import analytic
from bench.plans.analytic import MODERN, PAPER, World
from bench.plans.paper_claim import FLEX, FLEX8, PE, PIPEEDGE, PQ, SHOWN, explanation
from bench.plans.pipeedge import formula_seconds, pipeedge
from bench.plans.public_figures import MODELS
from llmpq.spec import InfeasibleError, Sensitivity, Solved, Workload
from llmpq.spec.formatting import format_split
from planner.cost_arrays import Costs

WORKLOAD = Workload(32, 512, 100)
NETWORKS = (100e9 / 8, 800e9 / 8)
WIDTHS = (16, 8, 4, 3)
MIXED = ("adabits", "transfer")  # baselines that choose a width for each layer

V100, A100, A800, T4, P100 = "V100", "A100-40", "A800-80", "T4", "P100"


@dataclass(frozen=True)
class Case:
    """A cluster by nodes, its model, and the tokens/s that LLM-PQ's repository has for it."""

    name: str
    model: str
    nodes: tuple[tuple[str, ...], ...]
    published: Mapping[str, float] = field(default_factory=dict)
    worlds: tuple[World, ...] = (PAPER, MODERN)


# PipeEdge and LLM-PQ are of one series of runs, with 80 tokens; FlexGen's are the latest there are of each cluster.
CASES = (
    Case("1", "OPT-13b", ((V100,),), {PE: 11.78, PQ: 83.45, FLEX: 18.30, FLEX8: 63.74}),
    Case("2", "OPT-13b", ((A100,),), {PE: 130.6, PQ: 173.6, FLEX: 45.01}),
    Case("3", "OPT-30b", ((T4,) * 3, (V100,)), {PE: 31.09, PQ: 31.95, FLEX: 3.34, FLEX8: 10.48}),
    Case("4", "OPT-30b", ((P100,) * 2, (P100,), (V100,)), {PE: 6.01, PQ: 22.07, FLEX: 2.37, FLEX8: 7.14}),
    Case("5", "OPT-66b", ((T4,) * 4, (V100,) * 2), {PQ: 12.94, FLEX8: 5.11}),
    Case("6", "OPT-66b", ((V100,) * 2, (A100,) * 2), {PE: 39.42, PQ: 41.01}),
    Case("7", "BLOOM-176b", ((V100,) * 4, (A100,) * 4), {PE: 3.80, PQ: 10.71}),
    Case("8", "BLOOM-176b", ((V100,) * 4, (A800,) * 2), {PE: 3.16, PQ: 11.70}),
    Case("9", "OPT-30b", ((T4,) * 4,), {PE: 2.68, PQ: 6.23, FLEX: 3.10, FLEX8: 10.21}),
    Case("10", "OPT-66b", ((V100,) * 4,), {PE: 29.89, PQ: 32.73, FLEX: 7.37, FLEX8: 15.46}),
    Case("11", "BLOOM-176b", ((A800,) * 4,), {PE: 21.89, PQ: 22.27}),
    Case("H100 + 4 L4", "Llama-2-70B", (("H100",), ("L4",) * 4), worlds=(MODERN,)),
    Case("2 RTX 4090 + 2 RTX 3060", "Llama-2-70B", (("RTX 4090",) * 2, ("RTX 3060",) * 2), worlds=(MODERN,)),
    Case("RTX 4090 + RTX 3060 + CPU", "Llama-2-70B", (("RTX 4090", "RTX 3060", "CPU host"),), worlds=(MODERN,)),
    Case("H100 + CPU", "BLOOM-176b", (("H100", "CPU host"),), worlds=(MODERN,)),
)


@dataclass(frozen=True)
class Setting:
    """A case in one world with one network: what the planner is given, but for constraints and sensitivity."""

    case: Case
    world: World
    network_bytes_per_s: float | None  # None: one node
    time_limit_s: float

    def constraints(self, **changes: Any) -> planner.Constraints:
        """Without a quality budget, unless one is among the changes."""
        limits = {"group_size": self.world.group_size, "omega_budget": math.inf, "gap": 0.01}
        return planner.Constraints(**limits | {"time_limit_s": self.time_limit_s} | changes)

    def problem(self, constraints: planner.Constraints, sensitivity: Sensitivity) -> planner.Problem:
        """What is planned for."""
        spec = MODELS[self.case.model]
        cluster = analytic.cluster(self.case.nodes, self.network_bytes_per_s or math.inf)
        profile = analytic.profile(spec, cluster, WORKLOAD, self.world, self.constraints().precisions)
        return planner.Problem(spec, cluster, WORKLOAD, profile, sensitivity, constraints)

    def sensitivity(self, name: str) -> Sensitivity:
        return analytic.sensitivity(MODELS[self.case.model], name, self.constraints().precisions)

    def uniform_plans(self, sensitivity: Sensitivity) -> dict[str, Solved]:
        """PipeEdge as published, and the planner's baselines of one width: each at the first width that fits."""
        plans: dict[str, Solved] = {}
        for bits in WIDTHS:
            problem = self.problem(self.constraints(fixed_bits=bits), sensitivity)
            found = {str(name): plan for name, plan in planner.baseline_plans(problem).items() if name not in MIXED}
            published = pipeedge(Costs.of(problem))
            plans = found | ({PIPEEDGE: published} if published else {}) | plans
        return plans


def settings(time_limit_s: float, only: Sequence[str] | None) -> Iterator[Setting]:
    """Every case in its worlds; with both networks where there is more than one node."""
    for case in CASES:
        for world in case.worlds if only is None or case.name in only else ():
            for network in NETWORKS if len(case.nodes) > 1 else (None,):
                yield Setting(case, world, network, time_limit_s)


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """For each sensitivity every contender, and our plan that is at most as sensitive. The faster network has one.

    So have those contenders that choose a width for each layer.
    """
    uniform = setting.uniform_plans(setting.sensitivity("flat"))
    for name in analytic.SENSITIVITIES if setting.network_bytes_per_s != NETWORKS[1] else (SHOWN,):
        yield _row(setting, name, uniform)


def _row(setting: Setting, name: str, uniform: Mapping[str, Solved]) -> dict[str, Any]:
    sensitivity = setting.sensitivity(name)
    row: dict[str, Any] = {
        "cluster": setting.case.name,
        "model": setting.case.model,
        "world": setting.world.name,
        "network_bytes_per_s": setting.network_bytes_per_s,
        "sensitivity": name,
        "published": dict(setting.case.published),
    }

    def problem(budget: float) -> planner.Problem:
        return setting.problem(setting.constraints(omega_budget=budget), sensitivity)

    budget = _omega(uniform[PIPEEDGE], sensitivity) if PIPEEDGE in uniform else math.inf
    plans = dict(uniform)
    if name == SHOWN:
        plans |= {kind: plan for kind, plan in planner.baseline_plans(problem(budget)).items() if kind in MIXED}
    ours: dict[float, Solved] = {}
    try:
        for limit in {budget, *(_omega(plan, sensitivity) for plan in plans.values())}:
            ours[limit] = planner.solve(problem(limit))
    except InfeasibleError as error:
        return row | {"infeasible": str(error)}
    by_formula = formula_seconds(Costs.of(problem(budget)), ours[budget].plan)
    contenders = {kind: (plan, ours[_omega(plan, sensitivity)]) for kind, plan in plans.items()}
    return row | {
        "llmpq": _figures(ours[budget], sensitivity),
        "formula_tokens_per_s": WORKLOAD.batch_size * WORKLOAD.output_len / by_formula,
        "contenders": {
            kind: {**_figures(plan, sensitivity), "llmpq": _figures(best, sensitivity)}
            for kind, (plan, best) in contenders.items()
        },
    }


def _omega(solved: Solved, sensitivity: Sensitivity) -> float:
    return sum(sensitivity.of(unit, solved.plan.precision(unit)) for unit in sensitivity.omega)


def _figures(solved: Solved, sensitivity: Sensitivity) -> dict[str, Any]:
    plan = solved.plan
    return {
        "tokens_per_s": solved.prediction.tokens_per_s,
        "omega": _omega(solved, sensitivity),
        "mean_bits": statistics.fmean(
            width for stage in plan.stages for width in stage.widths if isinstance(width, int)
        ),
        "microbatches": [plan.prefill_microbatch, plan.decode_microbatch],
        "gap": solved.solution.gap,
        "seconds": solved.solution.seconds,
        "bits": format_split(plan),
    }


def speedups(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each contender, no more sensitive than that: means and maxima over those of the eleven that have it."""
    ratios: dict[tuple[str, float, str, str], list[float]] = {}
    for row in found:
        # A cluster of one node is the same with either network.
        network = row["network_bytes_per_s"]
        for speed in (network,) if network else NETWORKS:
            for kind, figures in row.get("contenders", {}).items() if row["cluster"].isdigit() else ():
                ratio = figures["llmpq"]["tokens_per_s"] / figures["tokens_per_s"]
                ratios.setdefault((row["world"], speed, row["sensitivity"], kind), []).append(ratio)
    return [
        {
            "world": world,
            "network_bytes_per_s": speed,
            "sensitivity": sensitivity,
            "against": kind,
            "clusters": len(of),
            "mean": statistics.fmean(of),
            "geometric_mean": statistics.geometric_mean(of),
            "max": max(of),
        }
        for (world, speed, sensitivity, kind), of in ratios.items()
        if speed == NETWORKS[0] or sensitivity == SHOWN
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="CLUSTER", nargs="+")
    parser.add_argument("--time-limit", metavar="SECONDS", type=float, default=10.0)
    parser.add_argument("--out", metavar="FILE")
    arguments = parser.parse_args(argv)
    found = []
    for setting in settings(arguments.time_limit, arguments.only):
        for row in rows(setting):
            found.append(row)
            print(_line(row), flush=True)
    means = speedups(found)
    for row in means:
        place = f"{row['world']:<7}{_network(row):>11} {row['sensitivity']:<7}"
        print(f"{place} over {row['against']:<22} mean {row['mean']:.2f}, max {row['max']:.2f}")
    print("", *explanation(found, means), sep="\n")
    if arguments.out:
        write_results(arguments.out, describe() | {"workload": WORKLOAD.to_dict(), "speedups": means, "rows": found})


def _network(row: dict[str, Any]) -> str:
    speed = row["network_bytes_per_s"]
    return "one node" if speed is None else f"{8e-9 * speed:.0f} Gbit/s"


def _line(row: dict[str, Any]) -> str:
    place = f"{row['cluster']:<4} {row['world']:<7}{_network(row):>11} {row['sensitivity']:<7}"
    if "infeasible" in row:
        return f"{place} {row['infeasible']}"
    ours = row["llmpq"]
    found = (
        f"{kind} {c['tokens_per_s']:.4g} ({c['llmpq']['tokens_per_s']:.4g})" for kind, c in row["contenders"].items()
    )
    return f"{place} {ours['seconds']:5.1f} s, gap {100 * ours['gap']:.1f} %: {', '.join(found)}"


if __name__ == "__main__":
    main()
