"""What other systems would do: each against its definition or a brute force, and the plan against all of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

import planner
from llmpq.spec import Plan
from planner.baselines.balanced import slowest_least
from planner.baselines.ordered_costs import OrderedCosts, Sizes
from planner.baselines.systems import best_baselines, even, proportional
from planner.cost_arrays import Configuration, Costs
from planner.objective import Assignment, FloatArray, Program, evaluate
from planner.solver.orders import Order
from tests.support.planner_checks import no_baseline_is_better, objective
from tests.support.planner_instances import Instance, instance, random_instance, tight

KINDS = {"uniform", "proportional", "balanced", "adabits", "transfer", "single"}
BLOCKS = 12  # of ten instances each


def _orders(costs: Costs) -> list[Order]:
    return list(costs.orders())


def _instance(seed: int, *, max_layers: int = 6) -> Instance:
    """Tight and loose memory; a budget, theta, minimum bits and limits of latency in some."""
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=max_layers)
    given = tight(given, rng) if rng.random() < 0.5 else given
    widths = given.constraints.bits
    return given.constrained(
        gap=0.3,  # the search stops early: baselines hold all the same
        min_bits=int(rng.choice(widths)) if rng.random() < 0.3 else 3,
        omega_budget=None if rng.random() < 0.5 else float(rng.uniform(0.3, 4.0)) * len(given.spec.units),
        max_ttft_s=math.inf if rng.random() < 0.7 else float(rng.uniform(0.001, 0.05)),
        max_tpot_s=math.inf if rng.random() < 0.7 else float(rng.uniform(0.0005, 0.005)),
    )


def _check_sizes(kind: str, plan: Plan, given: Instance) -> None:
    """One size for both phases; or, as LLM-PQ has it, decode in as many as devices, and prefill dividing that."""
    prefill, decode = plan.prefill_microbatch, plan.decode_microbatch
    a_device = -(-given.workload.batch_size // len(given.cluster.devices))
    llm_pq = kind in ("adabits", "transfer") and decode == a_device and decode % prefill == 0
    assert prefill == decode or llm_pq or kind in ("uniform", "proportional", "single")


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_plan_is_at_least_as_good_as_every_feasible_baseline(block: int, seen: Counter[str]) -> None:
    seen["blocks"] += 1
    for seed in range(10 * block, 10 * (block + 1)):
        given = _instance(seed)
        baselines = no_baseline_is_better(given)
        seen.update(baselines.keys())
        for kind, baseline in baselines.items():
            _check_sizes(kind, baseline.plan, given)
            seen[f"{kind} of two sizes"] += baseline.plan.prefill_microbatch != baseline.plan.decode_microbatch
        if "adabits" in baselines:
            assert objective(baselines["transfer"]) <= objective(baselines["adabits"]), f"seed {seed}"


def test_every_kind_of_baseline_was_compared(seen: Counter[str]) -> None:
    if seen["blocks"] < BLOCKS:
        pytest.skip("only part of the comparison was run")
    assert min(seen[kind] for kind in KINDS) >= 15, seen
    assert min(seen[f"{kind} of two sizes"] for kind in ("uniform", "single", "adabits", "transfer")) >= 1, seen


@pytest.mark.parametrize("seed", range(20))
def test_layer_counts_have_the_objective_of_their_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = _instance(seed)
    costs = Costs.of(given)
    sizes = Sizes.of(costs)
    layers, options = given.spec.num_layers, len(costs.options)
    for order in _orders(costs):
        line = OrderedCosts.of(sizes, order)
        counts = rng.multinomial(layers, np.ones(len(order) * options) / (len(order) * options), size=20)
        first, last = rng.integers(options, size=(2, 20))
        pair = rng.integers(len(sizes.pairs), size=20)
        splits = line.splits(counts.reshape(20, len(order), options), first, last, pair)
        seconds, used = line.seconds(splits), line.used(splits)
        for s in range(20):
            found = line.found(line.assignment(splits, s), int(pair[s]))
            held = np.array(found.value.memory)
            program = costs.program(found.choice)
            np.testing.assert_allclose(used[s] + program.memory_fixed, held, rtol=1e-12)
            round_s = found.value.decode_s / max(1, program.rounds)
            quick = found.value.prefill_s <= program.max_ttft_s and round_s <= program.max_tpot_s
            holds = quick and (held <= program.capacity).all()
            assert math.isinf(seconds[s]) == (not holds)
            if holds:
                assert seconds[s] == pytest.approx(found.value.prefill_s + found.value.decode_s, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_layer_counts_keep_pinned_units(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = instance(5, slowness=(1.0, 1.0, 1.0), memory=(None,) * 3, omega_budget=1e9)
    units = [str(unit) for unit in rng.choice(given.spec.units, 2, replace=False)]
    given = given.constrained(pinned={units[0]: f"d{rng.integers(3)}"}, unit_bits={units[1]: int(rng.choice([3, 4]))})
    costs = Costs.of(given)
    sizes = Sizes.of(costs)
    kept = []
    for order in _orders(costs):
        line = OrderedCosts.of(sizes, order)
        counts = np.array([c for c in _partitions(5, len(order)) if all(c[1:-1])])
        for width in range(len(costs.options)):
            option = np.full(len(counts), width)
            splits = line.uniform(counts, option, np.zeros_like(option))
            feasible = [line.found(line.assignment(splits, s), 0).value.feasible for s in range(len(counts))]
            assert line.allows(counts, option).tolist() == feasible
            kept += feasible
    assert any(kept) and not all(kept)


@pytest.mark.parametrize(("layers", "positions"), [(1, 1), (7, 2), (8, 3), (9, 3), (80, 8), (5, 5)])
def test_an_even_split_differs_by_one_layer_at_most(layers: int, positions: int) -> None:
    counts = even(layers, positions)
    assert counts.sum() == layers and len(counts) == positions and np.ptp(counts) <= 1


@pytest.mark.parametrize("seed", range(50))
def test_a_proportional_split_is_that_of_the_largest_remainders(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = int(rng.integers(1, 6))
    sizes = [int(size) for size in rng.integers(1, 1000, positions)]
    layers = int(rng.integers(positions, 40))
    counts = proportional(layers, np.array(sizes, dtype=float)).tolist()
    assert sum(counts) == layers and min(counts) >= 1
    share = [Fraction(layers * size, sum(sizes)) for size in sizes]
    left = layers - sum(map(math.floor, share))
    up = sorted(range(positions), key=lambda p: share[p] - math.floor(share[p]), reverse=True)[:left]
    quota = [math.floor(s) + (p in up) for p, s in enumerate(share)]
    if min(quota) >= 1:
        assert counts == quota
    else:  # those without a layer got one, from those with most
        assert all(c == max(q, 1) or (q > 1 and c < q) for c, q in zip(counts, quota))


def test_a_proportional_split_follows_memory_and_needs_caps() -> None:
    sizes = (3_000_000, 1_000_000)
    given = instance(8, slowness=(1.0, 1.0), memory=sizes, all_devices=True)
    plan = planner.baseline_plans(given)["proportional"]
    layers = {stage.device: stage.layers[1] - stage.layers[0] for stage in plan.plan.stages}
    assert layers == {"d0": 6, "d1": 2}
    uncapped = instance(8, slowness=(1.0, 1.0), memory=(sizes[0], None), all_devices=True)
    assert "proportional" not in planner.baseline_plans(uncapped)


def _partitions(layers: int, positions: int) -> list[tuple[int, ...]]:
    return [c for c in itertools.product(range(layers + 1), repeat=positions) if sum(c) == layers]


@pytest.mark.parametrize("seed", range(40))
def test_the_slowest_position_is_as_fast_as_in_any_partition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    splits, positions, layers = 5, int(rng.integers(1, 5)), int(rng.integers(4, 8))
    base, layer = rng.uniform(0, 2, (2, splits, positions))
    least = rng.integers(0, 2, positions)
    most = rng.integers(1, layers + 1, (splits, positions))
    counts = slowest_least(base, layer, least, most, layers)
    for s in range(splits):
        fitting = [
            np.array(c) for c in _partitions(layers, positions) if (least <= c).all() and (np.array(c) <= most[s]).all()
        ]
        if fitting:
            assert (least <= counts[s]).all() and (counts[s] <= most[s]).all() and counts[s].sum() == layers
            best = min((base[s] + c * layer[s]).max() for c in fitting)
            assert (base[s] + counts[s] * layer[s]).max() == pytest.approx(best)


def _one_width(counts: tuple[int, ...]) -> Assignment:
    positions = np.array([0, *np.repeat(np.arange(len(counts)), counts), len(counts) - 1])
    return Assignment(positions, np.zeros(len(positions), dtype=np.int64))


def _slowest_stage(phase_seconds: FloatArray, step: FloatArray, assignment: Assignment) -> float:
    stages = step.copy()
    np.add.at(stages, assignment.positions, phase_seconds[np.arange(len(phase_seconds)), assignment.positions, 0])
    return float(stages.max())


def _balanced(program: Program, layers: int) -> Iterator[list[tuple[float, float, float]]]:
    """For each phase the feasible partitions whose slowest stage is fastest: objective, its slowest stages in both."""
    positions = program.shape[1]
    partitions = [_one_width(c) for c in _partitions(layers, positions) if all(c[1:-1])]
    rows = [
        (
            value.objective,
            _slowest_stage(program.prefill, program.prefill_step, assignment),
            _slowest_stage(program.decode, program.decode_step, assignment),
        )
        for assignment in partitions
        if (value := evaluate(program, assignment)).feasible
    ]
    for phase in (1, 2) if rows else ():
        shortest = min(row[phase] for row in rows)
        yield [row for row in rows if row[phase] <= shortest * (1 + 1e-9)]


@pytest.mark.parametrize("block", range(4))
def test_a_balanced_baseline_is_the_best_of_the_most_balanced_partitions(block: int) -> None:
    found_some = 0
    for seed in range(10 * block, 10 * (block + 1)):
        given = random_instance(np.random.default_rng(seed), max_layers=5).constrained(fixed_bits=4)
        costs = Costs.of(given)
        found = best_baselines(costs).get("balanced")
        partitions = [
            rows
            for order in _orders(costs)
            if len(order) > 1
            for prefill, decode in itertools.product(costs.prefill, costs.decode)
            if prefill.size == decode.size
            for rows in _balanced(costs.program(Configuration(order, prefill, decode)), given.spec.num_layers)
        ]
        if found is None:
            assert not partitions, f"seed {seed}"
            continue
        found_some += 1
        assert found.value.objective <= min(max(rows)[0] for rows in partitions) * (1 + 1e-9), f"seed {seed}"
        assert any(
            objective == pytest.approx(found.value.objective, rel=1e-9) for rows in partitions for objective, *_ in rows
        ), f"seed {seed}"
    assert found_some >= 3


def test_baselines_that_break_a_pin_are_left_out() -> None:
    given = instance(6, slowness=(1.0, 2.0), memory=(3_000_000, 3_000_000))
    assert set(planner.baseline_plans(given)) == KINDS
    pinned = given.constrained(pinned={"layer.0": "d1", "layer.5": "d0"})
    for kind, plan in planner.baseline_plans(pinned).items():
        assert [stage.device for stage in plan.plan.stages] == ["d1", "d0"], kind
    assert "single" not in planner.baseline_plans(pinned)
    mixed = given.constrained(unit_bits={"layer.0": 4, "layer.1": 8})
    assert not set(planner.baseline_plans(mixed)) & {"uniform", "proportional", "balanced", "single"}


def test_more_devices_than_layers_leave_no_even_split() -> None:
    given = instance(2, slowness=(1.0,) * 3, memory=(3_000_000,) * 3, all_devices=True)
    assert not set(planner.baseline_plans(given)) & {"uniform", "proportional", "single"}
