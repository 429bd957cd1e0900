"""Cost as the objective: what the devices in use cost for a million tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from llmpq.spec import UsageError, Workload
from planner.clock import NEVER
from planner.cost_arrays import Costs
from planner.solver.pool import Pool
from planner.solver.unordered_program import bound
from tests.support.planner_checks import equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, priced, random_instance


def _random(seed: int, **sizes: int) -> Instance:
    """Prices often nearly in proportion to speed, so that it is a close call which devices are worth theirs."""
    rng = np.random.default_rng(seed)
    plain = random_instance(rng, **sizes)
    count = len(plain.cluster.devices)
    if rng.random() < 0.3:
        return priced(plain, rng.choice([1.0, 2.0], count).tolist())
    speed = [1 / max(row.seconds for row in plain.profile.table(d.name).rows) for d in plain.cluster.devices]
    return priced(plain, (np.array(speed) / min(speed) * rng.uniform(0.8, 1.25, count)).tolist())


@pytest.mark.parametrize("block", range(4))
def test_search_for_the_least_cost_equals_brute_force(block: int) -> None:
    seeds = range(7000 + 10 * block, 7010 + 10 * block)
    feasible = [
        equals_brute_force(_random(seed, max_layers=2, max_devices=2 + seed % 2), f"seed {seed}") for seed in seeds
    ]
    assert sum(feasible) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_search_for_the_least_cost_equals_brute_force_on_hundreds_of_instances() -> None:
    seeds = range(8000, 8500)
    assert sum(equals_brute_force(_random(seed, max_layers=2, max_devices=3), f"seed {seed}") for seed in seeds) > 150


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_plan_never_costs_more_than_a_feasible_baseline(seed: int) -> None:
    no_baseline_is_better(_random(seed).constrained(gap=0.2))  # stops early: baselines still hold


def test_a_fast_device_that_costs_too_much_is_left_out() -> None:
    """Alone, d1 takes half as long; at three times the price it does not pay, at 1.2 times the price it does."""
    two = instance(4, slowness=(2.0, 1.0), latency=1.0, step=0.0)
    assert [stage.device for stage in planner.solve(priced(two, [1.0, 3.0])).plan.stages] == ["d0"]
    assert [stage.device for stage in planner.solve(priced(two, [1.0, 1.2])).plan.stages] == ["d1"]
    assert [stage.device for stage in planner.solve(two).plan.stages] == ["d1"]


def test_cost_is_price_times_time_for_a_million_tokens() -> None:
    one = priced(instance(4, slowness=(1.0,), memory=(None,), workload=Workload(4, 16, 8)), [7.2])
    plan = planner.solve(one)
    seconds = plan.prediction.prefill_s + plan.prediction.decode_s
    assert plan.solution.objective == pytest.approx(7.2 / 3600 * seconds * 1e6 / 32)
    assert plan.cost_per_million_tokens == pytest.approx(plan.solution.objective)


def test_in_another_currency_the_plan_is_the_same() -> None:
    given = _random(7003, max_layers=4, max_devices=3)
    prices = [device.price_per_hour for device in given.cluster.devices]
    plan, dear = planner.solve(given), planner.solve(priced(given, [1e6 * price for price in prices]))
    assert [stage.device for stage in plan.plan.stages] == [stage.device for stage in dear.plan.stages]
    assert dear.solution.objective == pytest.approx(1e6 * plan.solution.objective, rel=1e-6)


def test_devices_without_a_price_are_refused_by_name() -> None:
    message = "the objective is cost, but d1 has no price; give each device price=PER_HOUR, or exclude it"
    with pytest.raises(UsageError, match=message):
        planner.solve(priced(instance(2), [1.0, 0.0]))
    with pytest.raises(UsageError, match="d0, d1 have no price"):
        planner.solve(priced(instance(2), [0.0, 0.0]))
    planner.solve(priced(instance(2), [1.0, 0.0]).constrained(excluded=("d1",)))


def test_devices_of_unlike_prices_are_not_taken_for_identical() -> None:
    same = instance(4, slowness=(1.0, 1.0))
    assert Costs.of(same).kinds == {0: 0, 1: 0}
    assert Costs.of(priced(same, [2.0, 2.0])).kinds == {0: 0, 1: 0}
    assert Costs.of(priced(same, [2.0, 1.0])).kinds == {0: 0, 1: 1}
    assert [stage.device for stage in planner.solve(priced(same, [2.0, 1.0])).plan.stages] == ["d1"]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("objective", ["time", "cost"])
def test_the_bound_without_a_solver_is_below_that_with_one(seed: int, objective: str) -> None:
    given = _random(seed).constrained(objective=objective)
    costs = Costs.of(given)
    pools = [
        Pool(costs, prefill, decode, devices, alone=len(devices) == 1, all_used=objective == "cost")
        for devices in {tuple(range(len(given.cluster.devices))), (0,)}
        for prefill in costs.prefill
        for decode in costs.decode
    ]
    floors = [pool.floor() for pool in pools]
    assert min(floors) > 0
    assert all(floor <= bound(pool, NEVER) * (1 + 1e-9) for floor, pool in zip(floors, pools, strict=True))
