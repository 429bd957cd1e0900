"""Candidate: a concrete answer to all that is decided, and the Plan it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmpq.spec import Placement, Plan, Prediction, Solution, Solved, Stage
from llmpq.spec.costs import LEAST_S
from planner import memory
from planner.cost_arrays import Configuration, Costs
from planner.objective import Assignment, BoolArray, Evaluation, evaluate
from planner.step_costs import offered


@dataclass(frozen=True)
class Candidate:
    """Devices in order, micro-batch sizes, an assignment of the units, and what it is worth."""

    choice: Configuration
    assignment: Assignment
    value: Evaluation

    @classmethod
    def of(cls, costs: Costs, choice: Configuration, assignment: Assignment) -> Candidate:
        return cls(choice, assignment, evaluate(costs.program(choice), assignment))


def to_solved(costs: Costs, found: Candidate, *, solver: str, bound: float, seconds: float) -> Solved:
    """The plan that a candidate stands for; predictions are those of the closed form."""
    spec, workload, value = costs.spec, costs.workload, found.value
    devices = [costs.cluster.devices[d] for d in found.choice.order]
    chosen = zip(spec.units, found.assignment.options, strict=True)
    precisions = [offered(spec, unit, costs.options)[o] for unit, o in chosen]
    layer_positions = found.assignment.positions[1:-1]
    narrow = _caches(found.assignment)
    stages = []
    for position, device in enumerate(devices):
        first, end = (int(np.searchsorted(layer_positions, position, side)) for side in ("left", "right"))
        stages.append(
            Stage(
                device=device.name,
                layers=(first, end),
                precisions=tuple(precisions[1 + first : 1 + end]),
                activations=device.activations(costs.constraints.activations),
                compute_dtype=spec.compute_dtype(device.kind),
                kv_bits=costs.kv_bits[int(narrow[position])],
            )
        )
    plan = Plan(
        model=spec.name,
        model_hash=spec.content_hash,
        cluster=costs.cluster,
        workload=workload,
        stages=tuple(stages),
        embedding=Placement(0, precisions[0]),
        head=Placement(len(stages) - 1, precisions[-1]),
        wire_dtype=memory.wire_dtype(devices, spec),
        slots=workload.batch_size,
        max_length=workload.max_length,
        prefill_microbatch=found.choice.prefill.size,
        decode_microbatch=found.choice.decode.size,
        kv_blocks=workload.cache_blocks,
    )
    return Solved(
        plan,
        Prediction(
            prefill_s=value.prefill_s,
            decode_s=value.decode_s,
            tokens_per_s=workload.output_tokens / max(value.prefill_s + value.decode_s, LEAST_S),
            memory_bytes=tuple(int(size) for size in value.memory),
        ),
        Solution(
            solver=solver,
            objective=value.objective,
            bound=min(bound, value.objective),
            seconds=seconds,
            omega=value.omega,
            omega_budget=None if np.isinf(costs.omega_budget) else costs.omega_budget,
        ),
    )


def _caches(assignment: Assignment) -> BoolArray:
    """[positions] Whether the cache is narrow; without layers, if all others are."""
    holds = np.zeros(int(assignment.positions[-1]) + 1, dtype=bool)
    holds[assignment.positions[1:-1]] = True
    if assignment.narrow is None:
        return np.zeros_like(holds)
    narrow: BoolArray = np.where(holds, assignment.narrow, assignment.narrow[holds].all())
    return narrow
