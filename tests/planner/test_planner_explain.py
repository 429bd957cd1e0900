"""What a plan is explained by, against the definitions and against plans made otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

import planner
from llmpq.spec import InfeasibleError, Solved, Workload
from planner.cost_arrays import Configuration, Costs
from tests.support.planner_instances import Instance, instance, priced


def explained(given: Instance) -> tuple[Solved, planner.Explanation]:
    plan = planner.solve(given)
    return plan, planner.explain(plan, given)


def test_stages_take_the_program_s_seconds_and_the_longest_is_named() -> None:
    given = instance(8, slowness=(1.0, 2.5), memory=(None, None), all_devices=True, workload=Workload(8, 32, 16))
    plan, found = explained(given)
    costs = Costs.of(given)
    order = tuple([d.name for d in given.cluster.devices].index(stage.device) for stage in plan.plan.stages)
    prefill = next(p for p in costs.prefill if p.size == plan.plan.prefill_microbatch)
    decode = next(p for p in costs.decode if p.size == plan.plan.decode_microbatch)
    program = costs.program(Configuration(order, prefill, decode))
    assert [view.prefill_link_s for view in found.stages] == pytest.approx(program.prefill_links.tolist())
    assert [view.decode_link_s for view in found.stages] == pytest.approx(program.decode_links.tolist())
    total = sum(view.prefill_s + view.prefill_link_s for view in found.stages)
    longest = max(max(view.prefill_s, view.prefill_link_s) for view in found.stages)
    assert total + (prefill.count - 1) * longest == pytest.approx(plan.prediction.prefill_s)
    (limit,) = [view for view in found.stages if "prefill" in view.bounds]
    assert max(limit.prefill_s, limit.prefill_link_s) == longest


def test_one_micro_batch_takes_the_round_trip() -> None:
    given = instance(4, slowness=(1.0, 1.0), workload=Workload(1, 8, 8), memory=(None, None), all_devices=True)
    _, found = explained(given)
    assert found.round_trip
    assert not any("decode" in view.bounds for view in found.stages)


def test_a_stage_that_is_full_is_limited_by_memory() -> None:
    roomy = instance(6, slowness=(1.0, 8.0), memory=(None, None))
    (size,) = planner.solve(roomy).prediction.memory_bytes  # type: ignore[union-attr]
    plan, found = explained(instance(6, slowness=(1.0, 8.0), memory=(int(0.66 * size), None), all_devices=True))
    bounds = {view.device: view.bounds for view in found.stages}
    assert "memory" in bounds["d0"] and "memory" not in bounds["d1"]
    changes = {change.what: change for change in found.changes}
    before, more = plan.prediction.tokens_per_s, changes["10 % more memory on d0"]
    assert more.tokens_per_s > before
    assert more.amount == pytest.approx(0.066 * size, abs=2)  # bytes
    assert "10 % more memory on d1" not in changes


def test_each_change_equals_solving_the_changed_problem() -> None:
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
        assert changes[what].tokens_per_s == pytest.approx(plan.prediction.tokens_per_s, rel=1e-6)
    assert found.baselines.keys() == planner.baseline_plans(given).keys()


def test_the_front_gains_throughput_with_every_bit_of_quality_given_up() -> None:
    _, found = explained(instance(6, slowness=(1.0, 2.0), memory=(None, None)))
    assert len(found.front) >= 3
    speeds = [point.prediction.tokens_per_s for point in found.front if point.prediction]
    assert speeds == sorted(speeds) and len(set(speeds)) == len(speeds) == len(found.front)
    solutions = [point.solution for point in found.front if point.solution]
    assert all(s.omega_budget is not None and s.omega <= s.omega_budget * (1 + 1e-9) for s in solutions)
    omegas = [s.omega for s in solutions]
    assert omegas == sorted(omegas)


def test_where_cost_is_the_objective_changes_and_front_are_the_cheapest_plans() -> None:
    given = priced(instance(6, slowness=(1.0, 1.8), memory=(None, None)), [2.0, 1.0])
    plan, found = explained(given)
    assert found.objective == "cost"
    changes = {change.what: change.solved for change in found.changes}
    for what, other in {
        "without d1": given.constrained(excluded=("d1",)),
        "10 % less sensitivity allowed": given.constrained(
            omega_budget=0.9 * given.constraints.budget(given.spec, given.sensitivity)
        ),
    }.items():
        cheapest = planner.solve(other).cost_per_million_tokens
        assert changes[what].cost_per_million_tokens == pytest.approx(cheapest, rel=1e-6)
    costs = [point.cost_per_million_tokens or 0 for point in found.front]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs) >= 3
    for cost, point in zip(costs, found.front, strict=True):
        budget = point.solution.omega_budget
        assert cost == pytest.approx(planner.solve(given.constrained(omega_budget=budget)).cost_per_million_tokens)
    assert [stage.device for stage in plan.plan.stages] == ["d1"]  # the dear device is no more than 1.8 times as fast
    assert {stage.device for point in found.front for stage in point.plan.stages} == {"d1"}


def test_required_devices_are_used() -> None:
    given = instance(4, slowness=(1.0, 1.0), memory=(None, None), required=("d1",))
    _, found = explained(replace(given))
    assert "without d1" not in {change.what for change in found.changes}


def test_units_are_those_of_the_plan_and_their_sensitivities_add_up() -> None:
    plan, found = explained(instance(5, slowness=(1.0, 1.5), memory=(None, None)))
    given = instance(5, slowness=(1.0, 1.5), memory=(None, None))
    assert [view.unit for view in found.units] == list(given.spec.units)
    assert sum(view.omega for view in found.units) == pytest.approx(plan.solution.omega)
    for view in found.units:
        assert view.width == plan.plan.precision(view.unit).bits == view.bits
        assert view.omega == (given.sensitivity.omega[view.unit][f"w{view.width}-g32-sym-rtn"] if view.bits < 16 else 0)
    layers = [view.device for view in found.units if view.unit.startswith("layer")]
    assert layers == [stage.device for stage in plan.plan.stages for _ in stage.widths]


def test_every_unit_a_width_wider_or_narrower_is_just_that() -> None:
    plan, found = explained(instance(4, slowness=(1.0, 1.5), memory=(None, None)))
    changes = {change.what: change for change in found.changes if change.kind == "bits"}
    wider, narrower = {3: 4, 4: 8, 8: 16, 16: 16}, {3: 3, 4: 3, 8: 4, 16: 8}
    given = instance(4, slowness=(1.0, 1.5), memory=(None, None))
    for words, step in (("wider", wider), ("narrower", narrower)):
        change = changes[f"every unit one width {words}"]
        for unit in given.spec.units:
            assert change.solved.plan.precision(unit).bits == step[plan.plan.precision(unit).bits]
        assert (change.amount > 0) == (words == "wider")
    widths = {plan.plan.precision(unit).bits for unit in given.spec.units}
    for bits in (min(widths), max(widths)):
        other = changes[f"no unit of {bits} bits"].solved
        assert bits not in {other.plan.precision(unit).bits for unit in given.spec.units}
        assert other.solution.omega <= (plan.solution.omega_budget or 0) * (1 + 1e-9)
        assert other.solution.objective >= plan.solution.objective * (1 - 1e-6)


def test_reasons_for_no_plan_are_named() -> None:
    roomy = instance(6, memory=(None, None), fixed_bits=4, workload=Workload(1, 8, 8), excluded=("d1",))
    (size,) = planner.solve(roomy).prediction.memory_bytes  # type: ignore[union-attr]
    given = instance(6, memory=(int(0.8 * size), int(0.8 * size)), fixed_bits=4, workload=Workload(1, 8, 8))
    _, found = explained(given)
    assert {"without d0", "without d1"} <= set(found.unmet)
    assert not set(found.unmet) & {change.what for change in found.changes}
    with pytest.raises(InfeasibleError):
        planner.solve(given.constrained(excluded=("d0",)))


def test_the_timeline_is_one_batch_from_start_to_end() -> None:
    given = instance(5, slowness=(1.0, 1.5), memory=(None, None), all_devices=True)
    plan, found = explained(given)
    tokens = sum(span.sequences for span in found.spans if (span.kind, span.index) == ("stage", 0))
    assert tokens == given.workload.batch_size * given.workload.output_len
    end = max(span.end_s for span in found.spans)
    assert end == pytest.approx(plan.prediction.prefill_s + plan.prediction.decode_s, rel=0.05)
    for i, view in enumerate(found.stages):  # what a stage and its link do in a batch, step by step
        for kind, prefill_s, decode_s in (
            ("stage", view.prefill_s, view.decode_s),
            ("link", view.prefill_link_s, view.decode_link_s),
        ):
            own = [span for span in found.spans if (span.kind, span.index) == (kind, i)]
            first, later = ([span.seconds for span in own if span.phase == phase] for phase in ("prefill", "decode"))
            assert sum(first) == pytest.approx(found.prefill_steps * prefill_s)
            assert sum(later) == pytest.approx(found.decode_steps * decode_s, rel=0.02)


def test_mixed_lengths_are_explained_by_their_first_batch() -> None:
    lengths = [(8, 3), (40, 9), (12, 1), (20, 6), (9, 2), (30, 5)]
    given = instance(4, slowness=(1.0, 1.5), memory=(None, None), workload=Workload.of_lengths(4, lengths))
    plan, found = explained(given)
    first = [span for span in found.spans if (span.kind, span.index) == ("stage", 0)]
    assert sum(span.tokens for span in first if span.phase == "prefill") == sum(prompt for prompt, _ in lengths[:4])
    assert sum(span.sequences for span in first) == sum(output for _, output in lengths[:4])
    assert found.prefill_steps == -(-4 // plan.plan.prefill_microbatch)
