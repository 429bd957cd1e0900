"""A problem: what it takes, its quality budget, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import planner
from llmpq.spec import InfeasibleError, Solved, UsageError
from tests.support.planner_instances import Instance, instance


def planned(given: Instance, quality: float | None = None, **constraints: object) -> Solved:
    return planner.solve(given.constrained(omega_budget=quality, **constraints))


def test_a_problem_needs_no_constraints() -> None:
    given = instance()
    plan = planner.solve(planner.Problem(given.spec, given.cluster, given.workload, given.profile, given.sensitivity))
    assert plan.plan.num_layers == given.spec.num_layers and plan.plan.model_hash == given.spec.content_hash


def test_no_quality_is_four_bits_everywhere_and_infinity_is_no_budget() -> None:
    given = instance(memory=(None, None))
    four = sum(given.sensitivity.omega[unit]["w4-g32-sym-rtn"] for unit in given.spec.units)
    default, same, any_ = planned(given), planned(given, four), planned(given, math.inf)
    assert default.solution.omega_budget == pytest.approx(four)
    assert default.solution.omega <= four * (1 + 1e-9)
    assert same.plan.stages == default.plan.stages
    assert any_.solution.omega_budget is None
    assert any_.solution.objective <= default.solution.objective


def test_a_tighter_budget_is_kept_and_costs_time() -> None:
    given = instance(memory=(None, None))
    loose, tight = planned(given, 4.0), planned(given, 0.5)
    assert tight.solution.omega <= 0.5
    assert tight.solution.objective >= loose.solution.objective
    widest = planned(given, 0.0)
    assert {widest.plan.precision(unit).bits for unit in given.spec.units} == {16}


def test_constraints_are_kept_to() -> None:
    assert [stage.device for stage in planned(instance(), excluded=("d0",)).plan.stages] == ["d1"]


def test_what_cannot_be_is_refused() -> None:
    given = instance()
    for quality in (-1.0, math.nan):
        with pytest.raises(UsageError, match="quality budget"):
            planned(given, quality)
    with pytest.raises(UsageError, match="another model"):
        replace(given, sensitivity=replace(given.sensitivity, model_hash="1" * 16))
    with pytest.raises(InfeasibleError):
        planned(given, 0.0, bits=(3, 4))
