"""Why a plan is as it is: what bounds its stages, what else was possible, and what more would buy. All by re-solving.

The cost model is that of the search (objective.py), so every number here can be compared with a plan's prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmpq.spec import InfeasibleError, ModelSpec, Plan, Profile
from planner.baselines import Baseline
from planner.memory import stage_bytes
from planner.predict import Step, resources
from planner.problem import Problem
from planner.search import baselines, solve

EACH_S = 10.0  # for one search
MORE = 0.1  # of memory or of the quality budget, to see what it buys
FRONT = 7  # points of the front of throughput over quality


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
class Change:
    """Something that could be different, and what it does to throughput."""

    what: str
    tokens_per_s: float
    omega: float


@dataclass(frozen=True)
class Explanation:
    """`round_trip`: decode takes as long as a token takes through all stages, whatever the slowest of them does."""

    stages: tuple[StageView, ...]
    round_trip: bool
    baselines: dict[Baseline, Plan]
    changes: tuple[Change, ...]
    front: tuple[Change, ...]  # from the lowest quality to the highest


def explain(plan: Plan, problem: Problem) -> Explanation:
    """All that can be said of a plan that `solve` made of a problem. Takes some twenty searches."""
    problem = replace(problem, constraints=replace(problem.constraints, time_limit_s=EACH_S))
    stages, round_trip = _stages(plan, problem.spec, problem.profile)
    return Explanation(
        stages=stages,
        round_trip=round_trip,
        baselines=baselines(problem),
        changes=tuple(_changes(problem)),
        front=tuple(_front(problem)),
    )


def _change(problem: Problem, what: str) -> Change | None:
    """What the best plan of this problem reaches, if there is one."""
    try:
        plan = solve(problem)
    except InfeasibleError:
        return None
    assert plan.predicted is not None and plan.solution is not None
    return Change(what, plan.predicted.tokens_per_s, plan.solution.omega)


def _stages(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[tuple[StageView, ...], bool]:
    work = plan.workload
    _, seconds = resources(plan, spec, profile)
    prefill = tuple(range(plan.prefill_microbatch))
    decode = tuple(range(plan.decode_microbatch))
    steps = (
        Step(prefill, len(prefill) * work.prompt_len, (work.prompt_len + 1) / 2),
        Step(decode, len(decode), work.prompt_len + work.output_len / 2),
    )
    count = len(plan.stages)
    of_stages = [[seconds(2 * i, step) for i in range(count)] for step in steps]
    of_links = [[seconds(2 * i + 1, step) if count > 1 else 0.0 for i in range(count)] for step in steps]
    longest = [max(*stages, *links) for stages, links in zip(of_stages, of_links, strict=True)]
    microbatches = -(-work.batch_size // plan.decode_microbatch)
    round_trip = sum(of_stages[1]) + sum(of_links[1]) >= microbatches * longest[1]
    views = []
    for i, (stage, used) in enumerate(zip(plan.stages, stage_bytes(plan, spec, profile), strict=True)):
        cap = plan.cluster.device(stage.device).memory_bytes
        smallest_layer = min((spec.unit_bytes("layer.0", p) for p in set(stage.precisions)), default=0)
        bounds = [
            name
            for name, phase in (("prefill", 0), ("decode", 1))
            if max(of_stages[phase][i], of_links[phase][i]) == longest[phase] and not (phase and round_trip)
        ]
        if cap is not None and used + smallest_layer > cap:
            bounds.append("memory")
        views.append(
            StageView(
                device=stage.device,
                prefill_s=of_stages[0][i],
                decode_s=of_stages[1][i],
                prefill_link_s=of_links[0][i],
                decode_link_s=of_links[1][i],
                memory_bytes=used,
                cap_bytes=cap,
                bounds=tuple(bounds),
            )
        )
    return tuple(views), round_trip


def _changes(problem: Problem) -> Iterator[Change]:
    """More memory on each device, a device less, more and less quality: each alone."""
    devices = problem.cluster.devices
    for i, device in enumerate(devices):
        if device.memory_bytes is not None:
            larger = replace(device, memory_bytes=int(device.memory_bytes * (1 + MORE)))
            cluster = replace(problem.cluster, devices=(*devices[:i], larger, *devices[i + 1 :]))
            yield from _found(replace(problem, cluster=cluster), f"{100 * MORE:.0f} % more memory on {device.name}")
    for device in devices:
        if len(devices) > 1 and not problem.constraints.must_use(device.name):
            without = replace(problem.constraints, excluded=(*problem.constraints.excluded, device.name))
            yield from _found(replace(problem, constraints=without), f"without {device.name}")
    budget = problem.constraints.budget(problem.spec, problem.sensitivity)
    if math.isfinite(budget):
        for factor, what in ((1 + MORE, "more"), (1 - MORE, "less")):
            other = replace(problem.constraints, omega_budget=budget * factor)
            words = f"{100 * MORE:.0f} % {what} sensitivity allowed"
            yield from _found(replace(problem, constraints=other), words)


def _found(problem: Problem, what: str) -> Iterator[Change]:
    change = _change(problem, what)
    if change is not None:
        yield change


def _front(problem: Problem) -> Iterator[Change]:
    """The best throughput at budgets from that of the narrowest width everywhere to that of the widest but 16 bits."""
    constraints = problem.constraints
    if constraints.fixed_bits is not None:
        return
    totals = [
        sum(problem.sensitivity.of(unit, option) for unit in problem.spec.units)
        for option in constraints.options
        if option.quantized
    ]
    positive = [total for total in totals if total > 0]
    if len(positive) < 2:
        return
    high, low = max(positive), min(positive)
    best: Change | None = None
    for i in range(FRONT):
        budget = low * (high / low) ** (i / (FRONT - 1))
        limited = replace(problem, constraints=replace(constraints, omega_budget=budget))
        change = _change(limited, f"sensitivity of at most {budget:.3g}")
        if change is not None and (best is None or change.tokens_per_s > best.tokens_per_s):
            best = change
            yield change
