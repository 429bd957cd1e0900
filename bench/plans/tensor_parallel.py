"""When tensor parallelism pays: the best plans without and with stages of several equal devices, on paper.

    python -m bench.plans.tensor_parallel [--only CLUSTER ...] [--json-out FILE]

Prompt 512, 100 tokens, batches of 1, 8 and 32; analytic devices with modern kernels (analytic.py), whose links are
those of their data sheets or, where a cluster says so, PCIe or Ethernet; uneven synthetic sensitivities; both plans at
most as sensitive as 4 bit everywhere. Groups of 2, 4 and 8 are options of the same solve (planner/device_groups.py),
which exchange over the links of their node; nothing of that overlaps computing. A cluster called "on Ethernet" has
devices with a network card each; elsewhere groups do not go beyond a node.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import planner
from bench.machine import describe, write_results
from bench.plans import analytic
from bench.plans.analytic import MODERN, NETWORK_LATENCY_S, NODE_LATENCY_S, Analytic, kind_of
from bench.plans.public_figures import MODELS, PCIE_3, PCIE_4
from llmpq.spec import CostTable, Device, InfeasibleError, ModelSpec, Solved, Workload

BATCHES = (1, 8, 32)
DEGREES = (2, 4, 8)
ETHERNET = 100e9 / 8  # bytes/s, between nodes
OPTIONS = planner.Constraints(group_size=MODERN.group_size).precisions


@dataclass(frozen=True)
class Case:
    """A cluster by nodes, and the links inside of them."""

    name: str
    nodes: tuple[tuple[str, ...], ...]
    links: str  # NVLink, PCIe or Ethernet
    inside: tuple[float, float] | None = None  # latency_s and bytes_per_s; None: as the devices have them


V100, A100, T4 = "V100", "A100-40", "T4"
CASES = (
    Case("4 V100, NVLink", ((V100,) * 4,), "NVLink"),
    Case("4 V100, PCIe 3", ((V100,) * 4,), "PCIe", (NODE_LATENCY_S, PCIE_3)),
    Case("4 V100 on Ethernet", ((V100,) * 4,), "Ethernet", (NETWORK_LATENCY_S, ETHERNET)),
    Case("4 A100-40, NVLink", ((A100,) * 4,), "NVLink"),
    Case("4 A100-40, PCIe 4", ((A100,) * 4,), "PCIe", (NODE_LATENCY_S, PCIE_4)),
    Case("2 nodes of 4 A100-40, NVLink", ((A100,) * 4,) * 2, "NVLink"),
    Case("2 nodes of 4 T4, PCIe 3", ((T4,) * 4,) * 2, "PCIe"),
    Case("2 RTX 4090 and 2 RTX 3060, PCIe 4", (("RTX 4090",) * 2, ("RTX 3060",) * 2), "PCIe"),
)


def problem(case: Case, spec: ModelSpec, batch: int, time_limit_s: float) -> planner.Problem:
    """What is planned for, without groups; the quality budget is that of 4 bit everywhere."""
    workload = Workload(batch, 512, 100)
    cluster = analytic.cluster(case.nodes, ETHERNET, case.inside)
    return planner.Problem(
        spec,
        cluster,
        workload,
        analytic.profile(spec, cluster, workload, MODERN, OPTIONS),
        analytic.sensitivity(spec, "uneven", OPTIONS),
        planner.Constraints(group_size=MODERN.group_size, gap=0.005, time_limit_s=time_limit_s),
    )


def grouped(given: planner.Problem) -> planner.Problem:
    """The same with groups."""

    def part_costs(device: Device, part: ModelSpec) -> CostTable:
        return Analytic(kind_of(device), MODERN, part).table(given.workload, OPTIONS)

    return planner.with_groups(given, DEGREES, part_costs)


def rows(cases: Sequence[Case], time_limit_s: float) -> Iterator[dict[str, Any]]:
    """Both plans for each cluster, model and batch that fit; where groups bring nothing, both are the one without."""
    for case in cases:
        for name in ("OPT-30b", "OPT-66b", "Llama-2-70B"):
            for batch in BATCHES:
                given = problem(case, MODELS[name], batch, time_limit_s)
                try:
                    plans = [planner.solve(given), planner.solve(grouped(given))]
                except InfeasibleError:
                    continue
                without, best = plans[0], max(plans, key=_tokens_per_s)
                yield {
                    "cluster": case.name,
                    "links": case.links,
                    "model": name,
                    "batch": batch,
                    "gain": _tokens_per_s(best) / _tokens_per_s(without),
                    "without": _figures(without),
                    "with": _figures(replace(best, solution=plans[1].solution)),
                }


def _tokens_per_s(solved: Solved) -> float:
    return solved.prediction.tokens_per_s


def _figures(solved: Solved) -> dict[str, Any]:
    plan = solved.plan
    devices = [plan.cluster.device(stage.device) for stage in plan.stages]
    return {
        "tokens_per_s": solved.prediction.tokens_per_s,
        "prefill_s": solved.prediction.prefill_s,
        "decode_s": solved.prediction.decode_s,
        "members": [device.members for device in devices],
        "devices": [kind_of(device) for device in devices],
        "layers": [len(stage.precisions) for stage in plan.stages],
        "microbatches": [plan.prefill_microbatch, plan.decode_microbatch],
        "gap": solved.solution.gap,
        "seconds": solved.solution.seconds,
    }


def _line(row: dict[str, Any]) -> str:
    plans = ", ".join(
        f"{row[which]['tokens_per_s']:.4g} by "
        + " + ".join(f"{k} {device}" for k, device in zip(row[which]["members"], row[which]["devices"], strict=True))
        + f" ({row[which]['seconds']:.1f} s, gap {100 * row[which]['gap']:.1f} %)"
        for which in ("without", "with")
    )
    return f"{row['cluster']:<34}{row['model']:<12} {row['batch']:>2}: {row['gain']:.2f}x: {plans}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="CLUSTER", nargs="+", help="a part of the name is enough")
    parser.add_argument("--time-limit", metavar="SECONDS", type=float, default=10.0, help="for each search")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.only is None or any(part in case.name for part in arguments.only)]
    found = []
    for row in rows(cases, arguments.time_limit):
        found.append(row)
        print(_line(row), flush=True)
    if arguments.json_out:
        write_results(arguments.json_out, describe() | {"rows": found})


if __name__ == "__main__":
    main()
