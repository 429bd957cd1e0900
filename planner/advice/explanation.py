"""Why a plan is as it is: the bottleneck of each stage, the alternatives, and the effect of changes, by solving again.

The cost model is that of the search (objective.py), so every number here can be compared with a plan's prediction.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmpq.spec import Plan, Solved, Span, Stage, Width
from planner.advice.changes import Change, front, try_changes
from planner.baselines.systems import Baseline
from planner.clock import Clock
from planner.cost_arrays import Configuration, Costs
from planner.memory import stage_bytes
from planner.objective import Assignment, Program
from planner.problem import Problem
from planner.simulation import simulate
from planner.solver.search import baseline_plans

BASELINES, CHANGES = 0.1, 0.7  # of the time
SHOWN_SEQUENCES, SHOWN_STEPS = 1000, 50_000  # of a simulation, at most about


@dataclass(frozen=True)
class StageView:
    """A stage and the link behind it, for one micro-batch of each phase."""

    device: str
    prefill_s: float
    decode_s: float
    prefill_link_s: float  # 0 in a plan of one stage
    decode_link_s: float
    memory_bytes: int
    cap_bytes: int | None
    bounds: tuple[str, ...]  # of "prefill", "decode", "memory": what this stage or its link is the limit of


@dataclass(frozen=True)
class UnitView:
    """The embedding, a layer or the head, as it is placed."""

    unit: str
    device: str
    width: Width | str  # of a mixed layer as `4/3/3/4`
    bits: float  # of a code, on average
    weight_bytes: int
    omega: float  # at this width, and of a layer's KV cache


@dataclass(frozen=True)
class Explanation:
    """`round_trip`: decode takes as long as a token takes through all stages, whatever the slowest of them does."""

    objective: Literal["time", "cost"]  # which all plans here are best in
    stages: tuple[StageView, ...]
    units: tuple[UnitView, ...]  # in the model's order
    prefill_steps: int  # micro-batches of one batch
    decode_steps: float  # the same, of all rounds; on average, where lengths are mixed
    round_trip: bool
    baselines: dict[Baseline, Solved]
    changes: tuple[Change, ...]
    unmet: tuple[str, ...]  # changes with which no plan was found
    front: tuple[Solved, ...]  # the best within each budget of sensitivity, from the highest quality to the lowest
    spans: tuple[Span, ...]  # what stages and links are expected to do when, for one batch, or how a large one begins


def explain(solved: Solved, problem: Problem, clock: Clock | None = None) -> Explanation:
    """All that can be said of a plan that `solve` made of a problem before the clock runs out.

    By default that is the clock of the time limit. It takes some twenty-five searches, which share the time.
    """
    plan = solved.plan
    clock = clock or Clock.of(problem.constraints.time_limit_s)
    program, assignment = _as_program(plan, problem)
    of_stages, of_links = _seconds(program, assignment)
    longest = [max(*stages, *links) for stages, links in zip(of_stages, of_links, strict=True)]
    most = max(microbatches for _, microbatches in program.decode_rounds)
    round_trip = sum(of_stages[1] + of_links[1]) >= most * longest[1]
    views = []
    for i, (stage, used) in enumerate(zip(plan.stages, stage_bytes(plan, problem.spec, problem.profile), strict=True)):
        bounds = [
            name
            for name, phase in (("prefill", 0), ("decode", 1))
            if max(of_stages[phase][i], of_links[phase][i]) == longest[phase] and not (phase and round_trip)
        ]
        views.append(
            StageView(
                device=stage.device,
                prefill_s=of_stages[0][i],
                decode_s=of_stages[1][i],
                prefill_link_s=of_links[0][i],
                decode_link_s=of_links[1][i],
                memory_bytes=used,
                cap_bytes=plan.cluster.device(stage.device).memory_bytes,
                bounds=(*bounds, *(["memory"] if _full(stage, used, problem) else [])),
            )
        )
    others = baseline_plans(problem, clock.part(BASELINES))
    changed, unmet = try_changes(plan, problem, clock.part(CHANGES))
    return Explanation(
        objective=problem.constraints.objective,
        stages=tuple(views),
        units=_units(plan, problem),
        prefill_steps=program.prefill_microbatches,
        decode_steps=sum(rounds * microbatches for rounds, microbatches in program.decode_rounds),
        round_trip=round_trip,
        baselines=others,
        changes=changed,
        unmet=unmet,
        front=tuple(front(problem, min(other.solution.omega for other in (solved, *others.values())), clock)),
        spans=simulate(plan, problem.spec, problem.profile, *_shown_lengths(plan, program)).spans,
    )


def _shown_lengths(plan: Plan, program: Program) -> tuple[list[int], list[int]]:
    """Prompt and output lengths of one batch: of its first sequences and tokens, if all are too many to show."""
    workload = plan.workload
    sequences = list(itertools.islice(workload.batches[0], SHOWN_SEQUENCES))
    steps = SHOWN_STEPS // (2 * len(plan.stages)) - program.prefill_microbatches
    most = max(2, int(steps / max(count for _, count in program.decode_rounds)))
    return [prompt for prompt, _ in sequences], [min(output, most) for _, output in sequences]


def _as_program(plan: Plan, problem: Problem) -> tuple[Program, Assignment]:
    """The program that has the plan's devices, widths and micro-batches only, and the plan in it."""
    chosen = [plan.precision(unit) for unit in problem.spec.units]
    constraints = replace(
        problem.constraints,
        fixed_bits=None,
        kv_bits=tuple({stage.kv_bits for stage in plan.stages}),
        pinned={},
        unit_bits={},
        prefill_microbatch=plan.prefill_microbatch,
        decode_microbatch=plan.decode_microbatch,
    )
    costs = Costs.of(replace(problem, constraints=constraints), tuple(dict.fromkeys(chosen)))
    names = [device.name for device in problem.cluster.devices]
    order = tuple(names.index(stage.device) for stage in plan.stages)
    positions = [i for i in range(len(plan.stages)) for _ in plan.units_of(i)]
    assignment = Assignment(
        np.array(positions),
        np.array([costs.options.index(option) for option in chosen]),
        np.array([stage.kv_bits != costs.kv_bits[0] for stage in plan.stages]),
    )
    return costs.program(Configuration(order, costs.prefill[0], costs.decode[0])), assignment


def _seconds(program: Program, assignment: Assignment) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of a micro-batch of prefill and of one of decode: [phase][stage], and of the links behind them."""
    program = program.of_caches(assignment.narrow)
    units, positions, _ = program.shape
    stages = []
    for costs, step in ((program.prefill, program.prefill_step), (program.decode, program.decode_step)):
        chosen = costs[np.arange(units), assignment.positions, assignment.options]
        stages.append([float(step[d] + chosen[assignment.positions == d].sum()) for d in range(positions)])
    none = [0.0] * positions
    return stages, [links.tolist() or none for links in (program.prefill_links, program.decode_links)]


def _full(stage: Stage, used: int, problem: Problem) -> bool:
    """Whether another layer like the smallest of the stage would not fit."""
    room = problem.constraints.room(problem.cluster.device(stage.device))
    layers = zip(range(*stage.layers), stage.precisions, strict=True)
    smallest = min((problem.spec.unit_bytes(f"layer.{i}", precision) for i, precision in layers), default=0)
    return used + smallest > room


def _units(plan: Plan, problem: Problem) -> tuple[UnitView, ...]:
    return tuple(
        UnitView(
            unit=unit,
            device=stage.device,
            width=plan.precision(unit).width,
            bits=problem.spec.bits(unit, plan.precision(unit)),
            weight_bytes=problem.spec.unit_bytes(unit, plan.precision(unit)),
            omega=problem.sensitivity.of(unit, plan.precision(unit))
            + problem.sensitivity.of_cache(problem.spec, unit, stage.kv_bits),
        )
        for i, stage in enumerate(plan.stages)
        for unit in plan.units_of(i)
    )
