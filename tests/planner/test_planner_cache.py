"""The width of the KV cache as a choice: memory, seconds and quality by hand, and the search against brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import planner
from llmpq.spec import Cluster, Demand, InfeasibleError, LayerKind, NotMeasuredError, Plan, UsageError, Workload
from llmpq.spec.sensitivity import KV_CACHE
from planner import memory
from planner.advice.infeasible import is_too_large
from planner.cost_arrays import Costs
from tests.support.planner_checks import check, equals_brute_force, least, no_baseline_is_better, objective
from tests.support.planner_instances import Instance, instance, model, random_instance, with_cache_8

EITHER = (16, 8)
LONG = Workload(batch_size=4, prompt_len=100, output_len=60)  # 3 blocks of 64 tokens for each sequence


def choice(omega: float = 1e-3, ratio: float = 0.5, **changes: Any) -> Instance:
    """Two equal devices, attention that counts, and either cache."""
    given = instance(4, **{"slowness": (1.0, 1.0), "workload": LONG, "attention": 2e-9, "omega_budget": 4.0, **changes})
    return with_cache_8(given, [ratio] * len(given.cluster.devices), omega, kv_bits=EITHER)


def capped(given: Instance, cap: int) -> Instance:
    devices = tuple(replace(device, memory_bytes=cap) for device in given.cluster.devices)
    return replace(given, cluster=Cluster(devices, given.cluster.links))


def with_caches(plan: Plan, *bits: Any) -> Plan:
    stages = zip(plan.stages, bits, strict=True)
    return replace(plan, stages=tuple(replace(stage, kv_bits=of_stage) for stage, of_stage in stages))


def bits_of(given: Instance) -> tuple[int, ...]:
    """Of the cache of each stage of its best plan."""
    solved = planner.solve(given)
    check(solved, given)
    return tuple(stage.kv_bits for stage in solved.plan.stages)


def test_a_cache_of_8_bits_takes_a_code_for_each_number_and_a_scale_for_each_head() -> None:
    """Of keys and of values; layers within a window keep less of it, too."""
    kinds = (LayerKind(), LayerKind(window=60))  # one more than 60 - 1 + 100 positions of the prompt's step
    spec = model(4, layer_kinds=kinds, num_heads=4, num_kv_heads=2, head_dim=16, max_positions=8192)
    given = choice(spec=spec, workload=Workload(4, 100, 1000), all_devices=True)
    plan = planner.solve(given.constrained(kv_bits=(16,))).plan
    assert [len(stage.precisions) for stage in plan.stages] == [2, 2]
    whole, window = (4 * blocks * 64 for blocks in (18, 3))  # tokens of 4 sequences: of 1100, of 159
    of_16, of_8 = 2 * 2 * 16 * 2, 2 * 2 * (16 + 4)  # bytes of a token

    def sizes(*bits: Any) -> np.ndarray:
        return np.array(memory.stage_bytes(with_caches(plan, *bits), spec, given.profile))

    saved = (whole + window) * (of_16 - of_8)
    assert (sizes(16, 16) - sizes(8, 8)).tolist() == [saved, saved]
    assert (sizes(16, 16) - sizes(16, 8)).tolist() == [0, saved]  # each stage has its own


def test_seconds_are_those_of_attention_on_the_stage_s_cache() -> None:
    given = choice(ratio=0.25, all_devices=True)
    plan = planner.solve(given.constrained(kv_bits=(16,))).plan

    def decode_s(*bits: Any) -> float:
        changed = with_caches(plan, *bits)
        return planner.predict(changed, given.spec, given.profile, [100] * 4, [2] * 4).decode_s

    # A round of a micro-batch: 2 layers of each stage, 101 keys of each query, 64 dimensions.
    attention_s = 2 * plan.decode_microbatch * 101 * 64 * 2e-9
    assert decode_s(16, 16) - decode_s(8, 8) >= 2 * 0.75 * attention_s * (1 - 1e-6)
    assert decode_s(16, 16) > decode_s(16, 8) > decode_s(8, 8)


def random_choice(seed: int, **changes: Any) -> Instance:
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=2, max_devices=2, kinds=3)
    ratios = rng.uniform(0.3, 1.7, len(given.cluster.devices))
    return with_cache_8(given, ratios.tolist(), float(rng.choice([0.01, 2.0])), kv_bits=EITHER, **changes)


def test_the_search_equals_brute_force_over_the_caches_of_all_stages() -> None:
    found = []
    for seed in range(12):
        given = random_choice(seed, all_devices=seed % 3 > 0)
        if equals_brute_force(given, f"seed {seed}"):
            found.append(bits_of(given))
    assert {(8,), (16,)} & set(found) and {(8, 8), (16, 16)} & set(found) and {(8, 16), (16, 8)} & set(found)


def test_it_is_chosen_where_it_is_faster_within_the_quality_budget() -> None:
    assert set(bits_of(choice(ratio=0.5))) == {8}
    assert set(bits_of(choice(ratio=1.5))) == {16}
    with pytest.raises(InfeasibleError, match="no plan meets the quality budget"):
        planner.solve(choice(omega=0.9, omega_budget=0.8).constrained(kv_bits=(8,)))
    assert set(bits_of(choice(omega=0.5, theta=1e3))) == {16}  # too dear in seconds


def test_the_small_device_alone_has_8_bits_where_the_quality_budget_allows_no_more() -> None:
    """Two equal devices have just room for an even split, but one lacks a byte."""
    sizes: dict[str, Any] = {"prefill_microbatch": 1, "decode_microbatch": 2, "bits": (16,), "all_devices": True}
    given = choice(omega=1.0, omega_budget=0.6, ratio=1.5, **sizes)
    of_16 = planner.solve(given.constrained(kv_bits=(16,))).prediction.memory_bytes
    caps = (of_16[0] - 1, of_16[1])
    devices = tuple(replace(d, memory_bytes=cap) for d, cap in zip(given.cluster.devices, caps, strict=True))
    tight = replace(given, cluster=Cluster(devices, given.cluster.links))
    for bits, reason in ((16, r"does not fit.*; a KV cache of 8 bits would fit: .*--kv-bits auto$"), (8, "budget")):
        with pytest.raises(InfeasibleError, match=reason):
            planner.solve(tight.constrained(kv_bits=(bits,)))
    solved = planner.solve(tight)
    check(solved, tight)
    assert {stage.device: stage.kv_bits for stage in solved.plan.stages} == {"d0": 8, "d1": 16}
    assert objective(solved) == pytest.approx(least(tight), rel=1e-6)
    views = planner.explain(solved, tight, planner.Clock.of(2.0))
    assert [view.omega for view in views.units if view.device == "d0"].count(0.25) == 2
    assert sum(view.omega for view in views.units) == pytest.approx(0.5)
    busy = [seconds for view in views.stages for seconds in (view.prefill_s, view.prefill_link_s)]
    assert sum(busy) + 3 * max(busy) == pytest.approx(solved.prediction.prefill_s)  # 4 micro-batches
    simulated = planner.predict(solved.plan, tight.spec, tight.profile, [100] * 4, [60] * 4)
    assert simulated.prefill_s == pytest.approx(solved.prediction.prefill_s)


def test_its_omega_counts_as_that_of_units_does() -> None:
    given = choice(omega=0.25, bits=(4, 16), omega_budget=3.0)
    solved = planner.solve(given)
    check(solved, given)
    assert solved.plan.kv_bits == 8
    of_units = sum(given.sensitivity.of(unit, solved.plan.precision(unit)) for unit in given.spec.units)
    assert solved.solution.omega == pytest.approx(of_units + 0.25)
    views = planner.explain(solved, given, planner.Clock.of(3.0)).units
    assert sum(view.omega for view in views) == pytest.approx(solved.solution.omega)
    assert views[1].omega == pytest.approx(given.sensitivity.of("layer.0", solved.plan.precision("layer.0")) + 0.0625)


def test_it_is_chosen_where_no_other_fits() -> None:
    pinned = {"fixed_bits": 4, "prefill_microbatch": 1, "decode_microbatch": 4}  # so that memory depends on it alone
    given = choice(ratio=1.5, slowness=(1.0,), memory=(None,), **pinned)
    of_16, of_8 = (planner.solve(given.constrained(kv_bits=(bits,))).prediction.memory_bytes[0] for bits in EITHER)
    tight = capped(given, (of_16 + of_8) // 2)
    assert bits_of(tight) == (8,)
    assert not is_too_large(Costs.of(tight), planner.Clock.of(60.0))
    for bits, words in ((EITHER, "micro-batches of 1 and with a KV cache of 8 bits: d0 lacks"), ((16,), "sequences$")):
        with pytest.raises(InfeasibleError, match=words):
            planner.solve(capped(given, of_8 // 4).constrained(kv_bits=bits))


def test_baselines_have_the_better_cache_each() -> None:
    for given in (choice(ratio=0.5), choice(ratio=1.5)):
        found = no_baseline_is_better(given)
        for bits in EITHER:
            for kind, other in planner.baseline_plans(given.constrained(kv_bits=(bits,))).items():
                assert objective(found[kind]) <= objective(other) * (1 + 1e-9)


def test_requests_that_come_at_random_get_the_better_cache() -> None:
    for ratio, bits in ((0.2, 8), (3.0, 16)):
        given = choice(ratio=ratio, slowness=(1.0,), memory=(None,), workload=Workload(1, 100, 60), gap=0.1)
        solved = planner.solve_online(given, Demand(max_ttft_s=1.0, requests=20))
        assert solved.plan.kv_bits == bits


def test_changes_for_requests_that_come_at_random_keep_to_the_quality_budget() -> None:
    """All layers with 8 bits would answer most of them; a layer that moves to a stage with 8 bits loses more."""
    given = choice(omega=1.0, ratio=0.2, omega_budget=0.6, bits=(16,), all_devices=True, workload=Workload(1, 100, 60))
    solved = planner.solve_online(given.constrained(gap=0.5), Demand(max_ttft_s=1.0, requests=20))
    assert sorted({stage.kv_bits for stage in solved.plan.stages}) == [8, 16]
    of_8 = sum(len(stage.precisions) for stage in solved.plan.stages if stage.kv_bits == 8)
    assert solved.solution.omega == pytest.approx(of_8 / 4) and of_8 == 2


def test_what_was_not_measured_is_asked_for() -> None:
    unmeasured = instance(4, workload=LONG).constrained(kv_bits=(8,))
    with pytest.raises(NotMeasuredError, match=r"attention in a KV cache of 8 bits .*--kv-bits 8"):
        planner.solve(replace(unmeasured, sensitivity=choice().sensitivity))
    unknown = replace(choice(), sensitivity=unmeasured.sensitivity)
    assert KV_CACHE not in unknown.sensitivity.omega
    with pytest.raises(UsageError, match=r"KV cache of 8 bits loses was not measured; run `llmpq sensitivity` with"):
        planner.solve(unknown)
    with pytest.raises(UsageError, match="kv_bits: is empty"):
        choice().constrained(kv_bits=())
