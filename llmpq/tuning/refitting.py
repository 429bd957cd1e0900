"""Refit: cost tables corrected by the runs that were predicted from them.

A table is measured operation by operation, while the other devices work; a run has all operations in one process and
waits for messages in between. Two numbers for each device describe the difference: a factor for all of its operations,
and the seconds that each step takes besides. For a stage in one phase of a run

    measured = factor * (seconds of its operations) + step_s * (number of its steps)

so runs of different lengths and batches give both numbers, by least squares of the relative error. Links play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from llmpq.spec import CostTable, Op, Profile
from llmpq.tuning.run_log import PhaseRun, RunRecord, StageRun

LEAST_RUNS = 3  # of a device, to correct it by


def refit(profile: Profile, records: Sequence[RunRecord], least_runs: int = LEAST_RUNS) -> Profile:
    """The profile with the tables of those devices corrected that at least `least_runs` of the runs used.

    A run counts for the device it was made on (CostTable.device) with the same kernels, whichever table predicted it.
    """
    tables = {}
    for name, table in profile.tables.items():
        runs = runs_of(table, records)
        tables[name] = _corrected(table, runs) if len(runs) >= least_runs else table
    return replace(profile, tables=tables)


def runs_of(table: CostTable, records: Sequence[RunRecord]) -> list[StageRun]:
    """The stages that ran on the device of a table and were measured; under torchrun only the first is."""
    key = (table.device, table.kernels)
    stages = (stage for record in records for stage in record.stages if (stage.device, stage.kernels) == key)
    return [stage for stage in stages if stage.prefill.steps + stage.decode.steps > 0]


def mean_error(table: CostTable, runs: Sequence[StageRun]) -> float:
    """Mean of |predicted - measured| / measured of the seconds at work in each phase; predicted by `table`."""
    step_s = table.seconds(Op("step"))
    errors = [abs(p.work_s + step_s * p.steps - p.measured_s) / p.measured_s for p in _points(table, runs)]
    return float(np.mean(errors)) if errors else 0.0


class _Point(NamedTuple):
    """A stage in one phase of a run. `work_s`: seconds of its operations, as the table has them."""

    work_s: float
    steps: int
    measured_s: float


def _points(table: CostTable, runs: Sequence[StageRun]) -> list[_Point]:
    def point(run: StageRun, phase: PhaseRun) -> _Point:
        work_s = max(0.0, phase.predicted_s - phase.steps * run.step_s)
        return _Point(work_s * table.scale / run.scale, phase.steps, phase.measured_s)

    return [point(run, phase) for run in runs for phase in (run.prefill, run.decode) if phase.measured_s > 0]


def _corrected(table: CostTable, runs: Sequence[StageRun]) -> CostTable:
    factor, step_s = _fit(_points(table, runs), table.seconds(Op("step")))
    rows = (replace(row, seconds=step_s if row.op.kind == "step" else factor * row.seconds) for row in table.rows)
    # The overhead that would have made each prediction right; the largest, since too little memory ends a run.
    overheads = [run.measured_bytes - (run.predicted_bytes - run.overhead_bytes) for run in runs]
    overhead = max(0, *overheads)
    message_s, scale = factor * table.message_s, factor * table.scale
    return replace(table, rows=tuple(rows), message_s=message_s, scale=scale, overhead_bytes=overhead)


def _fit(points: Sequence[_Point], step_s: float) -> tuple[float, float]:
    """(factor, seconds a step), the factor above 0, the seconds at least 0.

    Where the runs do not determine both, both are changed by the same factor.
    """
    if not points:
        return 1.0, step_s
    work, steps, measured = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    x, y = work / measured, steps / measured  # so that factor * x + seconds * y should be 1
    xx, xy, yy = x @ x, x @ y, y @ y
    x1, y1 = x.sum(), y.sum()
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        factor = (yy * x1 - xy * y1) / determinant
        seconds = (xx * y1 - xy * x1) / determinant
        if seconds < 0:
            return float(x1 / xx), 0.0
        if factor > 0:
            return float(factor), float(seconds)
    both = x + step_s * y
    common = float(both.sum() / (both @ both)) if both.any() else 1.0
    return common, common * step_s
