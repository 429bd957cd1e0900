"""The whole search: against brute force, against the baselines, and whether it keeps to what it was told."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_instances import Instance, brute_force, instance, model, random_instance

import planner
from llmpq.spec import W16, InfeasibleError, NotMeasuredError, Plan, Precision, UsageError, Workload
from planner import memory
from planner.costs import Choice, Costs, microbatch_sizes
from planner.orders import Order, device_orders


def _least(given: Instance) -> float:
    """The best objective over every device subset and order, both sizes, and all assignments."""
    costs, limits = Costs.of(given), given.constraints
    names = [device.name for device in given.cluster.devices]
    usable = [d for d, name in enumerate(names) if name not in limits.excluded]
    return min(
        (
            brute_force(costs.program(Choice(order, prefill, decode)))
            for length in range(1, min(len(usable), len(given.spec.units)) + 1)
            for order in itertools.permutations(usable, length)
            if set(limits.required) <= {names[d] for d in order}
            if not limits.all_devices or length == len(names)
            for prefill in costs.prefill
            for decode in costs.decode
        ),
        default=math.inf,
    )


def _omega(plan: Plan, given: Instance) -> float:
    return sum(given.sensitivity.of(unit, plan.precision(unit)) for unit in given.spec.units)


def _check(plan: Plan, given: Instance) -> None:
    """All that is promised of any plan."""
    assert plan.predicted is not None and plan.solution is not None
    assert plan.num_layers == given.spec.num_layers
    assert all(a < b for a, b in (stage.layers for stage in plan.stages[1:-1])), "a stage in the middle is empty"
    used = memory.stage_bytes(plan, given.spec, given.profile)
    assert plan.predicted.memory_bytes == used
    for stage, size in zip(plan.stages, used, strict=True):
        cap = given.cluster.device(stage.device).memory_bytes
        assert cap is None or size <= cap
    assert plan.solution.omega == pytest.approx(_omega(plan, given))
    if plan.solution.omega_budget is not None:
        assert plan.solution.omega <= plan.solution.omega_budget * (1 + 1e-9)
    assert plan.solution.bound <= plan.solution.objective
    assert {plan.precision(unit).stored for unit in given.spec.units} <= set(given.constraints.options)
    _check_constraints(plan, given)
    seconds = plan.predicted.prefill_s + plan.predicted.decode_s
    assert plan.solution.objective == pytest.approx(seconds + given.constraints.theta * plan.solution.omega)
    assert Plan.from_dict(plan.to_dict()) == plan


def _check_constraints(plan: Plan, given: Instance) -> None:
    limits, used = given.constraints, {stage.device for stage in plan.stages}
    assert set(limits.required) <= used and not set(limits.excluded) & used
    for unit, device in limits.pinned.items():
        stages = {"embedding": plan.stages[0], "head": plan.stages[-1]}
        holder = stages.get(unit) or next(s for s in plan.stages if int(unit.split(".")[1]) in range(*s.layers))
        assert holder.device == device
    for unit, bits in limits.unit_bits.items():
        assert plan.precision(unit).bits == bits
    assert plan.predicted is not None
    assert plan.predicted.prefill_s <= limits.max_ttft_s * (1 + 1e-9)
    rounds = max(1, given.workload.output_len - 1)
    assert plan.predicted.decode_s / rounds <= limits.max_tpot_s * (1 + 1e-9)


def _constrained(given: Instance, rng: np.random.Generator) -> Instance:
    """With pinned units, widths, devices and latencies: some of each, often in each other's way."""
    names, units = [device.name for device in given.cluster.devices], given.spec.units
    changes: dict[str, Any] = {}
    if rng.random() < 0.5:
        changes["pinned"] = {str(rng.choice(units)): str(rng.choice(names))}
    if rng.random() < 0.5:
        changes["unit_bits"] = {str(rng.choice(units)): int(rng.choice(given.constraints.bits))}
    free = [name for name in names if name not in changes.get("pinned", {}).values()]
    if len(free) > 1 and rng.random() < 0.3 and not given.constraints.all_devices:
        changes["excluded"] = (free[0],)
    elif free and rng.random() < 0.5:
        changes["required"] = (free[-1],)
    usual = planner.baselines(given.constrained(omega_budget=1e9)).values()
    times = [(plan.predicted.prefill_s, plan.predicted.decode_s) for plan in usual if plan.predicted]
    if times and rng.random() < 0.7:
        prefill_s, decode_s = times[0]
        changes["max_ttft_s"] = prefill_s * float(rng.uniform(0.6, 1.5))
        changes["max_tpot_s"] = decode_s / max(1, given.workload.output_len - 1) * float(rng.uniform(0.6, 1.5))
    bits = [b for b in given.constraints.bits if b >= given.constraints.min_bits]
    changes["unit_bits"] = {unit: b for unit, b in changes.get("unit_bits", {}).items() if b in bits}
    return given.constrained(**changes)


def _search_equals_brute_force(seed: int, *, constrained: bool = False) -> bool:
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=2, max_devices=2 + seed % 2)
    if constrained:
        given = _constrained(given, rng)
    best = _least(given)
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            planner.solve(given)
        return False
    plan = planner.solve(given)
    _check(plan, given)
    assert plan.solution is not None
    assert plan.solution.objective == pytest.approx(best, rel=1e-6), f"seed {seed}"
    assert plan.solution.bound == pytest.approx(best, rel=1e-6), f"seed {seed}"
    return True


@pytest.mark.parametrize("block", range(3))
def test_search_equals_brute_force(block: int) -> None:
    assert sum(_search_equals_brute_force(seed) for seed in range(10 * block, 10 * (block + 1))) >= 3


@pytest.mark.parametrize("block", range(7))
def test_search_under_constraints_equals_brute_force(block: int) -> None:
    seeds = range(5000 + 10 * block, 5010 + 10 * block)
    assert sum(_search_equals_brute_force(seed, constrained=True) for seed in seeds) >= 2


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_search_equals_brute_force_on_hundreds_of_instances() -> None:
    assert sum(_search_equals_brute_force(seed) for seed in range(1000, 1500)) > 150


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 30))
def test_plan_is_never_worse_than_a_feasible_baseline(seed: int) -> None:
    given = random_instance(np.random.default_rng(seed)).constrained(gap=0.2)  # stops early: baselines still hold
    baselines = planner.baselines(given)
    try:
        plan = planner.solve(given)
    except InfeasibleError:
        assert not baselines
        return
    _check(plan, given)
    for baseline in baselines.values():
        _check(baseline, given)
        assert baseline.solution is not None and plan.solution is not None
        assert plan.solution.objective <= baseline.solution.objective


def test_baselines_are_even_uniform_and_single() -> None:
    baselines = planner.baselines(instance(6))
    assert set(baselines) == {"uniform", "balanced", "adabits", "transfer", "single"}  # no caps to be proportional to
    assert [stage.layers for stage in baselines["uniform"].stages] == [(0, 3), (3, 6)]
    assert len({baselines["uniform"].precision(unit) for unit in model(6).units}) == 1
    assert [stage.device for stage in baselines["single"].stages] == ["d0"]


def test_useless_device_is_dropped_unless_all_must_be_used() -> None:
    given = instance(4, slowness=(1.0, 200.0))
    assert [stage.device for stage in planner.solve(given).stages] == ["d0"]
    plan = planner.solve(given.constrained(all_devices=True))
    assert {stage.device for stage in plan.stages} == {"d0", "d1"}
    _check(plan, given)


def test_faster_device_gets_more_layers() -> None:
    plan = planner.solve(instance(12, slowness=(1.5, 1.0), latency=0.0, step=0.0, gap=1e-4, all_devices=True))
    layers = {stage.device: stage.layers[1] - stage.layers[0] for stage in plan.stages}
    assert layers["d1"] > layers["d0"] > 0


def test_tight_cap_moves_layers_away() -> None:
    roomy = instance(8, slowness=(1.0, 1.0), fixed_bits=4)
    size = planner.solve(roomy.constrained(all_devices=True)).predicted
    assert size is not None
    given = instance(8, slowness=(1.0, 1.0), fixed_bits=4, memory=(None, min(size.memory_bytes) * 9 // 10))
    _check(planner.solve(given.constrained(all_devices=True)), given)


def test_default_budget_is_that_of_uniform_four_bit() -> None:
    given = instance(4)
    plan = planner.solve(given)
    four = Precision(4, 32)
    assert plan.solution is not None
    assert plan.solution.omega_budget == pytest.approx(sum(given.sensitivity.of(u, four) for u in given.spec.units))
    _check(plan, given)


def test_tighter_budget_costs_time_and_is_kept() -> None:
    given = instance(4)
    loose = planner.solve(given.constrained(omega_budget=1e9))
    tight = planner.solve(given.constrained(omega_budget=0.05))
    _check(tight, given)
    assert tight.solution is not None and loose.solution is not None
    assert tight.solution.omega <= 0.05
    assert tight.solution.objective > loose.solution.objective
    assert {loose.precision(unit).bits for unit in given.spec.units} == {3}


def test_theta_buys_quality() -> None:
    given = instance(4, omega_budget=1e9)
    plain = planner.solve(given)
    careful = planner.solve(given.constrained(theta=10.0))
    assert plain.solution is not None and careful.solution is not None
    assert careful.solution.omega < plain.solution.omega


def test_fixed_bits_fix_every_unit_and_lift_the_budget() -> None:
    given = instance(4)
    plan = planner.solve(given.constrained(fixed_bits=3))
    assert {plan.precision(unit).stored for unit in given.spec.units} == {Precision(3, 32)}
    assert plan.solution is not None and plan.solution.omega_budget is None
    _check(plan, given.constrained(fixed_bits=3))


def _modes(plan: Plan) -> dict[str, set[str]]:
    """Device -> modes of activations of its quantized units."""
    modes: dict[str, set[str]] = {stage.device: set() for stage in plan.stages}
    for stage in plan.stages:
        modes[stage.device] |= {p.activations for p in stage.precisions if p.quantized}
    for placement in (plan.embedding, plan.head):
        if placement.precision.quantized:
            modes[plan.stages[placement.stage].device].add(placement.precision.activations)
    return modes


@pytest.mark.parametrize("activations", ["a16", "a8x2", "a8"])
def test_activations_are_those_asked_for_on_cpus_and_exact_on_gpus(activations: str) -> None:
    given = instance(6, kinds=("cpu", "cuda"), all_devices=True, activations=activations, fixed_bits=4)
    plan = planner.solve(given)
    _check(plan, given)
    assert _modes(plan) == {"d0": {activations}, "d1": {"a16"}}
    for baseline in planner.baselines(given).values():
        _check(baseline, given)
        assert _modes(baseline) == {"d0": {activations}, "d1": {"a16"}}
    seconds = planner.predict(plan, given.spec, given.profile, [16] * 4, [8] * 4)
    assert plan.predicted is not None
    assert seconds.prefill_s == pytest.approx(plan.predicted.prefill_s)


def test_16_bit_units_stay_exact_whatever_the_activations() -> None:
    given = instance(3, activations="a8", fixed_bits=16)
    plan = planner.solve(given)
    assert {plan.precision(unit) for unit in given.spec.units} == {W16}


def test_costs_of_another_mode_of_activations_are_not_taken() -> None:
    given = instance(3, activations="a8")
    planner.solve(given)
    with pytest.raises(NotMeasuredError, match="rtn-a8x2"):
        planner.solve(given.constrained(activations="a8x2"))


def test_min_bits_hold() -> None:
    given = instance(4, omega_budget=1e9)
    plan = planner.solve(given.constrained(min_bits=8))
    assert {plan.precision(unit).bits for unit in given.spec.units} == {8}


def test_no_allowed_bits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no bit width can be chosen"):
        planner.solve(instance(2, bits=(3, 4), min_bits=8))


def test_tied_table_is_counted_once_only_where_it_is_stored_once() -> None:
    given = instance(2, slowness=(1.0,), memory=(None,), fixed_bits=4)
    table = Precision(4, 32).weight_bytes(512, 64)
    (once,) = planner.solve(given).predicted.memory_bytes  # type: ignore[union-attr]
    untied = instance(spec=model(2, tied_embeddings=False), slowness=(1.0,), memory=(None,), fixed_bits=4)
    (twice,) = planner.solve(untied).predicted.memory_bytes  # type: ignore[union-attr]
    assert twice == once + table
    fits = instance(2, slowness=(1.0,), memory=(once,), fixed_bits=4)
    assert planner.solve(fits).stages[0].layers == (0, 2)


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
    four = planner.solve(instance(4, slowness=(1.0,), memory=(None,), workload=one, fixed_bits=4)).predicted
    assert four is not None
    caps = (four.memory_bytes[0] - 1, 1)
    given = instance(4, slowness=(1.0, 1.0), memory=caps, workload=one, omega_budget=16.0)
    assert not planner.baselines(given)
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
    assert plan.prefill_microbatch * 16 <= 32
    with pytest.raises(NotMeasuredError, match="llmpq profile"):
        planner.solve(instance(2, workload=Workload(8, 16, 4), max_rows=8))


def test_missing_device_or_link_is_named() -> None:
    given = instance(2)
    alone = instance(2, slowness=(1.0,), memory=(None,))
    with pytest.raises(NotMeasuredError, match="d1"):
        planner.solve(replace(given, profile=alone.profile))


@pytest.mark.parametrize("batch_size", range(1, 40))
def test_microbatch_sizes_cover_the_batch_without_waste(batch_size: int) -> None:
    sizes = microbatch_sizes(batch_size, 4)
    assert {size for size in range(1, batch_size + 1) if batch_size % size == 0} <= set(sizes)
    counts = [-(-batch_size // size) for size in sizes]
    assert len(set(counts)) == len(counts)
    assert all((size - 1) * count < batch_size for size, count in zip(sizes, counts))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"max_tpot_s": 1e-9}, "the limits of latency"),
        ({"pinned": {"layer.0": "d1", "layer.1": "d0", "layer.2": "d1"}}, "what units are pinned to"),
        ({"excluded": ("d0",)}, "which devices are to be used"),
    ],
)
def test_an_infeasible_wish_is_named_and_what_there_is_without_it(asked: dict[str, Any], named: str) -> None:
    given = instance(4, memory=(None, 200_000))
    with pytest.raises(InfeasibleError, match=f"no plan keeps to {named}; without that .* TTFT of [0-9.e-]+ s"):
        planner.solve(given.constrained(**asked))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"pinned": {"layer.9": "d0"}},
            "'layer.9' is no unit of tiny; there are embedding, layer.0 to layer.3 and head",
        ),
        ({"required": ("gpu",)}, "there is no device 'gpu'; there are d0, d1"),
        ({"unit_bits": {"head": 2}}, "head is to have 2 bits, which no unit may have"),
        ({"excluded": ("d0",), "pinned": {"head": "d0"}}, "device 'd0' is to be used and not to be used"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        planner.solve(instance(4).constrained(**asked))


def _orders(given: Instance) -> list[Order]:
    costs = Costs.of(given)
    return device_orders(costs.kinds, required=costs.required, max_stages=9)


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
