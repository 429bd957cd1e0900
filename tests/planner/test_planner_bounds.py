"""What bounds are bounds of, and what becomes of limits that are just missed and of solvers that fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mip
import numpy as np
import pytest

import planner
from llmpq.spec import InfeasibleError, Link, UsageError, Workload
from planner import DeviceLimit
from planner.clock import NEVER
from planner.cost_arrays import Configuration, Costs
from planner.objective import evaluate
from planner.solver import ilp, search, unordered_program
from planner.solver.orders import device_orders
from planner.solver.pool import Pool
from tests.support.planner_checks import equals_brute_force, least
from tests.support.planner_instances import (
    Instance,
    brute_force,
    instance,
    model,
    random_instance,
    random_program,
    tight,
    with_cache_8,
)


def _with_wishes(seed: int) -> Instance:
    """Twins, links that differ by direction or distance, pins and rules: what `random_instance` has none of."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 4))
    slowness = rng.choice([1.0, 1.0, 2.5], count).tolist()
    prompts = [(int(rng.integers(2, 40)), int(rng.integers(1, 20))) for _ in range(5)]
    workload = Workload.of_lengths(3, prompts) if rng.random() < 0.5 else Workload(5, 16, 8)
    given = instance(
        spec=model(2, tied_embeddings=bool(rng.integers(2))),
        slowness=tuple(slowness),
        memory=tuple(int(400_000 * (1 + slow)) for slow in slowness),
        workload=workload,
        omega_seed=seed,
        bits=(3, 8, 16),
        theta=float(rng.choice([0.0, 1e-3])),
    )
    names = [device.name for device in given.cluster.devices]
    pairs = list(itertools.permutations(names, 2))
    ends = {pair: frozenset(pair if rng.random() < 0.7 else pair[1:]) for pair in pairs}
    speed = {
        end: (float(rng.choice([1e-5, 1e-3])), float(rng.choice([1e7, 1e9])))
        for end in sorted(ends.values(), key=sorted)
    }
    links = tuple(Link(*pair, *speed[ends[pair]]) for pair in pairs)
    wishes: list[dict[str, Any]] = [
        {},
        {"pinned": {"layer.1": "d1"}, "unit_bits": {"embedding": 8}},
        {"at_most": (DeviceLimit({"d0": 1.0, "d1": 2.0}, 2.0),)},
        {"prefill_microbatch": 2, "required": ("d0",)},
    ]
    given = replace(given, profile=replace(given.profile, links=links))
    return given.constrained(**wishes[seed % len(wishes)])


def _pools(given: Instance) -> Iterator[tuple[Pool, float]]:
    """Every pool of the search, and the least objective in seconds of all plans it stands for, by brute force."""
    costs, limits = Costs.of(given), given.constraints
    names = [device.name for device in given.cluster.devices]
    must = {*limits.required, *limits.pinned.values()}
    orders = [
        order
        for length in range(1, len(names) + 1)
        for order in itertools.permutations(range(len(names)), length)
        if must <= {names[d] for d in order} and limits.together([names[d] for d in order])
    ]
    for prefill, decode in itertools.product(costs.prefill, costs.decode):
        worth = {order: brute_force(costs.program(Configuration(order, prefill, decode))) for order in orders}
        every = tuple(sorted(range(len(names)), key=lambda d: (costs.kinds[d], d)))
        several = min((value for order, value in worth.items() if len(order) > 1), default=math.inf)
        yield Pool(costs, prefill, decode, every, alone=False), several
        for order in worth:
            if len(order) == 1:
                yield Pool(costs, prefill, decode, order, alone=True), worth[order]


@pytest.mark.parametrize("seed", range(20))
def test_no_plan_of_a_pool_is_better_than_its_bounds(seed: int) -> None:
    given, rng = _with_wishes(seed), np.random.default_rng(seed)
    given = tight(given, rng) if seed % 16 < 8 else given
    if seed >= 16:
        ratios = rng.uniform(0.3, 1.7, len(given.cluster.devices)).tolist()
        given = with_cache_8(given, ratios, 0.5, kv_bits=(16, 8))
    for pool, best in _pools(given):
        exact = unordered_program.solve(pool, NEVER, gap=1e-9).bound
        for bound in (pool.floor(), unordered_program.bound(pool, NEVER), exact):
            assert bound <= best * (1 + 1e-6)
        if math.isfinite(best):
            short = unordered_program.shortage(pool, NEVER, relaxed=True)
            assert short is not None and short.worst <= 1e-6


@pytest.mark.slow
def test_search_with_constraints_equals_brute_force() -> None:
    assert sum(equals_brute_force(_with_wishes(seed), f"seed {seed}") for seed in range(20, 32)) >= 6


def test_a_budget_of_nothing_holds_for_sensitivities_below_the_solvers_tolerance() -> None:
    given = instance(1, slowness=(1.0,), memory=(None,), omega_budget=0.0)
    omega = {unit: {key: 1e-8 * value for key, value in of.items()} for unit, of in given.sensitivity.omega.items()}
    assert equals_brute_force(replace(given, sensitivity=replace(given.sensitivity, omega=omega)), "tiny")


@pytest.mark.parametrize("limit", ["max_ttft_s", "max_tpot_s"])
def test_a_limit_of_latency_that_the_best_plan_just_misses_is_kept(limit: str) -> None:
    """By less than solvers can tell: the best of the others is found all the same, and nothing is called impossible."""
    compared = 0
    for seed in (6, 12, 25, 66, 93, 123, 136):
        given = random_instance(np.random.default_rng(seed), max_layers=2, max_devices=2)
        try:
            best = planner.solve(given).prediction
        except InfeasibleError:
            continue
        assert best is not None
        rounds = given.workload.rounds
        found = best.prefill_s if limit == "max_ttft_s" else best.decode_s / rounds if rounds else math.inf
        missed = given.constrained(**{limit: found * (1 - 5e-9)})
        expected = least(missed)
        if math.isfinite(expected):
            solution = planner.solve(missed).solution
            assert solution is not None
            assert solution.objective == pytest.approx(expected, rel=1e-6), f"seed {seed}"
            compared += 1
    assert compared >= 3


def test_a_failing_solver_costs_the_bound_and_not_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    program = random_program(np.random.default_rng(3))
    original, calls = mip.Model.optimize, itertools.count()

    def failing_first(model: mip.Model, *arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 0:
            raise mip.InterfacingError("Unknown error in call to HiGHS.")
        return original(model, *arguments, **keywords)

    monkeypatch.setattr(mip.Model, "optimize", failing_first)
    best = brute_force(program)
    result = ilp.solve(program, NEVER, gap=0.0)
    assert result.assignment is not None
    assert evaluate(program, result.assignment).objective == pytest.approx(best, rel=1e-3)
    assert result.bound == -math.inf


def test_without_any_solver_the_best_baseline_is_the_plan_and_its_gap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = instance(3, slowness=(1.0, 1.4))
    best = planner.solve(given).solution

    def failing(model: mip.Model, *arguments: Any, **keywords: Any) -> Any:
        raise mip.InterfacingError("Unknown error in call to HiGHS.")

    monkeypatch.setattr(mip.Model, "optimize", failing)
    found = planner.solve(given).solution
    assert best is not None and found is not None
    assert found.objective == min(
        plan.solution.objective for plan in planner.baseline_plans(given).values() if plan.solution
    )
    assert 0 < found.bound <= best.objective


def test_a_device_without_a_price_that_is_excluded_does_not_hide_why_there_is_no_plan() -> None:
    """It is asked for again, without what the user asked for, to name the reason; then the device has no price."""
    given = instance(4, slowness=(1.0, 1.0), memory=(300_000,) * 2, fixed_bits=16, excluded=("d1",), objective="cost")
    priced = (replace(given.cluster.devices[0], price_per_hour=1.0), given.cluster.devices[1])
    with pytest.raises(InfeasibleError, match="d0 lacks"):
        planner.solve(replace(given, cluster=replace(given.cluster, devices=priced)))


@pytest.mark.slow
def test_a_search_that_gives_up_early_does_not_ask_for_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given = instance(6, slowness=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5), memory=(None,) * 6)
    monkeypatch.setattr(search, "realize", lambda *_, **__: ())
    monkeypatch.setattr(search, "best_baselines", lambda *_: {})
    with pytest.raises(InfeasibleError, match="not all orders of 6 devices were tried"):
        planner.solve(given)


def test_every_order_of_five_unlike_devices_is_searched() -> None:
    five = instance(8, slowness=(1.0, 1.1, 1.2, 1.3, 1.4), memory=(None,) * 5)
    orders = list(device_orders(Costs.of(five).kinds, required=(), max_stages=10))
    assert len(set(orders)) == len(orders) == sum(math.perm(5, length) for length in range(1, 6))


def test_a_group_is_not_taken_for_one_device() -> None:
    """Even if it costs the same: it holds buffers for each of its members."""
    given = instance(2, slowness=(1.0, 1.0))
    group = replace(given.cluster.devices[1], members=2)
    cluster = replace(given.cluster, devices=(given.cluster.devices[0], group))
    assert Costs.of(given).kinds == {0: 0, 1: 0}
    assert Costs.of(replace(given, cluster=cluster)).kinds == {0: 0, 1: 1}


def test_rules_that_leave_no_device_are_named() -> None:
    with pytest.raises(UsageError, match="all devices are excluded: d0, d1"):
        planner.solve(instance(2, excluded=("d0", "d1")))
    with pytest.raises(InfeasibleError, match="more than at_most allows"):
        planner.solve(instance(2, at_most=(DeviceLimit({"d0": 1.0, "d1": 1.0}, 0.5),)))


@pytest.mark.parametrize(
    ("wish", "given_up"),
    [
        ({"max_ttft_s": 1e-9}, "giving up the limits of latency"),
        ({"pinned": {"embedding": "d0", "layer.0": "d1", "head": "d0"}}, "giving up what units are pinned to"),
    ],
)
def test_giving_up_a_constraint_that_is_in_the_way_is_proposed(wish: dict[str, Any], given_up: str) -> None:
    """And nothing is proposed that was not needed beside it."""
    assert [relaxation.change for relaxation in planner.relaxations(instance(2, **wish))] == [given_up]


def test_more_memory_is_not_proposed_where_lower_quality_is_enough() -> None:
    changes = [relaxation.change for relaxation in planner.relaxations(instance(2, bits=(3,)))]
    assert changes and not [change for change in changes if "memory" in change]


def test_a_copy_of_a_device_has_the_weight_of_the_original() -> None:
    """Two of them may not be used together; a third one changes nothing about that."""
    rule = DeviceLimit({"d0": 1.0, "d1": 1.0}, 1.0)
    given = instance(4, slowness=(1.0, 1.0), memory=(300_000,) * 2, fixed_bits=16, at_most=(rule,))
    changes = [relaxation.change for relaxation in planner.relaxations(given)]
    assert changes and not [change for change in changes if " like " in change]


def test_equal_devices_that_are_not_equally_far_from_a_third_one_are_both_tried() -> None:
    given = instance(2, slowness=(1.0, 1.0, 2.0), memory=(None,) * 3, required=("d2",), pinned={"layer.0": "d2"})
    links = [replace(x, latency_s=1.0) if {x.source, x.target} == {"d0", "d2"} else x for x in given.profile.links]
    given = replace(given, profile=replace(given.profile, links=tuple(links)))
    assert Costs.of(given).kinds == {0: 0, 1: 1, 2: 2}
    assert equals_brute_force(given, "far")
