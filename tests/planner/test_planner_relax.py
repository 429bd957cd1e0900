"""What is proposed where there is no plan: that it makes one possible, and that there is something to propose."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import InfeasibleError, Plan
from planner import memory
from tests.support.planner_instances import Instance, random_instance


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
    return None if _has_plan(given) else given


def _has_plan(given: Instance) -> bool:
    try:
        planner.solve(given)
    except InfeasibleError:
        return False
    return True


def _check(plan: Plan, given: Instance) -> None:
    """The plan holds on the devices, and for the workload, that it names. Twins of a device are called d0-2."""
    tables = {device.name: given.profile.tables[device.name[:2]] for device in plan.cluster.devices}
    used = memory.stage_bytes(plan, given.spec, replace(given.profile, tables=tables))
    for stage, size in zip(plan.stages, used, strict=True):
        cap = plan.cluster.device(stage.device).memory_bytes
        assert cap is None or size <= cap
    assert plan.num_layers == given.spec.num_layers


def _given_up(plan: Plan, given: Instance) -> list[str]:
    """What of the given problem the plan does not keep to: how relaxations that say so say it."""
    limits, workload, cluster = given.constraints, plan.workload, plan.cluster
    omega = sum(given.sensitivity.of(unit, plan.precision(unit)) for unit in given.spec.units)
    low = [unit for unit in given.spec.units if plan.precision(unit).bits < limits.min_bits]
    worse = omega > limits.budget(given.spec, given.sensitivity) * 1.000001
    devices = given.cluster.devices
    grown = [d.name for d in devices if (cluster.device(d.name).memory_bytes or 0) > 1.01 * (d.memory_bytes or 0)]
    alone = len(grown) == 1 < len(devices)
    more = len(cluster.devices) - len(devices)
    lengths = f"prompts of {workload.longest_prompt} and answers of {workload.output_len} tokens instead"
    found = {
        f"a batch of {workload.batch_size}": workload.batch_size < given.workload.batch_size,
        f"{lengths}|half the context|quarter of the context": workload.max_length < given.workload.max_length,
        f"a summed sensitivity of {omega:.4g} instead|any quality": worse and not low,
        f"fewer than {limits.min_bits} bits for {', '.join(low[:3])}|any quality": bool(low),
        f"% more memory on {grown[0] if alone else 'every device'}" if grown else "": bool(grown),
        f"{'another device' if more == 1 else f'{more} more devices'} like {cluster.devices[-1].name[:2]}": more > 0,
    }
    return [words for words, differs in found.items() if differs]


def _growth(plan: Plan, given: Instance) -> float:
    """What the caps that were widened were multiplied by."""
    return max((plan.cluster.device(d.name).memory_bytes or 0) / (d.memory_bytes or 1) for d in given.cluster.devices)


def _proposals(seeds: range) -> list[int]:
    """Checks all that is proposed for these seeds; how many there were for each infeasible instance."""
    counts = []
    for seed in seeds:
        if (given := _infeasible(seed)) is None:
            continue
        found = planner.relaxations(given)
        for relaxation in found:
            _check(relaxation.solved.plan, given)
            given_up = _given_up(relaxation.solved.plan, given)
            assert 1 <= len(given_up) <= 2
            for words in given_up:
                assert any(way in relaxation.change for way in words.split("|")), f"seed {seed}: {relaxation.change}"
            if percent := re.search(r"(\d+) % more memory", relaxation.change):
                assert float(percent[1]) == pytest.approx(100 * (_growth(relaxation.solved.plan, given) - 1), abs=1)
        assert len({relaxation.change for relaxation in found}) == len(found)
        counts.append(len(found))
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_each_proposed_change_makes_a_plan_possible(block: int) -> None:
    counts = _proposals(range(7000 + 12 * block, 7012 + 12 * block))
    assert len(counts) >= 4
    assert min(counts) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_proposed_changes_make_a_plan_possible_on_two_hundred_instances() -> None:
    counts = _proposals(range(8000, 8450))
    assert len(counts) >= 200
    assert min(counts) >= 3


@pytest.mark.slow
def test_a_batch_is_made_no_smaller_than_it_must_be() -> None:
    sizes = set()
    for seed in (9003, 9017, 9034, 9045, 9881):
        given = _infeasible(seed)
        assert given is not None
        asked = given.workload.batch_size
        smaller = [replace(given, workload=replace(given.workload, batch_size=size)) for size in range(1, asked)]
        most = max(other.workload.batch_size for other in smaller if _has_plan(other))
        proposed = {relaxation.change: relaxation.solved for relaxation in planner.relaxations(given)}
        assert proposed[f"a batch of {most} instead of {asked}"].plan.workload.batch_size == most
        sizes.add(most)
    assert sizes == {1, 2, 3, 4, 5}
