"""What is promised of any plan and of baselines, and the best objective there is, by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import InfeasibleError, Plan, Solved
from planner import memory
from planner.baselines.systems import Baseline
from planner.cost_arrays import Configuration, Costs
from planner.mixed import options_of
from planner.objective import Program
from tests.support.planner_instances import Instance, brute_force


def least(given: Instance) -> float:
    """The best objective over every device subset and order, both sizes, caches, and all assignments."""
    limits = given.constraints
    of_caches = [Costs.of(given.constrained(kv_bits=(bits,))) for bits in limits.kv_bits]
    costs = of_caches[0]
    names = [device.name for device in given.cluster.devices]
    usable = [d for d, name in enumerate(names) if name not in limits.excluded]
    return min(
        (
            _worth(given, [names[d] for d in order]) * brute_force(program)
            for length in range(1, min(len(usable), len(given.spec.units)) + 1)
            for order in itertools.permutations(usable, length)
            if set(limits.required) <= {names[d] for d in order}
            if _together(given, [names[d] for d in order])
            if not limits.all_devices or length == len(names)
            for i, j in itertools.product(range(len(costs.prefill)), range(len(costs.decode)))
            for choices in [[Configuration(order, of.prefill[i], of.decode[j]) for of in of_caches]]
            for program in _programs([of.program(choice) for of, choice in zip(of_caches, choices, strict=True)])
        ),
        default=math.inf,
    )


def _programs(of_caches: list[Program]) -> Iterator[Program]:
    """From programs with one KV cache each, those with any of these on each position."""

    def chosen(name: str, caches: tuple[int, ...]) -> np.ndarray:
        return np.stack([getattr(of_caches[cache], name)[:, d] for d, cache in enumerate(caches)], axis=1)

    for caches in itertools.product(range(len(of_caches)), repeat=of_caches[0].shape[1]):
        arrays = {name: chosen(name, caches) for name in ("prefill", "decode", "memory", "omega")}
        yield replace(of_caches[0], **arrays)


def _together(given: Instance, devices: Iterable[str]) -> bool:
    """Whether no rule forbids that these are all used."""
    rules, used = given.constraints.at_most, set(devices)
    return all(sum(w for name, w in rule.weights.items() if name in used) <= rule.limit for rule in rules)


def _worth(given: Instance, devices: Iterable[str]) -> float:
    """What a second of these devices counts in the objective."""
    if given.constraints.objective == "time":
        return 1.0
    per_second = sum(given.cluster.device(name).price_per_hour for name in devices) / 3600
    lens = given.workload.output_lens or [given.workload.output_len]
    return per_second / (given.workload.batch_size * sum(lens) / len(lens) / 1e6)


def _omega(plan: Plan, given: Instance) -> float:
    of_units = sum(given.sensitivity.of(unit, plan.precision(unit)) for unit in given.spec.units)
    of_8 = sum(len(stage.precisions) for stage in plan.stages if stage.kv_bits == 8)
    return of_units + (of_8 / plan.num_layers * given.sensitivity.omega["kv_cache"]["8"] if of_8 else 0.0)


def check(solved: Solved, given: Instance) -> None:
    """All that is promised of any plan."""
    plan = solved.plan
    assert plan.num_layers == given.spec.num_layers
    assert all(a < b for a, b in (stage.layers for stage in plan.stages[1:-1])), "a stage in the middle is empty"
    used = memory.stage_bytes(plan, given.spec, given.profile)
    assert solved.prediction.memory_bytes == used
    for stage, size in zip(plan.stages, used, strict=True):
        cap = given.cluster.device(stage.device).memory_bytes
        assert cap is None or size <= cap
    assert solved.solution.omega == pytest.approx(_omega(plan, given))
    if solved.solution.omega_budget is not None:
        assert solved.solution.omega <= solved.solution.omega_budget * (1 + 1e-9)
    assert solved.solution.bound <= solved.solution.objective
    assert {plan.precision(unit) for unit in given.spec.units} <= set(options_of(given))
    _check_constraints(solved, given)
    seconds = solved.prediction.prefill_s + solved.prediction.decode_s
    worth = _worth(given, [stage.device for stage in plan.stages])
    assert solved.solution.objective == pytest.approx(
        worth * (seconds + given.constraints.theta * solved.solution.omega)
    )
    assert Solved.from_dict(solved.to_dict()) == solved


def _check_constraints(solved: Solved, given: Instance) -> None:
    plan = solved.plan
    limits, used = given.constraints, {stage.device for stage in plan.stages}
    assert {stage.kv_bits for stage in plan.stages} <= set(limits.kv_bits)
    assert set(limits.required) <= used and not set(limits.excluded) & used
    assert _together(given, used)
    assert not limits.all_devices or len(used) == len(given.cluster.devices)
    assert limits.prefill_microbatch in (None, plan.prefill_microbatch)
    assert limits.decode_microbatch in (None, plan.decode_microbatch)
    for unit, device in limits.pinned.items():
        stages = {"embedding": plan.stages[0], "head": plan.stages[-1]}
        holder = stages.get(unit) or next(s for s in plan.stages if int(unit.split(".")[1]) in range(*s.layers))
        assert holder.device == device
    for unit, bits in limits.unit_bits.items():
        assert plan.precision(unit).width == bits
    assert solved.prediction.prefill_s <= limits.max_ttft_s * (1 + 1e-9)
    rounds = given.workload.rounds or 1
    assert solved.prediction.decode_s / rounds <= limits.max_tpot_s * (1 + 1e-9)


def equals_brute_force(given: Instance, name: str) -> bool:
    """Checks what the search makes of an instance; tells whether it is feasible."""
    best = least(given)
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            planner.solve(given)
        return False
    solved = planner.solve(given)
    check(solved, given)
    assert objective(solved) == pytest.approx(best, rel=1e-6), name
    assert solved.solution.bound == pytest.approx(best, rel=1e-6), name
    return True


def objective(solved: Solved) -> float:
    return solved.solution.objective


def no_baseline_is_better(given: Instance) -> dict[Baseline, Solved]:
    """Checks plan and baselines, which it returns; where there is no plan, there is no baseline either."""
    baselines = planner.baseline_plans(given)
    try:
        solved = planner.solve(given)
    except InfeasibleError:
        assert not baselines
        return baselines
    check(solved, given)
    for kind, baseline in baselines.items():
        check(baseline, given)
        assert objective(solved) <= objective(baseline), kind
    return baselines
