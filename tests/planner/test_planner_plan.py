"""`planner.plan`: the planner as one function, of what the issue of its name lists."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest

import planner
from llmpq.spec import InfeasibleError, Plan, UsageError
from tests.support.planner_instances import Instance, instance


def planned(given: Instance, quality: float | None = None, **constraints: object) -> Plan:
    limits = planner.Constraints(group_size=32, gap=1e-9, **constraints)  # type: ignore[arg-type]
    known = given.profile, given.sensitivity
    return planner.plan(given.spec, given.cluster, given.workload, *known, quality, limits)


def test_it_takes_what_there_is_and_a_quality_budget() -> None:
    names = list(inspect.signature(planner.plan).parameters)
    assert names == ["model", "cluster", "workload", "costs", "sensitivity", "quality", "constraints"]
    given = instance()
    plan = planner.plan(given.spec, given.cluster, given.workload, given.profile, given.sensitivity)
    assert plan.num_layers == given.spec.num_layers and plan.model_hash == given.spec.content_hash


def test_no_quality_is_four_bits_everywhere_and_infinity_is_no_budget() -> None:
    given = instance(memory=(None, None))
    four = sum(given.sensitivity.omega[unit]["w4-g32-sym-rtn-a16"] for unit in given.spec.units)
    default, same, any_ = planned(given), planned(given, four), planned(given, math.inf)
    assert default.solution is not None and same.solution is not None and any_.solution is not None
    assert default.solution.omega_budget == pytest.approx(four)
    assert default.solution.omega <= four * (1 + 1e-9)
    assert same.stages == default.stages
    assert any_.solution.omega_budget is None
    assert any_.solution.objective <= default.solution.objective


def test_a_tighter_budget_is_kept_and_costs_time() -> None:
    given = instance(memory=(None, None))
    loose, tight = planned(given, 4.0), planned(given, 0.5)
    assert loose.solution is not None and tight.solution is not None
    assert tight.solution.omega <= 0.5
    assert tight.solution.objective >= loose.solution.objective
    widest = planned(given, 0.0)
    assert {widest.precision(unit).bits for unit in given.spec.units} == {16}


def test_constraints_are_kept_to() -> None:
    assert [stage.device for stage in planned(instance(), excluded=("d0",)).stages] == ["d1"]


def test_what_cannot_be_is_refused() -> None:
    given = instance()
    for quality in (-1.0, math.nan):
        with pytest.raises(UsageError, match="quality budget"):
            planned(given, quality)
    with pytest.raises(UsageError, match="twice"):
        planned(given, 1.0, omega_budget=2.0)
    other = replace(given, sensitivity=replace(given.sensitivity, model_hash="1" * 16))
    with pytest.raises(UsageError, match="another model"):
        planned(other)
    with pytest.raises(InfeasibleError):
        planned(given, 0.0, bits=(3, 4))
