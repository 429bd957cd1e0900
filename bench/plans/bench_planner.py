"""How long the planner takes, and how near the optimum it is known to come, over layers and devices.

    python -m bench.plans.bench_planner [--only NAME ...] [--per-linear] [--json-out FILE]
    python -m bench.plans.bench_planner --draw    writes bench/plans/planner_instances.json anew

Llama-2-70B with 16 to 128 layers (it has 80) on analytic GPUs (analytic.py) of up to three types, four bit widths, all
device orders and micro-batch sizes; one thread. Half of the instances are tight in memory, half have room and a quality
budget between those of 4 and 8 bits everywhere. The bound is of the whole search. The instances are committed as what
was drawn; their digest tells whether the same costs come out of it. With --per-linear layers may lie between two
widths (planner/mixed.py), which makes 10 options of 4.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import planner
from bench.machine import as_json, describe, write_results
from bench.plans import analytic
from bench.plans.public_figures import DEVICES, MODELS
from llmpq.spec import Cluster, ModelSpec, Precision, Sensitivity, Workload
from llmpq.spec.record import Record
from planner.cost_arrays import Costs

PATH = Path(__file__).with_name("planner_instances.json")
GAP = 0.005  # where the search may stop; what is asked for at least is 2 %
BITS = (3, 4, 8, 16)
MODEL = MODELS["Llama-2-70B"]
SHARES = {"qkv": 0.36, "out": 0.05, "up": 0.3, "down": 0.29}  # of a layer's sensitivity: about those of the demo model
GRID = 100  # seeds from here on are of the grid of sizes, of which nothing is asked


@dataclass(frozen=True)
class Instance(Record):
    """What was drawn for one problem."""

    name: str
    tight: bool  # in memory; else the quality budget matters
    num_layers: int
    nodes: tuple[tuple[str, ...], ...]  # kinds of devices, those of one type on one node
    memory_bytes: tuple[int, ...]  # of each device, in this order
    network_bytes_per_s: float
    workload: Workload
    world: str
    sensitivity: str
    seed: int
    budget: float  # of the way from the omega of the higher to that of the lower of two widths; see `problem`
    time_limit_s: float

    def problem(self, *, per_linear: bool = False) -> planner.Problem:
        """What `planner.solve` is given."""
        spec = replace(MODEL, num_layers=self.num_layers)
        world = analytic.WORLDS[self.world]
        constraints = planner.Constraints(
            bits=BITS, group_size=world.group_size, time_limit_s=self.time_limit_s, gap=GAP, per_linear=per_linear
        )
        cluster = analytic.cluster(self.nodes, self.network_bytes_per_s)
        devices = [replace(d, memory_bytes=m) for d, m in zip(cluster.devices, self.memory_bytes, strict=True)]
        cluster = Cluster(tuple(devices), cluster.links)
        profile = analytic.profile(spec, cluster, self.workload, world, constraints.precisions)
        sensitivity = analytic.sensitivity(spec, self.sensitivity, constraints.precisions, self.seed)
        if per_linear:
            sensitivity = with_linears(sensitivity, spec)

        def everywhere(bits: int) -> float:
            return sum(sensitivity.of(unit, constraints.precision(bits)) for unit in spec.units)

        high, low = (4, 3) if self.tight else (8, 4)
        budget = everywhere(high) + self.budget * (everywhere(low) - everywhere(high))
        limits = replace(constraints, omega_budget=budget)
        return planner.Problem(spec, cluster, self.workload, profile, sensitivity, limits)


def with_linears(sensitivity: Sensitivity, spec: ModelSpec) -> Sensitivity:
    """With those of each layer's linears: SHARES of it."""
    of_linears = {
        f"{unit}.{name}": {precision: share * omega for precision, omega in sensitivity.omega[unit].items()}
        for unit in spec.units[1:-1]
        for name, share in SHARES.items()
    }
    return replace(sensitivity, omega=sensitivity.omega | of_linears)


def digest(problem: planner.Problem) -> str:
    """16 hex digits that change with any of an instance's costs, to nine figures."""
    costs = Costs.of(problem)
    caps = [device.memory_bytes for device in problem.cluster.devices]
    links = [(link.latency_s, link.bytes_per_s) for link in problem.profile.links]
    phases = [array for phase in (*costs.prefill, *costs.decode) for array in (phase.units, phase.step)]
    arrays: list[Any] = [costs.omega, costs.omega_budget, costs.memory, caps, links, *phases]
    text = "".join(f"{number:.9g} " for array in arrays for number in np.ravel(array))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(seed: int, *, num_layers: int, devices: int, tight: bool, time_limit_s: float) -> Instance:
    """An instance that depends on the arguments alone (`random.random` is the same everywhere)."""
    drawn = random.Random(f"{num_layers} {devices} {seed}")

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * drawn.random()

    def one_of(values: Sequence[Any]) -> Any:
        return values[int(drawn.random() * len(values))]

    gpus = [name for name, figures in DEVICES.items() if figures.kind == "cuda"]
    types = [gpus.pop(int(drawn.random() * len(gpus))) for _ in range(min(3, devices))]
    counts = dict.fromkeys(types, 1)
    for _ in range(devices - len(types)):
        counts[one_of(types)] += 1
    workload = Workload(one_of((8, 16, 32)), one_of((64, 128, 512)), one_of((32, 100)))
    # Memory by type is drawn, too: as a share of what the model takes in 8 bit with its cache.
    spec = replace(MODEL, num_layers=num_layers)
    needed = sum(spec.unit_bytes(unit, Precision(8, 128)) for unit in spec.units)
    needed += num_layers * spec.kv_bytes(workload.batch_size * workload.max_length, "float16")
    room = uniform(0.55, 0.8) if tight else uniform(1.2, 2.0)
    weights = {kind: uniform(0.3, 1.7) for kind in types}
    total = sum(counts[kind] * weights[kind] for kind in types)
    buffers = workload.batch_size * workload.prompt_len * 12 * spec.hidden_size * 2
    memory = {kind: int(room * needed * weights[kind] / total) + buffers for kind in types}
    return Instance(
        name=f"L{num_layers}-N{devices}-{seed}",
        tight=tight,
        num_layers=num_layers,
        nodes=tuple((kind,) * counts[kind] for kind in types),
        memory_bytes=tuple(memory[kind] for kind in types for _ in range(counts[kind])),
        network_bytes_per_s=one_of((100e9 / 8, 800e9 / 8)),
        workload=workload,
        world=one_of(tuple(analytic.WORLDS)),
        sensitivity=one_of(tuple(analytic.SENSITIVITIES)),
        seed=seed,
        budget=0.8 if tight else uniform(0.2, 0.8),
        time_limit_s=time_limit_s,
    )


def draw_all() -> Iterator[Instance]:
    """20 of 80 layers on 8 devices, 6 of 32 on 4, and a grid of layers and devices."""
    for seed in range(20):
        yield draw(seed, num_layers=80, devices=8, tight=seed < 10, time_limit_s=60.0)
    for seed in range(6):
        yield draw(seed, num_layers=32, devices=4, tight=seed < 3, time_limit_s=5.0)
    for num_layers in (16, 32, 80, 128):
        for devices in (2, 4, 8, 12):
            for seed in range(GRID, GRID + 2):
                yield draw(seed, num_layers=num_layers, devices=devices, tight=seed % 2 == 0, time_limit_s=60.0)


def committed() -> dict[str, tuple[Instance, str]]:
    """The committed instances by name, each with its digest."""
    rows = json.loads(PATH.read_text())["instances"]
    instances = [(Instance.from_dict({k: v for k, v in row.items() if k != "digest"}), row["digest"]) for row in rows]
    return {instance.name: (instance, found) for instance, found in instances}


def run(instance: Instance, *, per_linear: bool = False) -> dict[str, Any]:
    """Solve one instance: what was found, what is proven of it, and how long it took."""
    problem = instance.problem(per_linear=per_linear)
    solved = planner.solve(problem)
    solution = solved.solution
    return {
        "name": instance.name,
        "grid": instance.seed >= GRID,
        "layers": instance.num_layers,
        "devices": len(problem.cluster.devices),
        "tight": instance.tight,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "seconds": solution.seconds,
        "time_limit_s": instance.time_limit_s,
        "solver": solution.solver,
        "stages": len(solved.plan.stages),
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is asked of the planner, and what was reached."""
    asked = [row for row in rows if not row["grid"]]
    large = [row for row in asked if (row["layers"], row["devices"]) == (80, 8)]
    small = [row for row in asked if (row["layers"], row["devices"]) == (32, 4)]
    return {
        "L80_N8": len(large),
        "L80_N8_within_60_s": sum(row["seconds"] <= 60.0 for row in large),
        "L80_N8_gap_2_percent": sum(row["gap"] <= 0.02 for row in large),
        "L80_N8_gap_5_percent": sum(row["gap"] <= 0.05 for row in large),
        "L32_N4": len(small),
        "L32_N4_within_5_s_to_0.5_percent": sum(row["seconds"] <= 5.0 and row["gap"] <= 0.005 for row in small),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="such as L80-N8-3; a part of the name is enough")
    parser.add_argument("--per-linear", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.draw:
        rows = [instance.to_dict() | {"digest": digest(instance.problem())} for instance in draw_all()]
        PATH.write_text(as_json({"instances": rows}))
        return
    rows = []
    for name, (instance, _) in committed().items():
        if arguments.only is None or any(part in name for part in arguments.only):
            rows.append(run(instance, per_linear=arguments.per_linear))
            row = rows[-1]
            print(f"{name:<12} {row['objective']:8.3f} s, gap {100 * row['gap']:5.2f} %, {row['seconds']:6.1f} s")
    print(found := summary(rows))
    if arguments.json_out:
        write_results(arguments.json_out, describe() | {"summary": found, "rows": rows})


if __name__ == "__main__":
    main()
