"""Devices that lack a width: their cost tables have no row of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import InfeasibleError, NotMeasuredError, Op, Plan, Precision, Workload
from planner.cost_arrays import Costs
from tests.support.planner_checks import equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, random_instance


def without(given: Instance, **bits: tuple[int, ...]) -> Instance:
    """The costs of these devices without rows of these widths."""
    tables = dict(given.profile.tables)
    for name, lacked in bits.items():
        rows = tables[name].rows
        kept = tuple(r for r in rows if r.op.precision is None or r.op.precision.bits not in lacked)
        assert len(kept) < len(rows)
        tables[name] = replace(tables[name], rows=kept)
    return replace(given, profile=replace(given.profile, tables=tables))


def widths(plan: Plan) -> dict[str, set[object]]:
    units = {stage.device: {*stage.widths} for stage in plan.stages}
    units[plan.stages[0].device].add(plan.embedding.precision.width)
    units[plan.stages[-1].device].add(plan.head.precision.width)
    return units


@pytest.mark.parametrize("seed", range(8))
def test_the_best_plan_of_devices_that_lack_widths_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=4, max_devices=2)
    names = [device.name for device in given.cluster.devices]
    lacked = {name: tuple(int(b) for b in rng.choice((3, 4, 8, 16), int(rng.integers(1, 4)), False)) for name in names}
    given = without(given, **lacked)
    if equals_brute_force(given, f"widths {seed}"):
        for device, used in widths(planner.solve(given).plan).items():
            assert not used & set(lacked[device])
        for solved in no_baseline_is_better(given).values():
            for device, used in widths(solved.plan).items():
                assert not used & set(lacked[device])


def test_a_device_without_3_bits_has_none_and_a_plan_that_needs_them_says_why() -> None:
    small = Workload(1, 16, 8)
    whole = planner.solve(instance(4, slowness=(1.0,), memory=(None,), workload=small, fixed_bits=3)).prediction
    roomy = instance(4, slowness=(1.0,), memory=(whole.memory_bytes[0],), workload=small, omega_budget=99.0)
    assert widths(planner.solve(roomy).plan) == {"d0": {3}}
    with pytest.raises(
        InfeasibleError, match=r"does not fit.*lacks .*; d0 cannot have 3 bits, as there are no costs of"
    ):
        planner.solve(without(roomy, d0=(3,)))
    with pytest.raises(
        InfeasibleError, match=r"no device can have embedding in .*; d0 cannot have 3 bits, as there are"
    ):
        planner.solve(without(instance(2, slowness=(1.0,), memory=(None,), fixed_bits=3), d0=(3,)))


def test_a_width_that_was_measured_in_another_form_asks_for_a_measurement() -> None:
    given = instance(2)
    with pytest.raises(NotMeasuredError, match="this shape was not measured"):
        planner.solve(given.constrained(group_size=64))
    table = given.profile.tables["d0"]
    op = next(row.op for row in table.rows if row.op.precision == Precision(4, 32))
    assert not table.lacks(op) and not table.lacks(replace(op, precision=Precision(4, 64)))
    assert not table.lacks(Op("linear", 1, 1, 1, precision=Precision(4, 32)))  # no width of this shape was measured


def test_all_that_can_be_chosen_is_finite() -> None:
    costs = Costs.of(without(instance(2), d0=(3, 16), d1=(4,)))
    assert costs.allowed is not None and (~costs.allowed).sum() == 4 * 3
    for steps in (*costs.prefill, *costs.decode):
        assert np.isfinite(steps.units).all()


@pytest.mark.parametrize("seconds", [0.0, 1e-12, 1e6])
def test_costs_at_the_ends_of_their_range_have_a_plan(seconds: float) -> None:
    given = instance(2, latency=0.0)
    tables = {
        name: replace(table, rows=tuple(replace(row, seconds=seconds) for row in table.rows))
        for name, table in given.profile.tables.items()
    }
    solved = planner.solve(replace(given, profile=replace(given.profile, tables=tables)))
    assert sum(len(stage.precisions) for stage in solved.plan.stages) == 2
