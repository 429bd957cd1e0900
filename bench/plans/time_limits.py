"""Whether the planner answers in its time: 100 random problems of up to 200 devices with a limit of 5 s each.

    python -m bench.plans.time_limits [--problems N] [--json-out FILE]

Drawn as in bench_planner.py, but for 2 to 200 devices with caps that all differ, and one problem in ten with far too
little memory. An answer is a plan, or what is too small where there is none. Seconds are those of the wall's clock,
which is the planner's own; those of the processor tell how much of them other processes took.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import planner
from bench.machine import describe, write_results
from bench.plans.bench_planner import Instance, draw
from llmpq.spec import InfeasibleError

LIMIT_S, GRACE_S = 5.0, 1.0
LAYERS = (16, 32, 48, 80, 126)
DEVICES = (2, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64, 200)


def instance(seed: int) -> Instance:
    """It depends on the seed alone."""
    drawn = random.Random(f"time limits {seed}")
    layers, devices = (values[int(drawn.random() * len(values))] for values in (LAYERS, DEVICES))
    found = draw(seed, num_layers=layers, devices=devices, tight=seed % 2 == 0, time_limit_s=LIMIT_S)
    share = 0.2 if seed % 10 == 9 else 1.0
    memory = tuple(int(share * size * (0.8 + 0.4 * drawn.random())) for size in found.memory_bytes)
    return replace(found, memory_bytes=memory)


def run(given: Instance) -> dict[str, Any]:
    """One problem: the answer, and how long it took."""
    problem = given.problem()
    row: dict[str, Any] = {"name": given.name, "layers": given.num_layers, "devices": len(problem.cluster.devices)}
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        solution = planner.solve(problem).solution
        row |= {"answer": "plan", "objective": solution.objective, "gap": solution.gap}
    except InfeasibleError as error:
        row |= {"answer": "none in time" if "allow more time" in str(error) else "no plan", "reason": str(error)}
    return row | {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "problems": len(rows),
        "time_limit_s": LIMIT_S,
        "plans": sum(row["answer"] == "plan" for row in rows),
        "no_plan_and_why": sum(row["answer"] == "no plan" for row in rows),
        "without_an_answer": sum(row["answer"] == "none in time" for row in rows),
        "over_6_s": sum(row["wall_s"] > LIMIT_S + GRACE_S for row in rows),
        "over_6_s_of_the_processor": sum(row["cpu_s"] > LIMIT_S + GRACE_S for row in rows),
        "longest_wall_s": max(row["wall_s"] for row in rows),
        "longest_cpu_s": max(row["cpu_s"] for row in rows),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100, metavar="N")
    parser.add_argument("--json-out", metavar="FILE")
    arguments = parser.parse_args(argv)
    rows = []
    for seed in range(arguments.problems):
        rows.append(row := run(instance(seed)))
        gap = f"gap {100 * row['gap']:5.1f} %" if row["answer"] == "plan" else row["answer"]
        print(f"{row['name']:<14} {gap:<12} {row['wall_s']:5.2f} s, {row['cpu_s']:5.2f} s of the processor", flush=True)
    print(found := summary(rows))
    if arguments.json_out:
        write_results(arguments.json_out, describe() | {"summary": found, "rows": rows})


if __name__ == "__main__":
    main()
