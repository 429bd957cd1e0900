"""Stages that are groups of equal devices: against hand computations and brute force over their members."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

import planner
from llmpq.spec import Context, InfeasibleError, Link, Op, Precision, Solved, UsageError, Workload, unit_ops
from planner import memory
from planner.constraints import DeviceLimit
from planner.cost_arrays import Costs
from planner.device_groups import Ring, with_groups
from planner.solver.orders import device_kinds
from tests.support.planner_checks import objective
from tests.support.planner_groups import SPEC, STEP, equal_devices, lines, part_costs, program_of, random_devices
from tests.support.planner_instances import brute_force, model


def test_a_part_holds_its_share_of_the_matrices_and_all_of_the_norms() -> None:
    spec, part = model(2, num_kv_heads=4), model(2, num_kv_heads=4).part(4)
    assert [(x.n, x.k) for x in part.linears("layer.0").values()] == [(48, 64), (64, 16), (64, 64), (64, 32)]
    assert (part.table.n, part.table.k, part.kv_dim) == (128, 64, 16)
    exact, norms = Precision(16), 2 * 64 * 4
    assert 4 * (part.unit_bytes("layer.0", exact) - norms) == spec.unit_bytes("layer.0", exact) - norms
    assert 4 * part.kv_bytes(10, "float32") == spec.kv_bytes(10, "float32")
    with pytest.raises(UsageError, match="tiny cannot be split into 3 parts, as its num_heads is 4"):
        spec.part(3)


def test_seconds_of_a_ring_equal_those_computed_by_hand() -> None:
    ring = Ring(4, Link("a", "b", 1e-5, 1e9))
    # 2 * 3/4 * 8 MB at 1 GB/s, and 6 messages
    assert ring.all_reduce(8e6) == pytest.approx(0.012 + 6e-5, rel=1e-12)
    # two all-reduces of 5 rows of 64 values of 4 bytes
    assert ring.seconds(Op("layer_rest", 5, 64, 128), 4) == pytest.approx(2 * (1.5 * 1280e-9 + 6e-5), rel=1e-12)
    assert ring.seconds(Op("embedding", 5, 512, 64), 4) == pytest.approx(1.5 * 1280e-9 + 6e-5, rel=1e-12)
    # each of 4 members gets 5 rows of 8 bytes from the 3 others
    assert ring.seconds(Op("head_rest", 5, 512), 4) == pytest.approx(3 * 5 * 8e-9 + 3e-5, rel=1e-12)
    assert ring.seconds(Op("linear", 5, 64, 64), 4) == 0


def test_groups_are_counted_out_of_the_devices_there_are() -> None:
    given = equal_devices(5, others=(2.0,)).constrained(
        at_most=(DeviceLimit({"d0": 1, "d1": 1, "d2": 1, "d3": 1, "d4": 1}, 4),)
    )
    grouped = with_groups(given, (2, 4), part_costs(given))
    names = [device.name for device in grouped.cluster.devices]
    assert names == ["d0", "d1", "d2", "d3", "d4", "d5", "d0 x2", "d2 x2", "d0 x4"]
    assert [device.members for device in grouped.cluster.devices] == [1, 1, 1, 1, 1, 1, 2, 2, 4]
    kept, counted = grouped.constraints.at_most
    weights = {"d0": 1, "d1": 1, "d2": 1, "d3": 1, "d4": 1, "d0 x2": 2, "d2 x2": 2, "d0 x4": 4}
    assert counted == DeviceLimit(weights, 5)
    assert kept == DeviceLimit({**weights, "d5": 0}, 4)
    kinds = device_kinds(grouped.cluster, grouped.profile, grouped.constraints)
    assert kinds == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 5, 6: 6, 7: 6, 8: 8}


def test_groups_stay_on_one_host_and_leave_out_constrained_devices() -> None:
    given = equal_devices(4, memory=(None,) * 4)
    apart = tuple(replace(d, host=f"host{i // 2}") for i, d in enumerate(given.cluster.devices))
    apart_given = replace(given, cluster=replace(given.cluster, devices=apart))
    grouped = with_groups(apart_given, (2, 4), part_costs(given))
    assert [device.name for device in grouped.cluster.devices[4:]] == ["d0 x2", "d2 x2"]
    assert [rule.limit for rule in grouped.constraints.at_most] == [2, 2]
    asked = given.constrained(required=("d1",))
    assert [d.name for d in with_groups(asked, (2,), part_costs(given)).cluster.devices[4:]] == ["d0 x2"]


@pytest.mark.parametrize("degrees", [(1,), (0, 2)])
def test_degrees_that_make_no_group_are_refused(degrees: tuple[int, ...]) -> None:
    given = equal_devices(2)
    with pytest.raises(UsageError, match="give degrees from 2 on"):
        with_groups(given, degrees, part_costs(given))
    grouped = with_groups(given, (2,), part_costs(given))
    with pytest.raises(UsageError, match="and single devices"):
        with_groups(grouped, (2,), part_costs(given))


def test_a_group_takes_its_parts_seconds_and_its_exchanges() -> None:
    given = equal_devices(4, latency=1e-5, bytes_per_s=1e9)
    table = with_groups(given, (2,), part_costs(given)).profile.table("d2 x2")
    precision, mode = Precision(4, 32), given.constraints.activations

    def seconds(unit: str) -> float:
        return sum(table.seconds(op) for op in unit_ops(SPEC, unit, precision, mode, 10, 2, Context.of(7)))

    def part_linear(n: int, k: int, m: int) -> float:
        return n * k * (0.25 + 0.05 * m) * 1e-9

    # Half of 2 * 4 heads of keys and 4 of queries of 16 each, of 64 values, of up and gate, of down.
    linears = sum(part_linear(n, k, 10) for n, k in ((96, 64), (64, 32), (128, 64), (64, 64)))
    attention, rest = 10 * 7 * 64 * 2e-10, 1e-6 + 10 * 64e-9  # the tables here have no width for these two
    all_reduce = 10 * 64 * 4 / 1e9 + 2e-5
    assert seconds("layer.0") == pytest.approx(linears + attention + rest + 2 * all_reduce, rel=1e-9)
    assert seconds("embedding") == pytest.approx(10 * 64e-9 + all_reduce, rel=1e-9)
    best = 2 * 8 / 1e9 + 1e-5
    assert seconds("head") == pytest.approx(part_linear(128, 64, 2) + 2 * 128e-9 + best, rel=1e-9)
    assert table.seconds(Op("step")) == STEP


def test_linears_of_one_shape_take_the_sum_of_their_parts() -> None:
    spec = model(2, num_kv_heads=4, intermediate_size=64, gated_mlp=False)  # out, up and down are 64 x 64
    given = equal_devices(2, spec=spec, latency=0.0, bytes_per_s=1e29)
    table = with_groups(given, (2,), part_costs(given)).profile.table("d0 x2")
    precision, mode = Precision(4, 32), given.constraints.activations
    linears = [op for op in unit_ops(spec, "layer.0", precision, mode, 10, 2, Context.of(7)) if op.kind == "linear"]
    parts = [(96, 64), (64, 32), (32, 64), (64, 32)]
    expected = sum(n * k * (0.25 + 0.05 * 10) * 1e-9 for n, k in parts)
    assert sum(map(table.seconds, linears)) == pytest.approx(expected, rel=1e-9)


def test_hidden_states_reach_all_members_of_a_group() -> None:
    given = equal_devices(4, others=(2.0,), latency=1e-5, bytes_per_s=1e9)
    profile = with_groups(given, (2, 4), part_costs(given)).profile
    for source, target, members in (("d4", "d0 x4", 4), ("d0", "d0 x4", 4), ("d0 x2", "d2 x2", 2), ("d0 x2", "d0", 1)):
        expected = 1e-5 + 8e-3 + (members - 1) * (8e-3 / members + 1e-5)
        assert profile.link(source, target).seconds(8_000_000) == pytest.approx(expected, rel=1e-9)


def _stages_by_brute_force(seed: int) -> list[int]:
    """How many devices each stage of the best plan has, after comparing it; none if there is no plan."""
    given, count, slow = random_devices(seed)
    degrees = tuple(k for k in (2, 4)[: 1 + seed % 2] if k <= count)
    grouped = with_groups(given, degrees, part_costs(given))
    costs = Costs.of(grouped)
    best = min(
        brute_force(program_of(costs, given, line, slow or 1.0, sizes))
        for line in lines(count, int(slow is not None), degrees)
        if len(line) <= len(given.spec.units)
        for sizes in itertools.product(costs.prefill, costs.decode)
    )
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            planner.solve(grouped)
        return []
    plan = planner.solve(grouped)
    assert objective(plan) == pytest.approx(best, rel=1e-6), f"seed {seed}"
    used = [plan.plan.cluster.device(stage.device) for stage in plan.plan.stages]
    assert sum(device.members for device in used if device.host == "localhost") <= count
    assert plan.prediction.memory_bytes == memory.stage_bytes(plan.plan, given.spec, grouped.profile)
    assert Solved.from_dict(plan.to_dict()) == plan
    return [device.members for device in used]


@pytest.mark.slow
def test_search_with_groups_equals_brute_force_over_members() -> None:
    found = [_stages_by_brute_force(seed) for seed in (*range(20), 32)]
    assert sum(max(stages, default=1) > 1 for stages in found) >= 8
    assert sum(stages == [2, 2] for stages in found) >= 2


@pytest.mark.parametrize("seed", range(100, 110))
def test_a_problem_with_groups_is_never_worse(seed: int) -> None:
    given, count, _ = random_devices(seed)
    grouped = with_groups(given, [k for k in (2, 4) if k <= count], part_costs(given))
    without, with_them = [
        {kind: objective(plan) for kind, plan in planner.baseline_plans(of).items()} for of in (given, grouped)
    ]
    for kind in ("single", "balanced"):  # the others use as many devices as there are
        assert with_them.get(kind, math.inf) <= without.get(kind, math.inf) * (1 + 1e-9)
    try:
        alone = objective(planner.solve(given))
    except InfeasibleError:
        return
    assert objective(planner.solve(grouped)) <= alone * (1 + 1e-6)


def test_groups_pay_where_one_sequence_waits_for_its_tokens_on_fast_links_alone() -> None:
    one = Workload(1, 16, 64)
    for bytes_per_s, latency, members in ((1e12, 1e-9, [4]), (1e5, 1e-2, [1])):
        given = equal_devices(4, workload=one, bytes_per_s=bytes_per_s, latency=latency)
        plan = planner.solve(with_groups(given, (2, 4), part_costs(given)))
        assert [plan.plan.cluster.device(stage.device).members for stage in plan.plan.stages] == members


def test_the_runtime_refuses_a_plan_with_groups() -> None:
    given = equal_devices(2, workload=Workload(1, 16, 64), bytes_per_s=1e12, latency=1e-9)
    plan = planner.solve(with_groups(given, (2,), part_costs(given)))
    assert [stage.device for stage in plan.plan.stages] == ["d0 x2"]
    with pytest.raises(UsageError, match="d0 x2 stands for 2 devices that share a stage, which can be planned for"):
        plan.plan.check_model(given.spec)
    planner.solve(given).plan.check_model(given.spec)
