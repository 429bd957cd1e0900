"""Native as one option of units: what the checkpoint stores, at no sensitivity, where it stores any."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner
from llmpq.spec import NATIVE, W16, ModelSpec, Precision, UsageError
from planner.cost_arrays import Costs
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import instance, model, random_instance

W4 = Precision(4, 32, "offset", "gguf")
W8 = Precision(8, 32, quantizer="gguf")


def stored(spec: ModelSpec, **units: Precision) -> ModelSpec:
    """With these units stored at one precision each; `layer_3` is layer.3."""
    names = {name.replace("_", "."): precision for name, precision in units.items()}
    return replace(spec, stored={unit: dict.fromkeys(spec.linears(unit), p) for unit, p in names.items()})


def everywhere(spec: ModelSpec, precision: Precision = W4) -> ModelSpec:
    return stored(spec, **{unit.replace(".", "_"): precision for unit in spec.units})


@pytest.mark.parametrize("seed", range(12))
def test_plans_with_native_units_equal_brute_force(seed: int) -> None:
    given = random_instance(np.random.default_rng(seed), max_layers=2, max_devices=2, stored=True)
    equals_brute_force(given, str(seed))
    no_baseline_is_better(given)


def test_native_is_chosen_where_quality_leaves_nothing_else_as_fast() -> None:
    given = instance(spec=everywhere(model()), omega_budget=0.0)
    plan = planner.solve(given).plan
    assert {plan.precision(unit) for unit in given.spec.units} == {NATIVE}
    floating = planner.solve(instance(spec=model(), omega_budget=0.0)).plan
    assert {floating.precision(unit) for unit in given.spec.units} == {Precision(16)}


def test_native_weighs_and_costs_what_its_linears_do() -> None:
    spec = model()
    of_layer = {"qkv": W8, "out": W4, "up": W4, "down": W8}
    costs = Costs.of(instance(spec=replace(spec, stored={"layer.1": of_layer}), bits=(4, 8, 16, NATIVE)))
    w4, w8, _, native = costs.memory[2, 0]
    sizes = {name: linear.n * linear.k for name, linear in spec.linears("layer.0").items()}
    # 4 bits more of a weight, or 16 more of each 32 weights, than at 4 bits without offsets.
    more = [sizes[name] // 2 if p == W8 else sizes[name] // 32 * 2 for name, p in of_layer.items()]
    assert native == w4 + sum(more) < w8
    allowed = costs.allowed
    assert allowed is not None
    assert np.array_equal(allowed[:, 0, 3], [False, False, True, False, False, False])  # elsewhere it is 16 bits
    assert costs.omega[2, 3] == 0


def test_each_layer_by_itself_stays_native_or_is_quantized_again() -> None:
    """Here as many as the budget allows, since fewer bits are faster: those that lose least by it."""
    given = instance(spec=everywhere(model(6)), bits=(3, NATIVE), unit_bits={"embedding": NATIVE, "head": NATIVE})
    losses = {unit: given.sensitivity.of(unit, Precision(3, 32)) for unit in given.spec.units[1:-1]}
    least = sorted(losses, key=losses.__getitem__)[:2]
    budget = sum(losses[unit] for unit in least)
    plan = planner.solve(given.constrained(omega_budget=budget)).plan
    assert {unit for unit in losses if plan.precision(unit) != NATIVE} == {*least}


def test_a_unit_alone_or_all_can_be_made_native() -> None:
    spec = everywhere(model())
    plan = planner.solve(instance(spec=spec, unit_bits={"head": NATIVE}, bits=(3, NATIVE), omega_budget=1e9)).plan
    assert plan.head.precision == NATIVE
    plan = planner.solve(instance(spec=spec, fixed_bits=NATIVE)).plan
    assert {plan.precision(unit) for unit in spec.units} == {NATIVE}
    check(planner.solve(instance(spec=spec, fixed_bits=NATIVE)), instance(spec=spec, fixed_bits=NATIVE))
    with pytest.raises(UsageError, match="head is to be native, which no unit may have"):
        planner.solve(instance(spec=spec, unit_bits={"head": NATIVE}, bits=(3, 4)))


def test_native_is_16_bits_where_a_unit_is_not_stored_so() -> None:
    spec = stored(model(), embedding=W8)
    plan = planner.solve(instance(spec=spec, fixed_bits=NATIVE)).plan
    assert {plan.precision(unit) for unit in spec.units} == {NATIVE}
    assert spec.linear_precisions("embedding", NATIVE) == {"table": W8}
    assert {*spec.linear_precisions("layer.0", NATIVE).values()} == {W16}
    assert spec.unit_bytes("layer.0", NATIVE) == spec.unit_bytes("layer.0", W16)
    assert planner.solve(instance(spec=spec, unit_bits={"head": NATIVE})).plan.head.precision == NATIVE


def test_native_is_refused_where_nothing_at_all_is_stored_so() -> None:
    with pytest.raises(UsageError, match="no bit width can be chosen"):
        planner.solve(instance(spec=model(), fixed_bits=NATIVE))
    with pytest.raises(UsageError, match="stores nothing in a precision that kernels read"):
        model().linear_precisions("head", NATIVE)
