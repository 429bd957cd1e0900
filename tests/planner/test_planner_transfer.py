"""Bits of the least summed sensitivity against a brute force, and what transfers of layers make of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import Workload
from planner.baselines.adabits import Runs, least_sensitive
from planner.baselines.ordered_costs import OrderedCosts, Sizes
from planner.baselines.transfer import transferred
from planner.cost_arrays import Configuration, Costs
from planner.objective import Assignment, IntArray, Program, evaluate
from planner.solver.orders import Order, device_orders
from tests.support.planner_instances import assignments, instance, model, random_instance, tight


def _least_omega(program: Program) -> float:
    """Of all assignments that memory allows; inf if there is none."""
    free = replace(program, omega_budget=math.inf, max_ttft_s=math.inf, max_tpot_s=math.inf)
    values = (evaluate(free, assignment) for assignment in assignments(*program.shape))
    return min((value.omega for value in values if value.feasible), default=math.inf)


@pytest.mark.parametrize("block", range(4))
def test_adabits_has_the_least_summed_sensitivity_that_memory_allows(block: int) -> None:
    feasible = quantized = infeasible = 0
    for seed in range(10 * block, 10 * (block + 1)):
        rng = np.random.default_rng(seed)
        given = tight(random_instance(rng, max_layers=3), rng)
        costs = Costs.of(given)
        sizes = Sizes.of(costs)
        pairs = [0, len(sizes.pairs) - 1]
        lines = [
            OrderedCosts.of(sizes, order)
            for order in device_orders(costs.kinds, required=(), max_stages=given.spec.num_layers + 2)
        ]
        for line in lines:
            found = {pair: assignment for _, pair, assignment in least_sensitive([line], pairs)}
            for pair in set(pairs):
                program = costs.program(Configuration(line.order, *sizes.pairs[pair]))
                best = _least_omega(program)
                if math.isinf(best):
                    infeasible += 1
                    assert pair not in found, f"seed {seed}"
                    continue
                feasible, quantized = feasible + 1, quantized + (best > 0)
                value = evaluate(replace(program, omega_budget=math.inf), found[pair])
                assert value.feasible and value.omega == pytest.approx(best, rel=1e-7, abs=1e-9), f"seed {seed}"
    assert feasible >= 10 and quantized >= 5 and infeasible >= 2


def test_adabits_splits_evenly_where_memory_does_not_matter() -> None:
    plan = planner.baseline_plans(instance(7, slowness=(1.0, 3.0), all_devices=True))["adabits"]
    assert sorted(stage.layers[1] - stage.layers[0] for stage in plan.plan.stages) == [3, 4]
    assert {plan.plan.precision(unit).bits for unit in model(7).units} == {16}


@pytest.mark.parametrize("seed", range(10))
def test_least_sensitive_bits_fit_where_sizes_share_no_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    omega = np.sort(rng.uniform(0, 1, (3, 3)))[:, ::-1]
    sizes = np.array([100_003.0, 133_337.0, 266_681.0])
    sums = {sizes[list(chosen)].sum() for n in (1, 2, 3) for chosen in itertools.product(range(3), repeat=n)}
    rooms = [
        (size - less, (float(sizes.min()),)) for size in sorted(sums) for less in (0, 1, int(rng.integers(2, 900)))
    ]
    runs = Runs(omega, np.zeros(3, dtype=np.int64), sizes[None], rooms)
    for room, (size, _) in enumerate(rooms):
        for start, end in itertools.combinations(range(4), 2):
            fitting = {
                chosen: sum(omega[start + i, o] for i, o in enumerate(chosen))
                for chosen in itertools.product(range(3), repeat=end - start)
                if sizes[list(chosen)].sum() <= size
            }
            if math.isinf(runs.omega[room, start, end]):
                assert not fitting or size - min(sizes[list(chosen)].sum() for chosen in fitting) < 2000
                continue
            assert fitting[tuple(runs.options(room, start, end))] == pytest.approx(runs.omega[room, start, end])
            assert min(fitting.values()) <= runs.omega[room, start, end] + 1e-12


def _starts(seed: int, order: Order) -> Iterator[tuple[OrderedCosts, Assignment]]:
    """What adabits has for devices in this order, d1 being slow, and no room for 16 bits everywhere."""
    rng = np.random.default_rng(seed)
    slowness, work = (1.0, 4.0, 1.5)[: len(order)], Workload(2, 4, 2)

    def given(memory: tuple[int | None, ...]) -> Costs:
        limits = {"workload": work, "omega_seed": seed, "omega_budget": 1e9}
        return Costs.of(instance(10, slowness=slowness, memory=memory, **limits))

    free = given((None,) * len(order))
    program = free.program(Configuration(order, free.prefill[0], free.decode[0]))
    room = program.memory[:, 0].max(axis=1).sum() * rng.uniform(0.4, 1.6, len(order)) / len(order)
    caps = {d: int(size) for d, size in zip(order, program.memory_fixed + room)}
    tight_line = OrderedCosts.of(Sizes.of(given(tuple(caps[d] for d in sorted(caps)))), order)
    for line, _, assignment in least_sensitive([tight_line], [0]):
        yield line, assignment


def _counts(line: OrderedCosts, assignment: Assignment) -> IntArray:
    """Layers [positions, options]."""
    return line.split_of(assignment, 0).by_option[0]


@pytest.mark.parametrize("order", [(1, 0), (0, 1), (0, 1, 2)])
def test_transfers_relieve_the_slow_device_and_keep_the_number_of_layers_of_each_width(order: Order) -> None:
    gained = swapped = 0
    for line, start in (found for seed in range(40) for found in _starts(seed, order)):
        end = transferred(line, 0, start)
        before, after = line.found(start, 0).value, line.found(end, 0).value
        assert after.feasible and after.objective <= before.objective
        first, later = _counts(line, start), _counts(line, end)
        assert first.sum(axis=0).tolist() == later.sum(axis=0).tolist()
        assert later[1:-1].sum(axis=1).all(), "a stage in the middle is empty"
        gained += after.objective < before.objective
        swapped += bool((later > first)[order.index(1)].any())
    assert gained >= 5 and swapped >= 1


def test_transfers_leave_a_layer_to_a_slow_stage_in_the_middle() -> None:
    given = instance(6, slowness=(1.0, 50.0, 1.0), memory=(None,) * 3, fixed_bits=4)
    line = OrderedCosts.of(Sizes.of(Costs.of(given)), (0, 1, 2))
    ((_, _, start),) = least_sensitive([line], [0])
    assert _counts(line, start).sum(axis=1).tolist() == [2, 2, 2]
    assert _counts(line, transferred(line, 0, start)).sum(axis=1)[1] == 1


def test_transfers_move_layers_off_a_slow_device_while_that_helps() -> None:
    given = instance(12, slowness=(1.0, 6.0), all_devices=True, fixed_bits=8)
    plan = planner.baseline_plans(given)["transfer"]
    layers = {stage.device: stage.layers[1] - stage.layers[0] for stage in plan.plan.stages}
    assert layers["d1"] <= 2 < 10 <= layers["d0"]


def test_transfers_keep_to_the_quality_budget() -> None:
    kept = 0
    for line, start in (found for seed in range(80) for found in _starts(seed, (1, 0))):
        least, free = (line.found(a, 0).value.omega for a in (start, transferred(line, 0, start)))
        if free <= least * (1 + 1e-6):
            continue
        sizes = replace(line.sizes, costs=replace(line.costs, omega_budget=(least + free) / 2))
        found = OrderedCosts.of(sizes, line.order)
        assert found.found(transferred(found, 0, start), 0).value.omega <= (least + free) / 2
        kept += 1
    assert kept >= 3
