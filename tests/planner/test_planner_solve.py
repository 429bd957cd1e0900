"""The whole search: against brute force, against the baselines, and what it says where there is no plan."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from llmpq.spec import InfeasibleError, NotMeasuredError, Precision, Workload
from planner.cost_arrays import Costs
from planner.lengths import microbatch_sizes
from planner.solver.orders import Order, device_orders
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, model, random_instance


def _search_equals_brute_force(seed: int) -> bool:
    given = random_instance(np.random.default_rng(seed), max_layers=2, max_devices=2 + seed % 2)
    return equals_brute_force(given, f"seed {seed}")


@pytest.mark.parametrize("block", range(3))
def test_search_equals_brute_force(block: int) -> None:
    assert sum(_search_equals_brute_force(seed) for seed in range(10 * block, 10 * (block + 1))) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_search_equals_brute_force_on_hundreds_of_instances() -> None:
    assert sum(_search_equals_brute_force(seed) for seed in range(1000, 1500)) > 150


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_plan_is_never_worse_than_a_feasible_baseline(seed: int) -> None:
    given = random_instance(np.random.default_rng(seed))
    no_baseline_is_better(given.constrained(gap=0.2))  # stops early: baselines still hold


def test_baselines_are_even_uniform_and_single() -> None:
    baselines = planner.baseline_plans(instance(6))
    assert set(baselines) == {"uniform", "balanced", "adabits", "transfer", "single"}  # no caps to be proportional to
    assert [stage.layers for stage in baselines["uniform"].plan.stages] == [(0, 3), (3, 6)]
    assert len({baselines["uniform"].plan.precision(unit) for unit in model(6).units}) == 1
    assert [stage.device for stage in baselines["single"].plan.stages] == ["d0"]


def test_useless_device_is_dropped_unless_all_must_be_used() -> None:
    given = instance(4, slowness=(1.0, 200.0))
    assert [stage.device for stage in planner.solve(given).plan.stages] == ["d0"]
    plan = planner.solve(given.constrained(all_devices=True))
    assert {stage.device for stage in plan.plan.stages} == {"d0", "d1"}
    check(plan, given)


def test_faster_device_gets_more_layers() -> None:
    plan = planner.solve(instance(12, slowness=(1.5, 1.0), latency=0.0, step=0.0, gap=1e-4, all_devices=True))
    layers = {stage.device: stage.layers[1] - stage.layers[0] for stage in plan.plan.stages}
    assert layers["d1"] > layers["d0"] > 0


def test_tight_cap_moves_layers_away() -> None:
    def layers(given: Instance) -> tuple[int, int]:
        """Of d1, and the bytes it has."""
        plan = planner.solve(given)
        check(plan, given)
        (i,) = [i for i, stage in enumerate(plan.plan.stages) if stage.device == "d1"]
        return len(plan.plan.stages[i].widths), plan.prediction.memory_bytes[i]

    roomy = instance(8, slowness=(1.0, 1.0), fixed_bits=4, all_devices=True)
    many, size = layers(roomy)
    tight = instance(8, slowness=(1.0, 1.0), fixed_bits=4, all_devices=True, memory=(None, size * 9 // 10))
    assert 0 < layers(tight)[0] < many


def test_tied_table_is_counted_once_only_where_it_is_stored_once() -> None:
    given = instance(2, slowness=(1.0,), memory=(None,), fixed_bits=4)
    table = Precision(4, 32).weight_bytes(512, 64)
    (once,) = planner.solve(given).prediction.memory_bytes  # type: ignore[union-attr]
    untied = instance(spec=model(2, tied_embeddings=False), slowness=(1.0,), memory=(None,), fixed_bits=4)
    (twice,) = planner.solve(untied).prediction.memory_bytes  # type: ignore[union-attr]
    assert twice == once + table
    fits = instance(2, slowness=(1.0,), memory=(once,), fixed_bits=4)
    assert planner.solve(fits).plan.stages[0].layers == (0, 2)


def test_too_little_memory_names_what_each_device_lacks() -> None:
    given = instance(8, memory=(1 << 20, 1 << 20), workload=Workload(64, 256, 256))
    with pytest.raises(InfeasibleError) as caught:
        planner.solve(given)
    message = str(caught.value)
    assert "\n" not in message
    pattern = r"(d\d) lacks ([\d.]+) MiB \(1.00 MiB to plan with\)"
    lacks = {name: float(size) for name, size in re.findall(pattern, message)}
    assert set(lacks) == {"d0", "d1"}
    caps = tuple((1 << 20) + math.ceil(lacks.get(name, 0.0) * 2**20) for name in ("d0", "d1"))
    planner.solve(instance(8, memory=caps, workload=given.workload))  # what was lacking is enough


def test_running_out_of_time_is_not_called_infeasible() -> None:
    one = Workload(1, 16, 8)
    four = planner.solve(instance(4, slowness=(1.0,), memory=(None,), workload=one, fixed_bits=4)).prediction
    assert four is not None
    caps = (four.memory_bytes[0] - 1, 4096)
    given = instance(4, slowness=(1.0, 1.0), memory=caps, workload=one, omega_budget=16.0)
    assert not planner.baseline_plans(given)
    planner.solve(given)
    with pytest.raises(InfeasibleError, match="within 0 s; allow more time"):
        planner.solve(given.constrained(time_limit_s=0.0))


def test_unreachable_quality_budget_is_named() -> None:
    with pytest.raises(InfeasibleError, match="quality budget"):
        planner.solve(instance(2, bits=(3,)))


def test_more_devices_than_layers_is_named() -> None:
    given = instance(1, slowness=(1.0,) * 4, memory=(None,) * 4, all_devices=True)
    with pytest.raises(InfeasibleError, match="all 4 devices"):
        planner.solve(given)


def test_sizes_outside_the_measured_range_are_skipped() -> None:
    given = instance(2, workload=Workload(8, 16, 4), max_rows=32)
    plan = planner.solve(given)
    assert plan.plan.prefill_microbatch * 16 <= 32
    with pytest.raises(NotMeasuredError, match="llmpq profile"):
        planner.solve(instance(2, workload=Workload(8, 16, 4), max_rows=8))


def test_missing_device_or_link_is_named() -> None:
    given = instance(2)
    alone = instance(2, slowness=(1.0,), memory=(None,))
    with pytest.raises(NotMeasuredError, match="d1"):
        planner.solve(replace(given, profile=alone.profile))
    one_way = given.profile.links[:1]
    with pytest.raises(NotMeasuredError, match=r"d1.*d0"):
        planner.solve(replace(given, profile=replace(given.profile, links=one_way)))


@pytest.mark.parametrize("batch_size", range(1, 40))
def test_microbatch_sizes_cover_the_batch_without_waste(batch_size: int) -> None:
    sizes = microbatch_sizes(batch_size, 4)
    assert {size for size in range(1, batch_size + 1) if batch_size % size == 0} <= set(sizes)
    counts = [-(-batch_size // size) for size in sizes]
    assert len(set(counts)) == len(counts)
    assert all((size - 1) * count < batch_size for size, count in zip(sizes, counts))


def _orders(given: Instance) -> list[Order]:
    costs = Costs.of(given)
    return list(device_orders(costs.kinds, required=costs.required, max_stages=9))


def test_identical_devices_are_not_permuted() -> None:
    same = instance(4, slowness=(1.0, 1.0, 2.0), memory=(None,) * 3)
    orders = _orders(same)
    assert (1, 0) not in orders and (1, 2) not in orders
    assert {(0, 1, 2), (0, 2, 1), (2, 0, 1), (0, 2), (2, 0), (0,), (2,), (0, 1)} == set(orders)


def test_many_devices_keep_identical_ones_together() -> None:
    given = instance(8, slowness=(1.0, 1.0, 1.0, 2.0, 2.0, 2.0), memory=(None,) * 6)
    orders = _orders(given.constrained(all_devices=True))
    assert sorted(orders) == [(0, 1, 2, 3, 4, 5), (3, 4, 5, 0, 1, 2)]


def test_bound_stays_valid_when_time_runs_out() -> None:
    given = instance(4)
    best = planner.solve(given).solution
    hurried = planner.solve(given.constrained(time_limit_s=0.0)).solution
    assert best is not None and hurried is not None
    assert hurried.bound <= best.objective * (1 + 1e-9)
    assert hurried.objective >= best.objective * (1 - 1e-9)
    assert hurried.gap >= 0


def test_planning_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    planner.solve(instance(4))
    assert capfd.readouterr() == ("", "")
