"""A problem: what it takes, its quality budget, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
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
        with pytest.raises(UsageError, match="omega_budget: is "):
            planned(given, quality)
    with pytest.raises(UsageError, match="another model"):
        replace(given, sensitivity=replace(given.sensitivity, model_hash="1" * 16))
    with pytest.raises(InfeasibleError):
        planned(given, 0.0, bits=(3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: planner.Constraints(objective="speed"), "objective: is 'speed', expected one of 'time', 'cost'"),
        (lambda: planner.Constraints(theta=-1.0), "theta: is -1.0, expected 0 to 1e[+]09"),
        (lambda: planner.Constraints(theta=float("inf")), "theta: is inf"),
        (lambda: planner.Constraints(omega_budget=float("nan")), "omega_budget: is nan, expected 0 or more"),
        (lambda: planner.Constraints(max_tpot_s=-1.0), "max_tpot_s: is -1.0, expected 0 or more"),
        (lambda: planner.Constraints(prefill_microbatch=0), "prefill_microbatch: is 0, expected 1 to 1000000000"),
        (lambda: planner.Constraints(memory_reserve=1.5), "memory_reserve: is 1.5, expected 0 to 1"),
        (lambda: planner.Constraints(time_limit_s=-1.0), "time_limit_s: is -1.0"),
        (lambda: planner.Constraints(activations="a4"), "activations: is 'a4', expected one of 'a16', 'a8x2', 'a8'"),
        (lambda: planner.DeviceLimit({"d0": -1}, 1), r"weights\['d0'\]: is -1, expected 0 to"),
    ],
)
def test_constraints_outside_their_range_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        make()
