"""What is planned when a device is lost: the same widths if that is possible, else within the budget; or why not."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import planner
from llmpq import replanning
from llmpq.replanning import Replanner
from llmpq.spec import InfeasibleError, Plan, WorkerLostError, Workload
from llmpq.spec.sensitivity import KV_CACHE
from tests.support.planner_instances import Instance, instance, with_cache_8

ONE = {"prefill_microbatch": 1, "decode_microbatch": 1}  # so that memory depends on little else than weights
LOST = WorkerLostError("stage 1 on d1 was lost")


@pytest.fixture(autouse=True)
def nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replanning, "as_served", lambda model, plan: (model, plan))


def replanner(problem: Instance) -> Replanner:
    model: Any = SimpleNamespace(spec=problem.spec, checkpoint=None)
    return Replanner(model, problem)


def lose(problem: Instance, plan: Plan, device: str) -> Plan:
    return replanner(problem)(device, plan, LOST).plan


def widths(plan: Plan) -> list[object]:
    return [plan.precision(unit).width for unit in ("embedding", *(f"layer.{i}" for i in range(4)), "head")]


def test_widths_stay_while_there_is_room_for_them() -> None:
    problem = instance(omega_budget=4.0, all_devices=True, required=("d1",), slowness=(1.0, 1.0))
    plan = planner.solve(problem).plan
    assert len(plan.stages) == 2
    found = lose(problem, plan, "d1")
    assert [stage.device for stage in found.stages] == ["d0"]
    assert widths(found) == widths(plan) and len(set(widths(plan))) > 1
    assert (found.slots, found.max_length) == (plan.slots, plan.max_length)
    assert [device.name for device in found.cluster.devices] == ["d0"] and found.cluster.links == ()


def test_the_cache_keeps_its_width_too() -> None:
    """Where the other is faster on the device that is left, and better."""
    problem = with_cache_8(instance(omega_budget=4.0, all_devices=True, slowness=(1.0, 1.0)), (0.1, 3.0), 0.5)
    plan = planner.solve(problem.constrained(kv_bits=(8,))).plan
    either = problem.constrained(kv_bits=(16, 8))
    assert planner.solve(either.constrained(excluded=("d0",), all_devices=False)).plan.kv_bits == 16
    assert lose(either, plan, "d0").kv_bits == 8


def test_where_caches_differ_they_lose_no_more_than_they_did() -> None:
    """Each stage may then have either: 8 bits are faster here, but with them all layers lose more than some."""
    free = with_cache_8(instance(omega_budget=4.0, all_devices=True, slowness=(1.0, 1.0)), (0.1, 0.1), 0.5)
    solved = planner.solve(free.constrained(kv_bits=(8,)))
    narrow, last = solved.plan.stages
    plan = replace(solved.plan, stages=(narrow, replace(last, kv_bits=16)))
    either = free.constrained(kv_bits=(16, 8))
    share = len(last.precisions) / 4
    assert 0 < share < 1 and either.omega(plan) == pytest.approx(solved.solution.omega - 0.5 * share)
    found = lose(either, plan, "d0")
    assert widths(found) == widths(plan) and found.kv_bits == 16
    cheap = replace(either.sensitivity, omega=either.sensitivity.omega | {KV_CACHE: {"8": 0.0}})
    assert lose(replace(either, sensitivity=cheap), plan, "d0").kv_bits == 8


def alone(**changes: Any) -> int:
    """Bytes of a plan on one device."""
    return planner.solve(instance(slowness=(1.0,), memory=(None,), **ONE, **changes)).prediction.memory_bytes[0]


def pair(memory: int, **changes: Any) -> Instance:
    return instance(memory=(memory,) * 2, slowness=(1.0, 1.0), **ONE, **changes)


def test_other_widths_are_chosen_within_the_budget_where_there_is_no_room() -> None:
    room = (alone(fixed_bits=3) + alone(fixed_bits=8)) // 2
    wide = planner.solve(pair(room, fixed_bits=8)).plan
    assert len(wide.stages) == 2
    found = lose(pair(room, omega_budget=1000.0), wide, "d0")
    assert [stage.device for stage in found.stages] == ["d1"] and widths(found) != widths(wide)
    with pytest.raises(InfeasibleError, match=r"stage 1 on d1 was lost; without d0, ") as caught:
        lose(pair(room, omega_budget=0.01), wide, "d0")
    assert caught.value.exit_code == 3 and any("memory" in each for each in caught.value.relaxations)


def test_fewer_requests_run_at_once_where_there_is_no_room_for_all() -> None:
    many, fewer = Workload(8, 200, 100), Workload(4, 200, 100)
    room = int(alone(workload=fewer, fixed_bits=4) * 1.01)
    problem = pair(room, workload=many, fixed_bits=4)
    plan = planner.solve(pair(10 * room, workload=many, fixed_bits=4)).plan
    found = lose(problem, plan, "d1")
    assert found.slots == 4 and plan.slots == 8
    assert found.max_length == plan.max_length and widths(found) == widths(plan)


def test_the_loss_of_the_last_device_is_the_end() -> None:
    problem = instance(slowness=(1.0,), memory=(None,))
    with pytest.raises(WorkerLostError, match="stage 1 on d1 was lost"):
        lose(problem, planner.solve(problem).plan, "d0")


def test_a_device_that_is_back_is_planned_with_as_before() -> None:
    problem = instance(
        omega_budget=4.0, workload=Workload(16, 64, 8), all_devices=True, required=("d1",), slowness=(1.0, 1.0)
    )
    plan = planner.solve(problem).plan
    left = lose(problem, plan, "d1")
    found = replanner(problem).on_return({"d0", "d1"}, left, 1.05)
    assert found is not None and {stage.device for stage in found.plan.stages} == {"d0", "d1"}
    assert found.plan.cluster == plan.cluster and widths(found.plan) == widths(plan)
    assert (found.plan.slots, found.plan.max_length) == (plan.slots, plan.max_length)


def test_a_device_that_is_back_and_no_gain_is_left_out() -> None:
    problem = instance(slowness=(1.0, 30.0), memory=(None, None), fixed_bits=8)
    left = lose(problem, planner.solve(problem).plan, "d1")
    assert replanner(problem).on_return(("d0", "d1"), left, 1.05) is None
    found = replanner(problem).on_return(("d0", "d1"), left, 0.0)
    assert found is not None and [device.name for device in found.plan.cluster.devices] == ["d0", "d1"]


def test_with_a_device_that_is_back_as_many_requests_run_as_before() -> None:
    room = int(alone(workload=Workload(4, 200, 100), fixed_bits=4) * 1.1)
    problem = pair(room, workload=Workload(8, 200, 100), fixed_bits=4)
    left = lose(problem, planner.solve(problem).plan, "d1")
    found = replanner(problem).on_return(("d0", "d1"), left, 1.05)
    assert left.slots == 4 and found is not None and found.plan.slots == 8
