"""What a plan is explained by, against the definitions and against plans made otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_instances import Instance, instance

import planner
from llmpq.spec import Plan, Workload
from planner.costs import Choice, Costs


def explained(given: Instance) -> tuple[Plan, planner.Explanation]:
    plan = planner.solve(given)
    return plan, planner.explain(plan, given)


def test_stages_take_what_the_program_says_and_the_longest_is_named() -> None:
    given = instance(8, slowness=(1.0, 2.5), memory=(None, None), all_devices=True, workload=Workload(8, 32, 16))
    plan, found = explained(given)
    costs = Costs.of(given)
    order = tuple([d.name for d in given.cluster.devices].index(stage.device) for stage in plan.stages)
    prefill = next(p for p in costs.prefill if p.size == plan.prefill_microbatch)
    decode = next(p for p in costs.decode if p.size == plan.decode_microbatch)
    program = costs.program(Choice(order, prefill, decode))
    assert [view.prefill_link_s for view in found.stages] == pytest.approx(program.prefill_links.tolist())
    assert [view.decode_link_s for view in found.stages] == pytest.approx(program.decode_links.tolist())
    total = sum(view.prefill_s + view.prefill_link_s for view in found.stages)
    longest = max(max(view.prefill_s, view.prefill_link_s) for view in found.stages)
    assert plan.predicted is not None
    assert total + (prefill.count - 1) * longest == pytest.approx(plan.predicted.prefill_s)
    (limit,) = [view for view in found.stages if "prefill" in view.bounds]
    assert max(limit.prefill_s, limit.prefill_link_s) == longest


def test_one_micro_batch_takes_the_round_trip() -> None:
    given = instance(4, slowness=(1.0, 1.0), workload=Workload(1, 8, 8), memory=(None, None), all_devices=True)
    _, found = explained(given)
    assert found.round_trip
    assert not any("decode" in view.bounds for view in found.stages)


def test_a_stage_that_is_full_is_limited_by_memory() -> None:
    roomy = instance(6, slowness=(1.0, 8.0), memory=(None, None))
    (size,) = planner.solve(roomy).predicted.memory_bytes  # type: ignore[union-attr]
    plan, found = explained(instance(6, slowness=(1.0, 8.0), memory=(int(0.7 * size), None), all_devices=True))
    bounds = {view.device: view.bounds for view in found.stages}
    assert "memory" in bounds["d0"] and "memory" not in bounds["d1"]
    gained = {change.what: change.tokens_per_s for change in found.changes}
    assert plan.predicted is not None
    assert gained["10 % more memory on d0"] > plan.predicted.tokens_per_s
    assert "10 % more memory on d1" not in gained


def test_changes_are_what_solving_otherwise_gives() -> None:
    given = instance(5, slowness=(1.0, 1.5), memory=(None, None))
    _, found = explained(given)
    budget = given.constraints.budget(given.spec, given.sensitivity)
    otherwise = {
        "without d0": given.constrained(excluded=("d0",)),
        "10 % more sensitivity allowed": given.constrained(omega_budget=1.1 * budget),
        "10 % less sensitivity allowed": given.constrained(omega_budget=0.9 * budget),
    }
    changes = {change.what: change for change in found.changes}
    for what, other in otherwise.items():
        plan = planner.solve(other)
        assert plan.predicted is not None
        assert changes[what].tokens_per_s == pytest.approx(plan.predicted.tokens_per_s, rel=1e-6)
    assert found.baselines.keys() == planner.baselines(given).keys()


def test_the_front_gains_throughput_with_every_bit_of_quality_given_up() -> None:
    _, found = explained(instance(6, slowness=(1.0, 2.0), memory=(None, None)))
    assert len(found.front) >= 3
    speeds = [change.tokens_per_s for change in found.front]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(speeds)
    omegas = [change.omega for change in found.front]
    assert omegas == sorted(omegas)


def test_what_must_be_used_is_not_left_out() -> None:
    given = instance(4, slowness=(1.0, 1.0), memory=(None, None), required=("d1",))
    _, found = explained(replace(given))
    assert "without d1" not in {change.what for change in found.changes}
