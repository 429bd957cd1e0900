"""What both integer programs have in common: the solver, its time, its units, and the rows of decode's rounds."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from llmpq.spec.descriptors import silence
from planner.clock import Clock
from planner.objective import FloatArray, Rounds

with suppress(ImportError):
    import highsbox

    # HiGHS as a plain library. mip would rather take highspy's, which hides from version 1.16 on what mip calls.
    library = {"darwin": "lib/libhighs.dylib", "win32": "bin/highs.dll"}.get(sys.platform, "lib/libhighs.so")
    os.environ.setdefault("PMIP_HIGHS_LIBRARY", str(Path(highsbox.highs_dist_dir()) / library))

import mip
import mip.highs

SOLVER = "HIGHS" if mip.highs.has_highs else "CBC"
OPTIMAL = mip.OptimizationStatus.OPTIMAL
FAILED = mip.OptimizationStatus.ERROR
IMPOSSIBLE = (mip.OptimizationStatus.INFEASIBLE, mip.OptimizationStatus.INT_INFEASIBLE)
SCALE = 1000.0  # the value of a limit in its row: solvers allow violations of about 1e-6
LEAST_S = 0.01  # for the solver; none at all may mean any


@contextmanager
def new_model() -> Iterator[mip.Model]:
    """A model to minimise in the block.

    The solver is released at the end of the block and not by the garbage collector: that may run while a later model
    holds the lock of the solver's C interface, which the release needs too, and both would wait forever.
    """
    model = mip.Model(sense=mip.MINIMIZE, solver_name=SOLVER)
    model.verbose, model.threads = 0, 1
    try:
        yield model
    finally:
        model.solver = None


def optimize(model: mip.Model, clock: Clock) -> mip.OptimizationStatus:
    """The status; FAILED where HiGHS rejects its own solution, as it does right beside a limit. Raises OutOfTime."""
    clock.check()
    limit = {} if math.isinf(clock.end) else {"max_seconds": max(LEAST_S, clock.left_s)}
    with silence() if SOLVER == "CBC" else nullcontext():  # CBC prints from C, whatever is asked of it
        try:
            return model.optimize(**limit)
        except mip.InterfacingError:
            return FAILED


def row_unit(limit: float, costs: FloatArray) -> float:
    """The unit of the row of a limit; where the limit is 0, no cost may be as small as a solver's tolerance."""
    return (limit or float(costs[costs > 0].min(initial=1.0))) / SCALE


def time_unit(prefill: FloatArray, decode: FloatArray) -> float:
    """The seconds that are 1 in a model, so that a unit takes about SCALE or more in either phase."""
    medians = [float(np.median(costs[costs > 0])) for costs in (prefill, decode) if costs.any()]
    return min(medians, default=SCALE) / SCALE


def sum_of_rounds(model: mip.Model, rounds: Rounds, way: mip.LinExpr, slowest: mip.Var) -> mip.LinExpr:
    """The seconds of decode, given the way around and the slowest resource; adds Sum_D and Round."""
    total = mip.LinExpr()
    around = model.add_var("Sum_D")
    model.add_constr(around >= way, "around")
    for k, (count, microbatches) in enumerate(rounds):
        round_ = model.add_var(f"Round({k})")
        model.add_constr(round_ >= around, f"way({k})")
        model.add_constr(round_ >= microbatches * slowest, f"work({k})")
        total += count * round_
    return total
