"""Options between two widths, with some linears of a layer wider: which ones there are, and that plans are the best."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

import planner
from llmpq.spec import NATIVE, InfeasibleError, Mixed, Precision, UsageError
from planner.cost_arrays import Costs
from planner.mixed import options_of
from tests.support.planner_checks import check, equals_brute_force, no_baseline_is_better
from tests.support.planner_instances import Instance, instance, model, random_instance


def per_linear(given: Instance, seed: int = 0) -> Instance:
    """With sensitivities of linears, which add up to those of their layers."""
    rng, omega = np.random.default_rng(seed), dict(given.sensitivity.omega)
    for unit in given.spec.units[1:-1]:
        shares = rng.dirichlet(np.ones(4))
        for name, share in zip(given.spec.linears("layer.0"), shares, strict=True):
            omega[f"{unit}.{name}"] = {p: share * value for p, value in omega[unit].items()}
    return replace(given, sensitivity=replace(given.sensitivity, omega=omega)).constrained(per_linear=True)


def test_steps_between_two_widths_are_the_best_that_one_choice_for_all_layers_can_be() -> None:
    given = per_linear(instance(bits=(3, 4, 16)))
    spec, few, many = given.spec, given.constraints.precision(3), given.constraints.precision(4)
    layers = spec.units[1:-1]

    def point(option: Mixed) -> tuple[int, float]:
        return spec.unit_bytes("layer.0", option), sum(given.sensitivity.of(unit, option) for unit in layers)

    options = options_of(given)
    assert [options[0], *options[4:]] == [few, many, Precision(16)]
    steps = [point(option) for option in options[1:4] if isinstance(option, Mixed)]
    everything = [Mixed(tuple(zip(spec.linears("layer.0"), of))) for of in product((few, many), repeat=4)]
    points = [point(option) for option in everything]
    line = [points[0], *steps, points[-1]]
    assert line == sorted(line) and len(line) == 5
    for size, omega in points:  # none is below the line through the steps
        assert omega >= np.interp(size, *zip(*line)) - 1e-12


def test_only_layers_have_them_and_only_quantized_widths_are_mixed() -> None:
    given = per_linear(instance(bits=(4, 8, 16, NATIVE)))
    options = options_of(given)
    assert [option.width if isinstance(option, Precision) else "mixed" for option in options] == [
        4, *["mixed"] * 3, 8, 16,
    ]  # fmt: skip
    costs = Costs.of(given)
    assert costs.allowed is None
    for end in (0, -1):  # a table has the wider of both instead
        assert np.array_equal(costs.memory[end, :, 1:4], costs.memory[end, :, [4, 4, 4]].T)
        assert np.array_equal(costs.omega[end, 1:4], costs.omega[end, [4, 4, 4]])
    assert np.all(np.diff(costs.memory[1, 0]) > 0) and np.all(np.diff(costs.omega[1]) < 0)
    assert options_of(given.constrained(fixed_bits=4)) == (given.constraints.precision(4),)


def test_between_native_and_what_takes_fewer_bytes_linears_stay_as_they_are_stored() -> None:
    spec = model()
    kept = {"qkv": Precision(4, 32, "offset", "gguf"), "out": Precision(8, 32, quantizer="gguf")}
    spec = replace(spec, stored=dict.fromkeys(spec.units[1:-1], kept))  # "up" and "down" are of 16 bits
    given = per_linear(instance(spec=spec, bits=(3, 4, NATIVE)))
    three, four = map(given.constraints.precision, (3, 4))
    options = [option for option in options_of(given) if isinstance(option, Mixed)]
    with_native = [option for option in options if NATIVE in dict(option.linears).values()]
    assert len(options) == 9 and len(with_native) == 6
    for few in (three, four):
        steps = [option for option in with_native if few in dict(option.linears).values()]
        assert [sum(of == NATIVE for _, of in step.linears) for step in steps] == [1, 2, 3]
        sizes = [spec.unit_bytes("layer.1", option) for option in (few, *steps, NATIVE)]
        losses = [given.sensitivity.of("layer.1", option) for option in (few, *steps, NATIVE)]
        assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True) and losses[-1] == 0
        assert spec.linear_precisions("layer.2", steps[0]) == {
            name: few if of == few else kept.get(name, Precision(16)) for name, of in steps[0].linears
        }


def test_a_mixed_layer_takes_the_time_of_its_linears() -> None:
    given = per_linear(instance(bits=(3, 4)))
    costs, options = Costs.of(given), options_of(given)
    three, four = costs.decode[0].units[1, 0, [0, 4]]
    sizes = {name: linear.n * linear.k for name, linear in given.spec.linears("layer.0").items()}
    for o, option in enumerate(options[1:4], 1):
        assert isinstance(option, Mixed)
        share = sum(sizes[name] for name, p in option.linears if p.bits == 4) / sum(sizes.values())
        assert costs.decode[0].units[1, 0, o] == pytest.approx(three + share * (four - three))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_plans_with_mixed_layers_equal_brute_force(seed: int, stored: bool) -> None:
    given = random_instance(np.random.default_rng(seed), max_layers=2, max_devices=1 if stored else 2, stored=stored)
    given = per_linear(given.constrained(bits=(3, NATIVE) if stored else (3, 4)), seed)
    equals_brute_force(given, str(seed))
    no_baseline_is_better(given)


def test_they_are_chosen_where_they_are_faster_within_the_budget_and_explained() -> None:
    given = per_linear(instance(slowness=(1.0,), memory=(None,), bits=(3, 4)))
    budget = given.constraints.budget(given.spec, given.sensitivity)
    given = given.constrained(omega_budget=1.5 * budget)
    mixed, whole = planner.solve(given), planner.solve(given.constrained(per_linear=False))
    check(mixed, given)
    assert mixed.solution.objective < whole.solution.objective
    layers = [mixed.plan.precision(unit) for unit in given.spec.units[1:-1]]
    assert any(isinstance(layer, Mixed) for layer in layers)
    found = planner.explain(mixed, given)
    shown = [view.width for view in found.units[1:-1]]
    assert shown == [layer.width for layer in layers] and any("/" in str(width) for width in shown)
    amounts = {change.what: change.amount for change in found.changes}
    assert amounts["every unit one width wider"] > 0 > amounts["every unit one width narrower"]


def test_without_sensitivities_of_linears_it_is_said_what_to_run() -> None:
    with pytest.raises(
        UsageError, match=r"of layer\.0\.qkv at w3-.* with this group size and quantizer, and --per-linear"
    ):
        planner.solve(instance(per_linear=True))


def test_layers_with_a_linear_below_the_least_width_are_named_where_that_is_proposed() -> None:
    given = per_linear(instance(1, slowness=(1.0,), memory=(None,), bits=(3, 4), min_bits=4, omega_budget=1e9))
    given = given.constrained(unit_bits={"embedding": 4, "head": 4}, prefill_microbatch=1, decode_microbatch=1)
    (needed,) = planner.solve(given).prediction.memory_bytes
    (device,) = given.cluster.devices
    short = replace(given, cluster=replace(given.cluster, devices=(replace(device, memory_bytes=needed - 1),)))
    with pytest.raises(InfeasibleError):
        planner.solve(short)
    changes = [found.change for found in planner.relaxations(short.constrained(theta=1.0))]
    assert "fewer than 4 bits for layer.0" in changes
