"""The constraints of a plan: quality, widths, activations, devices, pinned units, latencies, micro-batch sizes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import planner
from llmpq.spec import W16, InfeasibleError, NotMeasuredError, Plan, Precision, UsageError
from planner.constraints import DeviceLimit
from planner.solver.orders import device_kinds
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, random_instance


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
    usual = planner.baseline_plans(given.constrained(omega_budget=1e9)).values()
    times = [(plan.prediction.prefill_s, plan.prediction.decode_s) for plan in usual if plan.prediction]
    if times and rng.random() < 0.7:
        prefill_s, decode_s = times[0]
        changes["max_ttft_s"] = prefill_s * float(rng.uniform(0.6, 1.5))
        changes["max_tpot_s"] = decode_s / max(1, given.workload.output_len - 1) * float(rng.uniform(0.6, 1.5))
    bits = [b for b in given.constraints.bits if b >= given.constraints.min_bits]
    changes["unit_bits"] = {unit: b for unit, b in changes.get("unit_bits", {}).items() if b in bits}
    for size in ("prefill_microbatch", "decode_microbatch"):
        if rng.random() < 0.3:
            changes[size] = int(rng.integers(1, given.workload.batch_size + 1))
    return given.constrained(**changes)


@pytest.mark.parametrize("block", range(7))
def test_search_under_constraints_equals_brute_force(block: int) -> None:
    feasible = 0
    for seed in range(5000 + 10 * block, 5010 + 10 * block):
        rng = np.random.default_rng(seed)
        given = _constrained(random_instance(rng, max_layers=2, max_devices=2 + seed % 2), rng)
        feasible += equals_brute_force(given, f"seed {seed}")
    assert feasible >= 2


def test_default_budget_is_that_of_uniform_four_bit() -> None:
    given = instance(4)
    plan = planner.solve(given)
    four = Precision(4, 32)
    assert plan.solution.omega_budget == pytest.approx(sum(given.sensitivity.of(u, four) for u in given.spec.units))
    check(plan, given)


def test_tighter_budget_costs_time_and_is_kept() -> None:
    given = instance(4)
    loose = planner.solve(given.constrained(omega_budget=1e9))
    tight = planner.solve(given.constrained(omega_budget=0.05))
    check(tight, given)
    assert tight.solution.omega <= 0.05
    assert tight.solution.objective > loose.solution.objective
    assert {loose.plan.precision(unit).bits for unit in given.spec.units} == {3}


def test_theta_buys_quality() -> None:
    given = instance(4, omega_budget=1e9)
    plain = planner.solve(given)
    careful = planner.solve(given.constrained(theta=10.0))
    assert careful.solution.omega < plain.solution.omega


def test_fixed_bits_fix_every_unit_and_lift_the_budget() -> None:
    given = instance(4)
    plan = planner.solve(given.constrained(fixed_bits=3))
    assert {plan.plan.precision(unit) for unit in given.spec.units} == {Precision(3, 32)}
    assert plan.solution is not None and plan.solution.omega_budget is None
    check(plan, given.constrained(fixed_bits=3))


def _modes(plan: Plan) -> dict[str, set[str]]:
    """Device -> its mode of activations."""
    return {stage.device: {stage.activations} for stage in plan.stages}


@pytest.mark.parametrize("activations", ["a16", "a8x2", "a8"])
def test_cpus_multiply_in_the_chosen_activation_mode_and_gpus_in_a16(activations: str) -> None:
    given = instance(6, kinds=("cpu", "cuda"), all_devices=True, activations=activations, fixed_bits=4)
    plan = planner.solve(given)
    check(plan, given)
    assert _modes(plan.plan) == {"d0": {activations}, "d1": {"a16"}}
    for baseline in planner.baseline_plans(given).values():
        check(baseline, given)
        assert _modes(baseline.plan) == {"d0": {activations}, "d1": {"a16"}}
    seconds = planner.predict(plan.plan, given.spec, given.profile, [16] * 4, [8] * 4)
    assert seconds.prefill_s == pytest.approx(plan.prediction.prefill_s)


def test_16_bit_units_stay_exact_whatever_the_activations() -> None:
    given = instance(3, activations="a8", fixed_bits=16)
    plan = planner.solve(given)
    assert {plan.plan.precision(unit) for unit in given.spec.units} == {W16}


def test_costs_of_another_mode_of_activations_are_not_taken() -> None:
    given = instance(3, activations="a8")
    planner.solve(given)
    with pytest.raises(NotMeasuredError, match="rtn in a8x2"):
        planner.solve(given.constrained(activations="a8x2"))


def test_min_bits_hold() -> None:
    given = instance(4, omega_budget=1e9)
    plan = planner.solve(given.constrained(min_bits=8))
    assert {plan.plan.precision(unit).bits for unit in given.spec.units} == {8}


def test_no_allowed_bits_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no bit width can be chosen"):
        planner.solve(instance(2, bits=(3, 4), min_bits=8))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"max_tpot_s": 1e-9}, "the limits of latency"),
        ({"pinned": {"layer.0": "d1", "layer.1": "d0", "layer.2": "d1"}}, "what units are pinned to"),
        ({"excluded": ("d0",)}, "which devices are to be used"),
    ],
)
def test_an_infeasible_constraint_is_named_with_the_best_plan_without_it(asked: dict[str, Any], named: str) -> None:
    # Alone, d1 has no room for the least there is: 3 bits, and steps of a single sequence.
    layers = 4 * (512 * 64 * (3 / 8 + 2 / 32) + 4 * 2 * 64)  # codes and scales of 512 rows of 64; two norms
    table = 512 * 64 * (3 / 8 + 2 / 32) + 4 * 64  # once for embedding and head; the last norm
    cache = 4 * 4 * 24 * 2 * 32 * 2  # layers, slots, tokens; keys and values of 32 numbers, in float16
    activations = 16 * (3 * 64 + 256) * 4  # of a prompt of 16 tokens: hidden states, and gate and up, in float32
    given = instance(4, memory=(None, 150_000))
    assert layers + table + cache + activations > 150_000
    with pytest.raises(InfeasibleError, match=f"no plan keeps to {named}; without that .* TTFT of [0-9.e-]+ s"):
        planner.solve(given.constrained(**asked))


def test_sizes_of_microbatches_that_leave_no_plan_are_named() -> None:
    roomy = instance(4, slowness=(1.0,), memory=(None,))
    smallest = planner.solve(roomy.constrained(prefill_microbatch=1, decode_microbatch=1)).prediction
    tight = instance(4, slowness=(1.0,), memory=smallest.memory_bytes)
    check(planner.solve(tight), tight)
    with pytest.raises(InfeasibleError, match="no plan keeps to the sizes of micro-batches"):
        planner.solve(tight.constrained(prefill_microbatch=4))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"pinned": {"layer.9": "d0"}},
            "'layer.9' is no unit of tiny; there are embedding, layer.0 to layer.3 and head",
        ),
        ({"required": ("gpu",)}, "there is no device 'gpu'; there are d0, d1"),
        ({"unit_bits": {"head": 2}}, "head is to have 2 bits, which no unit may have"),
        (
            {"decode_microbatch": 5},
            "micro-batches of 5 sequences are asked for in decode, of a batch of 4; choose 1 to 4",
        ),
        ({"excluded": ("d0",), "pinned": {"head": "d0"}}, "device 'd0' is to be used and not to be used"),
    ],
)
def test_an_invalid_constraint_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        planner.solve(instance(4).constrained(**asked))


# ---- devices that exclude each other ----


@pytest.mark.parametrize("block", range(2))
def test_search_among_devices_that_exclude_each_other_equals_brute_force(block: int) -> None:
    feasible = 0
    for seed in range(6 * block, 6 * (block + 1)):
        rng = np.random.default_rng(seed)
        given = random_instance(rng, max_layers=2).constrained(all_devices=False)
        names = [device.name for device in given.cluster.devices]
        rules = [
            DeviceLimit({name: float(rng.integers(0, 4)) for name in names}, float(rng.integers(2, 6)))
            for _ in range(2)
        ]
        given = given.constrained(at_most=tuple(rules))
        feasible += equals_brute_force(given, f"seed {seed}")
        no_baseline_is_better(given)
    assert feasible >= 2


def test_devices_of_different_weights_are_not_identical() -> None:
    given = instance(2, slowness=(1.0,) * 3, memory=(None,) * 3)
    rule = DeviceLimit({"d0": 1, "d1": 1, "d2": 2}, 9)
    assert device_kinds(given.cluster, given.profile, given.constraints) == {0: 0, 1: 0, 2: 0}
    assert device_kinds(given.cluster, given.profile, given.constrained(at_most=(rule,)).constraints) == {
        0: 0,
        1: 0,
        2: 2,
    }


def test_all_devices_means_as_many_as_the_rules_allow() -> None:
    given = instance(6, slowness=(1.0,) * 3, memory=(None,) * 3)
    either = given.constrained(at_most=(DeviceLimit({"d1": 1, "d2": 1}, 1),))
    for kind in ("uniform", "adabits"):
        assert len(planner.baseline_plans(given)[kind].plan.stages) == 3
        assert len(planner.baseline_plans(either)[kind].plan.stages) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"at_most": (DeviceLimit({"d9": 1}, 1),)}, "there is no device 'd9'; there are d0, d1"),
        (
            {"at_most": (DeviceLimit({"d0": 2, "d1": 1}, 2),), "required": ("d0", "d1")},
            "not all of d0, d1 may be used together: they weigh 3 of 2; ask for fewer",
        ),
    ],
)
def test_exclusion_that_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        planner.solve(instance(2).constrained(**asked))
