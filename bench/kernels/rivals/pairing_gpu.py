"""From what was timed on a GPU to rows: ours beside a rival's, their ratio, the goal. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from bench.kernels.rivals.goals_gpu import CUBLAS, ERROR_LIMIT, GpuGoal
from bench.kernels.rivals.measure_gpu import Cell
from bench.kernels.rivals.pairing import compared, fraction_of_peak
from bench.kernels.shapes import GROUP_SIZE


def rows_of(cell: Cell, goals: Collection[GpuGoal], ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each comparison that could be made.

    `graphed` and `rival_graphed` say what was timed in a CUDA graph; `latency_seconds` is a single call of ours
    without one. Beside cuBLAS stands what our error is to be at most.
    """
    n, k, m, timings = cell.n, cell.k, cell.m, cell.timings
    for goal in goals:
        mine = timings.get(goal.ours)
        found = None if mine is None or not goal.applies(n, k, m) else compared(mine, goal.rivals, timings)
        if mine is None or found is None:
            continue
        rival = timings[found["rival"]]
        fraction = fraction_of_peak(2 * m * n * k, "bf16_flop_per_s", mine, ceilings)
        row = {
            "n": n,
            "k": k,
            "m": m,
            "dtype": cell.dtype,
            "group_size": GROUP_SIZE,
            "backend": goal.backend,
            "bits": goal.bits,
            "activations": "a16",
            **found,
            "error_limit": ERROR_LIMIT * rival.error if found["rival"] == CUBLAS and rival.error is not None else None,
            "graphed": mine.graphed,
            "latency_seconds": mine.latency_seconds,
            "rival_graphed": rival.graphed,
            "goal": goal.ratio(n, k, m),
            "percent_of_ceiling": None if fraction is None else 100 * fraction,
        }
        yield {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}
