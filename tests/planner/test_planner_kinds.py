"""Layers of several kinds, in any order along the model: costs, bounds, baselines and the search by brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from llmpq.spec import LayerKind, Precision, Workload
from planner.baselines.adabits import Runs, least_sensitive
from planner.baselines.balanced import slowest_least_of_runs
from planner.baselines.ordered_costs import OrderedCosts, Sizes
from planner.clock import NEVER
from planner.cost_arrays import Configuration, Costs
from planner.objective import evaluate
from planner.solver.orders import device_orders
from planner.solver.pool import LayerCounts, Pool, run_limits
from planner.solver.realization import draft
from planner.solver.unordered_program import bound, solve
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import (
    Instance,
    assignments,
    brute_force,
    instance,
    model,
    random_instance,
    random_kinds,
    tight,
)

ATTENTION = 2e-8  # seconds of a query, a key and a hidden dimension: about what the linears of a layer take


def _instance(seed: int, kinds: int, *, max_layers: int = 3, max_devices: int = 2) -> Instance:
    return random_instance(np.random.default_rng(seed), max_layers=max_layers, max_devices=max_devices, kinds=kinds)


# ---- costs ----


def test_layers_differ_by_the_keys_and_the_cache_that_their_windows_allow() -> None:
    work = Workload.of_lengths(2, [(10, 5), (3, 9), (20, 2), (7, 1)])
    windows = (None, 4, 124, 100)
    spec = model(4, layer_kinds=tuple(map(LayerKind, windows)))
    costs = Costs.of(instance(spec=spec, slowness=(1.0, 2.0), workload=work, attention=ATTENTION))
    queries = list(zip(work.prompt_lens, work.output_lens))
    seen = {
        "prefill": [keys + 1 for prompt, _ in queries for keys in range(prompt)],
        "decode": [prompt + 1 + i for prompt, output in queries for i in range(output - 1)],
    }
    for name, phases in (("prefill", costs.prefill), ("decode", costs.decode)):
        for steps, (i, j), (d, slowness) in itertools.product(
            phases, itertools.combinations(range(4), 2), enumerate((1.0, 2.0))
        ):
            a, b = (sum(min(keys, windows[x] or keys) for keys in seen[name]) / len(seen[name]) for x in (i, j))
            differ = steps.units[1 + i, d] - steps.units[1 + j, d]
            assert differ == pytest.approx(slowness * 64 * ATTENTION * steps.tokens * (a - b), rel=1e-9, abs=1e-15)
    # Tokens of a slot: the longest sequence, or what the window and the longest prompt need, in blocks of 64.
    bytes_of_layer = costs.memory[1:-1] - costs.memory[1]
    assert not bytes_of_layer.any()
    costs = Costs.of(instance(spec=spec, workload=Workload(3, 10, 500)))
    cached = [512, 64, 192, 128]
    expected = [3 * 2 * 32 * 2 * (tokens - 512) for tokens in cached]  # slots, keys and values of 32 numbers in float16
    for layer in range(4):
        assert (costs.memory[1 + layer] - costs.memory[1] == expected[layer]).all()


@pytest.mark.parametrize("seed", range(6))
def test_predictions_of_equal_lengths_are_those_of_the_simulation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = model(6, layer_kinds=random_kinds(rng, 6, 3))
    given = instance(spec=spec, slowness=(1.0, 1.0), workload=Workload(4, 16, 8), attention=ATTENTION, gap=0.05)
    plan = planner.solve(given.constrained(prefill_microbatch=2, decode_microbatch=2))
    check(plan, given)
    found = planner.predict(plan.plan, spec, given.profile, [16] * 4, [8] * 4)
    assert found.prefill_s == pytest.approx(plan.prediction.prefill_s, rel=1e-9)
    assert found.decode_s == pytest.approx(plan.prediction.decode_s, rel=0.05)
    assert found.memory_bytes == plan.prediction.memory_bytes


# ---- search and bounds ----


@pytest.mark.parametrize("kinds", [2, 3])
@pytest.mark.parametrize("block", range(2))
def test_search_equals_brute_force(kinds: int, block: int) -> None:
    seeds = range(10 * block, 10 * (block + 1))
    assert sum(equals_brute_force(_instance(seed, kinds), f"seed {seed}") for seed in seeds) >= 3


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kinds", [2, 3])
def test_search_equals_brute_force_on_hundreds_of_instances(kinds: int) -> None:
    seeds = range(1000, 1200)
    feasible = [equals_brute_force(_instance(seed, kinds, max_devices=2 + seed % 2), f"seed {seed}") for seed in seeds]
    assert sum(feasible) > 60


def test_search_with_pins_and_limits_equals_brute_force() -> None:
    feasible = 0
    for seed in range(12):
        given = _instance(seed, 2 + seed % 2)
        names = [device.name for device in given.cluster.devices]
        wishes = (
            {"pinned": {"layer.1": names[-1]}, "unit_bits": {"embedding": given.constraints.bits[0]}},
            {"required": names[:1], "max_tpot_s": 2e-3},
        )
        feasible += equals_brute_force(given.constrained(**wishes[seed % 2]), f"seed {seed}")
    assert feasible >= 4


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_of_a_pool_is_better_than_its_bounds(seed: int) -> None:
    given = _instance(100 + seed, 2 + seed % 2, max_devices=3).constrained(all_devices=False)
    costs = Costs.of(given)
    devices = range(len(given.cluster.devices))
    orders = [order for length in range(1, len(devices) + 1) for order in itertools.permutations(devices, length)]
    for prefill, decode in itertools.product(costs.prefill[:2], costs.decode[-2:]):
        for alone in {True, len(devices) == 1}:
            pool = Pool(costs, prefill, decode, (0,) if alone else tuple(devices), alone=alone)
            suited = [order for order in orders if (order == (0,) if alone else len(order) > 1)]
            best = min(brute_force(costs.program(Configuration(order, prefill, decode))) for order in suited)
            for least in (pool.floor(), bound(pool, NEVER), solve(pool, NEVER, gap=1e-9).bound):
                assert least <= best * (1 + 1e-6)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_runs_of_layers_keep_to_their_limits_and_reach_them(drawn: list[int]) -> None:
    names = list(dict.fromkeys(drawn))
    groups = np.array([names.index(group) for group in drawn])
    for group, lines in enumerate(run_limits(groups)):
        runs = [(end - start, int((groups[start:end] == group).sum())) for start, end in _runs(len(groups))]
        for slope, most in lines:
            assert all(count <= slope * length + most + 1e-9 for length, count in runs)
            assert sum(count >= slope * length + most - 1e-9 for length, count in {(0, 0), *runs}) >= 2
    assert not any(run_limits(np.zeros(5, dtype=np.int64)))


def _runs(layers: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(layers + 1), 2))


def test_a_layer_of_every_other_kind_is_not_planned_all_on_one_device() -> None:
    """The bound of many devices knows that neighbours share a stage."""
    spec = model(8, layer_kinds=(LayerKind(), LayerKind(2)))
    costs = Costs.of(instance(spec=spec, slowness=(1.0, 1.0), attention=10 * ATTENTION))
    optimum = solve(Pool(costs, costs.prefill[0], costs.decode[0], (0, 1), alone=False), NEVER, gap=1e-9)
    assert optimum.outline is not None
    by_group = optimum.outline.counts.sum(axis=2)
    assert (abs(by_group[:, 0] - by_group[:, 1]) <= 1).all()


def test_a_draft_keeps_to_the_options_of_each_group_where_it_has_its_layers() -> None:
    omega = np.array([[0, 0], [5, 0], [9, 0], [1, 0], [2, 0], [0, 0]], dtype=float)
    groups = np.array([0, 1, 0, 1])
    counts = np.array([[[0, 1], [1, 0]], [[1, 0], [0, 1]]])  # on each device a layer of each group
    found = draft(LayerCounts(counts, 0, 1, 0, 1), (0, 1), groups, omega)
    assert found.positions.tolist() == [0, 0, 0, 1, 1, 1] and found.options.tolist() == [0, 1, 0, 0, 1, 1]
    other = np.array([[[0, 1], [0, 0]], [[1, 0], [1, 1]]])  # more of the second group than the device can have
    found = draft(LayerCounts(other, 0, 1, 0, 1), (0, 1), groups, omega)
    assert found.positions.tolist() == [0, 0, 1, 1, 1, 1] and sorted(found.options[2:5]) == [0, 0, 1]


# ---- baselines ----


@pytest.mark.parametrize("block", range(4))
def test_plan_is_at_least_as_good_as_every_feasible_baseline(block: int) -> None:
    kept = 0
    for seed in range(10 * block, 10 * (block + 1)):
        rng = np.random.default_rng(seed)
        given = random_instance(rng, max_layers=6, kinds=2 + seed % 2)
        given = tight(given, rng) if seed % 3 == 0 else given
        kept += len(no_baseline_is_better(given.constrained(gap=0.3)))
    assert kept >= 15


@pytest.mark.parametrize("seed", range(10))
def test_counted_layers_are_worth_what_the_objective_says(seed: int) -> None:
    """Windows cost the same in every option, so it does not matter which group has which options."""
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=6, kinds=3)
    costs = Costs.of(given)
    sizes = Sizes.of(costs)
    layers, options = given.spec.num_layers, len(costs.options)
    for order in device_orders(costs.kinds, required=(), max_stages=layers + 2):
        line = OrderedCosts.of(sizes, order)
        counts = rng.multinomial(layers, np.ones(len(order) * options) / (len(order) * options), size=10)
        first, last = rng.integers(options, size=(2, 10))
        pair = rng.integers(len(sizes.pairs), size=10)
        splits = line.splits(counts.reshape(10, len(order), options), first, last, pair)
        seconds, used = line.seconds(splits), line.used(splits)
        for s in range(10):
            assignment = line.assignment(splits, s)
            found = line.found(assignment, int(pair[s]))
            fixed = costs.program(found.choice).memory_fixed
            np.testing.assert_allclose(used[s] + fixed, found.value.memory, rtol=1e-12)
            exact = line.split_of(assignment, int(pair[s]))
            np.testing.assert_allclose(line.used(exact)[0], used[s], rtol=1e-12)
            if math.isfinite(seconds[s]):
                assert seconds[s] == pytest.approx(found.value.prefill_s + found.value.decode_s, rel=1e-12)
                assert line.seconds(exact)[0] == pytest.approx(seconds[s], rel=1e-12)


@pytest.mark.parametrize("block", range(2))
def test_adabits_has_the_least_summed_sensitivity_that_memory_allows(block: int) -> None:
    feasible = infeasible = 0
    for seed in range(10 * block, 10 * (block + 1)):
        rng = np.random.default_rng(seed)
        given = tight(random_instance(rng, max_layers=3, kinds=2 + seed % 2), rng)
        costs = Costs.of(given)
        sizes = Sizes.of(costs)
        for order in device_orders(costs.kinds, required=(), max_stages=given.spec.num_layers + 2):
            found = {pair: assignment for _, pair, assignment in least_sensitive([OrderedCosts.of(sizes, order)], [0])}
            program = replace(costs.program(Configuration(order, *sizes.pairs[0])), omega_budget=math.inf)
            values = (evaluate(program, assignment) for assignment in assignments(*program.shape))
            best = min((value.omega for value in values if value.feasible), default=math.inf)
            if math.isinf(best):
                infeasible += 1
                assert not found, f"seed {seed}"
                continue
            feasible += 1
            value = evaluate(program, found[0])
            assert value.feasible and value.omega == pytest.approx(best, rel=1e-7, abs=1e-9), f"seed {seed}"
    assert feasible >= 10 and infeasible >= 1


@pytest.mark.parametrize("seed", range(5))
def test_options_may_take_other_room_in_each_group(seed: int) -> None:
    """As experts will: what a width saves depends on the layer."""
    rng = np.random.default_rng(seed)
    omega = np.sort(rng.uniform(0, 1, (4, 2)))[:, ::-1]
    groups, sizes = rng.permutation([0, 0, 1, 1]), np.array([[30.0, 50.0], [60.0, 140.0]])
    rooms = [(float(size), (30.0, 60.0)) for size in rng.integers(30, 400, 30)]
    runs = Runs(omega, groups, sizes, rooms)
    for (room, (size, _)), (start, end) in itertools.product(enumerate(rooms), _runs(4)):
        fitting = [
            sum(omega[start + i, o] for i, o in enumerate(chosen))
            for chosen in itertools.product(range(2), repeat=end - start)
            if sum(sizes[groups[start + i], o] for i, o in enumerate(chosen)) <= size
        ]
        assert runs.omega[room, start, end] == pytest.approx(min(fitting, default=math.inf))
        if fitting:
            options = runs.options(room, start, end)
            assert sum(omega[start + i, o] for i, o in enumerate(options)) == pytest.approx(min(fitting))


@pytest.mark.parametrize("seed", range(30))
def test_the_slowest_position_is_as_fast_as_in_any_partition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions, layers = int(rng.integers(2, 5)), int(rng.integers(4, 8))
    base, layer = rng.uniform(0, 2, (3, positions)), rng.uniform(0, 2, (3, positions, layers))
    room, sizes = rng.uniform(1, layers, (3, positions)), rng.uniform(0.2, 1.5, (positions, layers))
    least = np.array([0, *[1] * (positions - 2), 0])
    counts, fits = slowest_least_of_runs(base, layer, room, sizes, least)
    for s in range(3):

        def slowest(cuts: tuple[int, ...], s: int = s) -> float:
            runs = list(enumerate(itertools.pairwise((0, *cuts, layers))))
            if any(b - a < least[p] or sizes[p, a:b].sum() > room[s, p] for p, (a, b) in runs):
                return math.inf
            return max(base[s, p] + layer[s, p, a:b].sum() for p, (a, b) in runs)

        every = itertools.combinations_with_replacement(range(layers + 1), positions - 1)
        best = min(map(slowest, every))
        assert fits[s] == math.isfinite(best)
        if fits[s]:
            assert slowest(tuple(counts[s].cumsum()[:-1].tolist())) == pytest.approx(best, rel=1e-8)


# ---- advice ----


def test_a_plan_of_several_kinds_is_explained_and_what_is_in_the_way_is_named() -> None:
    spec = model(4, layer_kinds=(LayerKind(4), LayerKind()))
    given = instance(spec=spec, workload=Workload(4, 16, 40), gap=0.05, time_limit_s=2.0)
    found = planner.explain(planner.solve(given), given)
    assert [unit.unit for unit in found.units] == list(spec.units)
    full = instance(spec=model(4), workload=Workload(4, 16, 400), fixed_bits=4, slowness=(1.0,), memory=(None,))
    needed = planner.solve(full).prediction
    assert needed is not None
    near = replace(full, spec=replace(spec, layer_kinds=(LayerKind(4),)))
    # Layers, slots, tokens beyond those that are kept; keys and values of 32 numbers each, in float16.
    saved = 4 * 4 * (448 - 64) * 2 * 32 * 2
    with_windows = planner.solve(near).prediction
    assert with_windows is not None
    assert needed.memory_bytes[0] - with_windows.memory_bytes[0] == saved
    assert Precision(4, 32) in full.constraints.precisions
