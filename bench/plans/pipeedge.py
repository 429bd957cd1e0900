"""What LLM-PQ compares itself with and by: PipeEdge's split as its scripts make it, and its own formula of a batch."""

from __future__ import annotations

import math

import numpy as np

from llmpq.spec import Plan, Solved
from planner.cost_arrays import Configuration, Costs
from planner.objective import Assignment, FloatArray, Program
from planner.solver.candidate import Candidate, to_solved
from planner.step_costs import StepCosts


def pipeedge(costs: Costs) -> Solved | None:
    """The split with the shortest longest stage in decode, of the one option that `costs` has; None if none fits.

    All devices in the cluster's order, micro-batches of ceil(batch / devices) in both phases (LLM-PQ's scripts).
    """
    devices = len(costs.cluster.devices)
    size = -(-costs.workload.batch_size // devices)
    choice = Configuration(tuple(range(devices)), _phase(costs.prefill, size), _phase(costs.decode, size))
    program = costs.program(choice)
    positions = _balanced(program)
    if positions is None:
        return None
    found = Candidate.of(costs, choice, Assignment(positions, np.zeros_like(positions)))
    return to_solved(costs, found, solver="dynamic program", bound=0.0, seconds=0.0)


def _phase(phases: tuple[StepCosts, ...], size: int) -> StepCosts:
    return next(phase for phase in phases if phase.size == size)


def _balanced(program: Program) -> np.ndarray | None:
    """Positions [units] of the split that fits and has the shortest longest stage in decode: a dynamic program."""
    units, stages, _ = program.shape
    seconds, held = (_running_sums(costs) for costs in (program.decode, program.memory))

    def stage(d: int, first: int, end: int) -> float:
        """Seconds of units first to end - 1 on d; inf if they do not fit, or leave no unit to the head's stage."""
        size = held[end, d] - held[first, d] + program.memory_fixed[d]
        if stages == 1:
            size -= program.shared[0]
        fits = size <= program.capacity[d]
        return float(seconds[end, d] - seconds[first, d] + program.decode_step[d]) if fits else math.inf

    best = np.full((stages + 1, units + 1), math.inf)  # of the first d stages with the first u units
    begin = np.zeros((stages + 1, units + 1), dtype=np.int64)
    best[0, 0] = 0.0
    for d in range(stages):
        for end in range(1, units + 1):
            options = [max(best[d, first], stage(d, first, end)) for first in range(end)]
            begin[d + 1, end] = int(np.argmin(options))
            best[d + 1, end] = options[begin[d + 1, end]]
    if math.isinf(best[stages, units]):
        return None
    positions = np.zeros(units, dtype=np.int64)
    end = units
    for d in range(stages, 0, -1):
        positions[begin[d, end] : end] = d - 1
        end = int(begin[d, end])
    return positions


def _running_sums(costs: FloatArray) -> FloatArray:
    """[units + 1, positions] of the only option."""
    return np.concatenate([np.zeros((1, costs.shape[1])), np.cumsum(costs[:, :, 0], axis=0)])


def formula_seconds(costs: Costs, plan: Plan) -> float:
    """What LLM-PQ's formula makes of a plan; a stage counts with its compute or its link, whichever is longer."""
    names = [device.name for device in costs.cluster.devices]
    order = tuple(names.index(stage.device) for stage in plan.stages)
    choice = Configuration(
        order, _phase(costs.prefill, plan.prefill_microbatch), _phase(costs.decode, plan.decode_microbatch)
    )
    program = costs.program(choice)
    positions = [plan.embedding.stage, *(d for d, s in enumerate(plan.stages) for _ in s.precisions), plan.head.stage]
    options = [costs.options.index(plan.precision(unit)) for unit in costs.spec.units]

    def stages(units: FloatArray, step: FloatArray, links: FloatArray) -> FloatArray:
        totals = step.copy()
        np.add.at(totals, positions, units[np.arange(len(positions)), positions, options])
        longest: FloatArray = np.maximum(totals, links) if links.size else totals
        return longest

    prefill = stages(program.prefill, program.prefill_step, program.prefill_links)
    decode = stages(program.decode, program.decode_step, program.decode_links)
    counts = choice.prefill.count, choice.decode.count
    return formula(prefill, decode, *counts, costs.workload.output_len)


def formula(
    prefill: FloatArray, decode: FloatArray, prefill_count: float, decode_count: float, output_len: int
) -> float:
    """Sum_P + (m_p - 1) Max_P + Sum_D + (m_d - 1)(n - 1) Max_D, of stages' seconds and numbers of micro-batches.

    The decode term lacks the way around the pipeline (compare the planner's objective.py): with one micro-batch all
    tokens but two are free.
    """
    rounds = (decode_count - 1) * (output_len - 1)
    return float(prefill.sum() + (prefill_count - 1) * prefill.max() + decode.sum() + rounds * decode.max())
