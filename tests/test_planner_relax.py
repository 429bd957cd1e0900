"""What is proposed where there is no plan: that it makes one possible, and that there is something to propose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from planner_instances import Instance, random_instance

import planner
from llmpq.spec import InfeasibleError, NotMeasuredError, Plan
from planner import memory


def _infeasible(seed: int) -> Instance | None:
    """A random instance with caps that are much too small, if it has no plan."""
    given = random_instance(np.random.default_rng(seed), max_layers=4)
    rng = np.random.default_rng(seed + 1)
    small = tuple(
        replace(d, memory_bytes=int((d.memory_bytes or 1_000_000) * rng.uniform(0.05, 0.5)))
        for d in given.cluster.devices
    )
    given = replace(given, cluster=replace(given.cluster, devices=small))
    given = given.constrained(gap=1e-3, min_bits=int(rng.choice(given.constraints.bits)))
    try:
        planner.solve(given)
    except InfeasibleError:
        return given
    return None


def _check(plan: Plan, given: Instance) -> None:
    """The plan holds on the devices, and for the workload, that it names."""
    used = memory.stage_bytes(plan, given.spec, given.profile)
    for stage, size in zip(plan.stages, used, strict=True):
        cap = plan.cluster.device(stage.device).memory_bytes
        assert cap is None or size <= cap
    assert plan.num_layers == given.spec.num_layers


def _given_up(plan: Plan, given: Instance) -> set[str]:
    """What of the given problem the plan does not keep to: beginnings of relaxations that say so."""
    limits, workload, cluster = given.constraints, plan.workload, plan.cluster
    omega = sum(given.sensitivity.of(unit, plan.precision(unit)) for unit in given.spec.units)
    low = [unit for unit in given.spec.units if plan.precision(unit).bits < limits.min_bits]
    wider = any((cluster.device(d.name).memory_bytes or 0) > (d.memory_bytes or 0) for d in given.cluster.devices)
    found = {
        f"a batch of {workload.batch_size} instead": workload.batch_size < given.workload.batch_size,
        f"prompts of {workload.longest_prompt} and answers of {workload.output_len} tokens instead": (
            workload.max_length < given.workload.max_length
        ),
        f"a summed sensitivity of {omega:.4g} instead": omega > limits.budget(given.spec, given.sensitivity) * 1.000001,
        f"fewer than {limits.min_bits} bits for {', '.join(low[:3])}": bool(low),
        f"{100 * (_ratio(plan, given) - 1):.0f} % more memory on every device": wider,
        f"another device like {cluster.devices[-1].name[:2]}": len(cluster.devices) > len(given.cluster.devices),
    }
    return {words for words, differs in found.items() if differs}


def _ratio(plan: Plan, given: Instance) -> float:
    """Of the plan's caps to the given ones."""
    pairs = [(plan.cluster.device(d.name).memory_bytes, d.memory_bytes) for d in given.cluster.devices]
    return max(((new or 0) / old for new, old in pairs if old), default=1.0)


def _proposals(seeds: range) -> list[int]:
    """Checks all that is proposed for these seeds; how many there were for each infeasible instance."""
    counts = []
    for seed in seeds:
        if (given := _infeasible(seed)) is None:
            continue
        found = planner.relaxations(given)
        for relaxation in found:
            _check(relaxation.plan, given)
            (given_up,) = _given_up(relaxation.plan, given)
            assert relaxation.change.startswith(given_up), f"seed {seed}: {relaxation.change}"
        counts.append(len(found))
    return counts


@pytest.mark.parametrize("block", range(4))
def test_what_is_proposed_makes_a_plan_possible(block: int) -> None:
    counts = _proposals(range(7000 + 12 * block, 7012 + 12 * block))
    assert len(counts) >= 4
    assert max(counts) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_what_is_proposed_makes_a_plan_possible_on_two_hundred_instances() -> None:
    counts = _proposals(range(8000, 8450))
    assert len(counts) >= 200
    assert np.mean(np.array(counts) >= 3) > 0.5


def test_a_batch_is_made_no_smaller_than_it_must_be() -> None:
    given = next(found for seed in range(9000, 9400) if (found := _infeasible(seed)) and found.workload.batch_size == 6)
    for relaxation in planner.relaxations(given):
        if relaxation.change.startswith("a batch of"):
            size = relaxation.plan.workload.batch_size
            larger = replace(given, workload=replace(given.workload, batch_size=size + 1))
            with pytest.raises((InfeasibleError, NotMeasuredError)):
                planner.solve(larger)
