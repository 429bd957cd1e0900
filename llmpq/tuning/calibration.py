"""Calibration: short runs on the devices of a cluster, to correct its cost tables by (refitting.py).

The plans need no good costs: each has one width, and its layers are split evenly where that fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import planner
from llmpq.checkpoint.model_files import Model
from llmpq.hardware import with_memory
from llmpq.progress import Notify, counted, silent
from llmpq.spec import Cluster, ModelSpec, Profile, Sensitivity, Solved, Workload
from llmpq.spec.formatting import format_width
from llmpq.spec.sensitivity import KV_CACHE
from llmpq.tuning.run_log import RunRecord
from llmpq.tuning.trial_runs import REPETITIONS, run_trial

MOST_TOKENS = 24  # that a run generates of each sequence


def calibration_runs(
    model: Model,
    cluster: Cluster,
    costs: Profile,
    reach: Workload,
    constraints: planner.Constraints,
    notify: Notify = silent,
) -> list[RunRecord]:
    """Runs within `reach`, the workload that `costs` were measured for, as they would be in the log of runs.

    `constraints` say which widths there are costs of, and in which groups. There is none of a device that no plan that
    fits uses. Raises UsageError, DeviceMemoryError or WorkerLostError if a run fails.
    """
    capped, records = with_memory(cluster), []
    for solved in calibration_plans(model.spec, capped, costs, reach, constraints):
        plan = solved.plan
        at = format_width(plan.head.precision.width)
        run_done = counted(notify, f"running at {at}, to correct the costs", REPETITIONS)
        prompt_lens = [plan.workload.prompt_len] * plan.workload.batch_size
        for result in run_trial(plan, model.checkpoint, model.spec):
            run_done()
            output_lens = [len(sequence.token_ids) for sequence in result.sequences]
            simulation = planner.simulate(plan, model.spec, costs, prompt_lens, output_lens)
            records.append(RunRecord.of(plan, costs, prompt_lens, simulation, result))
    return records


def calibration_plans(
    spec: ModelSpec, cluster: Cluster, costs: Profile, reach: Workload, constraints: planner.Constraints
) -> Iterator[Solved]:
    """For each width one plan of it alone, if one fits: the even split, else the next of the baselines.

    Each has half as many sequences as the one before, and prompts half as long: large steps count and small ones. And
    each begins on another device, if it can, as the first stage needs a little more memory.
    """
    batch_size, prompt_len, output_len = reach.batch_size, reach.prompt_len, min(MOST_TOKENS, reach.output_len)
    first = itertools.cycle(device.name for device in cluster.devices)
    for option in constraints.options(spec):
        nothing = {unit: {str(option): 0.0} for unit in spec.units} | {KV_CACHE: {"8": 0.0}}
        free = Sensitivity(spec.name, spec.content_hash, "none", "", nothing)
        alike = replace(constraints, fixed_bits=option.width)
        workload = Workload(batch_size, prompt_len, output_len)
        problem = planner.Problem(spec, cluster, workload, costs, free, alike)
        there = replace(problem, constraints=replace(alike, pinned={"embedding": next(first)}))
        if found := planner.baseline_plans(there) or planner.baseline_plans(problem):
            yield next(iter(found.values()))
            batch_size, prompt_len = max(1, batch_size // 2), max(1, prompt_len // 2)
