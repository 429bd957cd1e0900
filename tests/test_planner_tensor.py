"""Devices that exclude each other, and groups of equal devices: against hand computations and brute force."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from planner_instances import Instance, brute_force, cost_table, instance, model, random_instance

import planner
from bench import tensor_parallel
from bench.figures import MODELS
from llmpq.spec import (
    CostTable,
    Device,
    InfeasibleError,
    Link,
    ModelSpec,
    Op,
    Plan,
    Precision,
    UsageError,
    Workload,
    unit_ops,
)
from planner import memory
from planner.constraints import AtMost
from planner.costs import TOKEN_BYTES, Choice, Costs, Phase, microbatch_sizes
from planner.objective import Program
from planner.orders import device_kinds
from planner.tensor import Ring, with_groups

SPEC = model(2, num_kv_heads=4, vocab_size=256)
STEP = 1e-6  # seconds; what stages cost does not hide what units do


def _objective(plan: Plan) -> float:
    assert plan.solution is not None
    return plan.solution.objective


def _breaks(rules: Sequence[tuple[Mapping[str, float], float]], names: Sequence[str]) -> bool:
    return any(sum(weights.get(name, 0) for name in names) > limit for weights, limit in rules)


@pytest.mark.parametrize("seed", range(12))
def test_search_among_devices_that_exclude_each_other_equals_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    given = random_instance(rng, max_layers=2).constrained(all_devices=False)
    names = [device.name for device in given.cluster.devices]
    rules = [({name: float(rng.integers(0, 4)) for name in names}, float(rng.integers(2, 6))) for _ in range(2)]
    given = given.constrained(at_most=tuple(AtMost(*rule) for rule in rules))
    costs = Costs.of(given)
    best = min(
        (
            brute_force(costs.program(Choice(order, prefill, decode)))
            for length in range(1, len(names) + 1)
            for order in itertools.permutations(range(len(names)), length)
            if not _breaks(rules, [names[d] for d in order])
            for prefill in costs.prefill
            for decode in costs.decode
        ),
        default=math.inf,
    )
    for baseline in planner.baselines(given).values():
        assert not _breaks(rules, [stage.device for stage in baseline.stages])
        assert _objective(baseline) >= best * (1 - 1e-9)
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            planner.solve(given)
        return
    plan = planner.solve(given)
    assert not _breaks(rules, [stage.device for stage in plan.stages])
    assert plan.solution is not None
    assert plan.solution.objective == pytest.approx(best, rel=1e-6)
    assert plan.solution.bound == pytest.approx(best, rel=1e-6)


def test_devices_of_different_weights_are_not_identical() -> None:
    given = instance(2, slowness=(1.0,) * 3, memory=(None,) * 3)
    rule = AtMost({"d0": 1, "d1": 1, "d2": 2}, 9)
    assert device_kinds(given.cluster, given.profile, given.constraints) == {0: 0, 1: 0, 2: 0}
    assert device_kinds(given.cluster, given.profile, given.constrained(at_most=(rule,)).constraints) == {
        0: 0,
        1: 0,
        2: 2,
    }


def test_what_uses_all_devices_uses_as_many_as_may_be_used_together() -> None:
    given = instance(6, slowness=(1.0,) * 3, memory=(None,) * 3)
    either = given.constrained(at_most=(AtMost({"d1": 1, "d2": 1}, 1),))
    for kind in ("uniform", "adabits"):
        assert len(planner.baselines(given)[kind].stages) == 3
        assert len(planner.baselines(either)[kind].stages) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"at_most": (AtMost({"d9": 1}, 1),)}, "there is no device 'd9'; there are d0, d1"),
        ({"at_most": (AtMost({"d0": -1}, 1),)}, "weights are 0 or more"),
        (
            {"at_most": (AtMost({"d0": 2, "d1": 1}, 2),), "required": ("d0", "d1")},
            "not all of d0, d1 may be used together: they weigh 3 of 2; ask for fewer",
        ),
    ],
)
def test_exclusion_that_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        planner.solve(instance(2).constrained(**asked))


def test_a_part_holds_its_share_of_the_matrices_and_all_of_the_norms() -> None:
    spec, part = model(2, num_kv_heads=4), model(2, num_kv_heads=4).part(4)
    assert [(x.n, x.k) for x in part.layer_linears] == [(48, 64), (64, 16), (64, 64), (64, 32)]
    assert (part.table.n, part.table.k, part.kv_dim) == (128, 64, 16)
    exact, norms = Precision(16), 2 * 64 * 4
    assert 4 * (part.unit_bytes("layer.0", exact) - norms) == spec.unit_bytes("layer.0", exact) - norms
    assert 4 * part.kv_bytes(10, "float32") == spec.kv_bytes(10, "float32")
    with pytest.raises(UsageError, match="tiny cannot be split into 3 parts, as its num_heads is 4"):
        spec.part(3)


def test_a_ring_takes_what_it_takes_by_hand() -> None:
    ring = Ring(4, Link("a", "b", 1e-5, 1e9))
    # 2 * 3/4 * 8 MB at 1 GB/s, and 6 messages
    assert ring.all_reduce(8e6) == pytest.approx(0.012 + 6e-5, rel=1e-12)
    # two all-reduces of 5 rows of 64 values of 4 bytes
    assert ring.seconds(Op("layer_rest", 5, 64, 128), 4) == pytest.approx(2 * (1.5 * 1280e-9 + 6e-5), rel=1e-12)
    assert ring.seconds(Op("embedding", 5, 512, 64), 4) == pytest.approx(1.5 * 1280e-9 + 6e-5, rel=1e-12)
    # each of 4 members gets 5 rows of 8 bytes from the 3 others
    assert ring.seconds(Op("head_rest", 5, 512), 4) == pytest.approx(3 * 5 * 8e-9 + 3e-5, rel=1e-12)
    assert ring.seconds(Op("linear", 5, 64, 64), 4) == 0


def _equal(count: int, *, others: Sequence[float] = (), **changes: Any) -> Instance:
    """`count` equal devices, and others of these kinds of slowness on another host."""
    total = count + len(others)
    usual = {"spec": SPEC, "memory": (None,) * total, "step": STEP}
    given = instance(slowness=(1.0,) * count + tuple(others), **usual | changes)
    devices = given.cluster.devices
    moved = (*devices[:count], *(replace(device, host="other") for device in devices[count:]))
    return replace(given, cluster=replace(given.cluster, devices=moved))


def _part_costs(given: Instance) -> Any:
    limits = given.constraints

    def costs(device: Device, part: ModelSpec) -> CostTable:
        options = tuple(limits.precision(bits).on(device.kind, limits.activations) for bits in (3, 4, 8, 16))
        return cost_table(part, options, step=STEP)

    return costs


def test_groups_are_counted_out_of_the_devices_there_are() -> None:
    given = _equal(5, others=(2.0,)).constrained(at_most=(AtMost({"d0": 1, "d1": 1, "d2": 1, "d3": 1, "d4": 1}, 4),))
    grouped = with_groups(given, (2, 4), _part_costs(given))
    names = [device.name for device in grouped.cluster.devices]
    assert names == ["d0", "d1", "d2", "d3", "d4", "d5", "d0 x2", "d2 x2", "d0 x4"]
    assert [device.members for device in grouped.cluster.devices] == [1, 1, 1, 1, 1, 1, 2, 2, 4]
    kept, counted = grouped.constraints.at_most
    weights = {"d0": 1, "d1": 1, "d2": 1, "d3": 1, "d4": 1, "d0 x2": 2, "d2 x2": 2, "d0 x4": 4}
    assert counted == AtMost(weights, 5)
    assert kept == AtMost({**weights, "d5": 0}, 4)
    kinds = device_kinds(grouped.cluster, grouped.profile, grouped.constraints)
    assert kinds == {0: 0, 1: 0, 2: 0, 3: 0, 4: 0, 5: 5, 6: 6, 7: 6, 8: 8}


def test_groups_stay_on_one_host_and_leave_out_devices_that_something_is_asked_of() -> None:
    given = _equal(4, memory=(None,) * 4)
    apart = tuple(replace(d, host=f"host{i // 2}") for i, d in enumerate(given.cluster.devices))
    apart_given = replace(given, cluster=replace(given.cluster, devices=apart))
    grouped = with_groups(apart_given, (2, 4), _part_costs(given))
    assert [device.name for device in grouped.cluster.devices[4:]] == ["d0 x2", "d2 x2"]
    assert [rule.limit for rule in grouped.constraints.at_most] == [2, 2]
    asked = given.constrained(required=("d1",))
    assert [d.name for d in with_groups(asked, (2,), _part_costs(given)).cluster.devices[4:]] == ["d0 x2"]


@pytest.mark.parametrize("degrees", [(1,), (0, 2)])
def test_degrees_that_make_no_group_are_refused(degrees: tuple[int, ...]) -> None:
    given = _equal(2)
    with pytest.raises(UsageError, match="give degrees from 2 on"):
        with_groups(given, degrees, _part_costs(given))
    grouped = with_groups(given, (2,), _part_costs(given))
    with pytest.raises(UsageError, match="and single devices"):
        with_groups(grouped, (2,), _part_costs(given))


def test_a_group_takes_its_parts_seconds_and_its_exchanges() -> None:
    given = _equal(4, latency=1e-5, bytes_per_s=1e9)
    table = with_groups(given, (2,), _part_costs(given)).profile.table("d2 x2")
    precision = Precision(4, 32).on("cpu", given.constraints.activations)

    def seconds(unit: str) -> float:
        return sum(table.seconds(op) for op in unit_ops(SPEC, unit, precision, 10, 2, 7.0))

    def part_linear(n: int, k: int, m: int) -> float:
        return n * k * (0.25 + 0.05 * m) * 1e-9

    # Half of 2 * 4 heads of keys and 4 of queries of 16 each, of 64 values, of up and gate, of down.
    linears = sum(part_linear(n, k, 10) for n, k in ((96, 64), (64, 32), (128, 64), (64, 64)))
    attention, rest = 10 * 7 * 64 * 2e-10, 1e-6 + 10 * 64e-9  # the tables here have no width for these two
    all_reduce = 10 * 64 * 4 / 1e9 + 2e-5
    assert seconds("layer.0") == pytest.approx(linears + attention + rest + 2 * all_reduce, rel=1e-9)
    assert seconds("embedding") == pytest.approx(10 * 64e-9 + all_reduce, rel=1e-9)
    best = 2 * 8 / 1e9 + 1e-5
    assert seconds("head") == pytest.approx(part_linear(128, 64, 2) + 2 * 128e-9 + best, rel=1e-9)
    assert table.seconds(Op("step")) == STEP


def test_linears_of_one_shape_take_together_what_their_parts_take() -> None:
    spec = model(2, num_kv_heads=4, intermediate_size=64, family="opt")  # out, up and down are 64 x 64
    given = _equal(2, spec=spec, latency=0.0, bytes_per_s=1e30)
    table = with_groups(given, (2,), _part_costs(given)).profile.table("d0 x2")
    precision = Precision(4, 32).on("cpu", given.constraints.activations)
    linears = [op for op in unit_ops(spec, "layer.0", precision, 10, 2, 7.0) if op.kind == "linear"]
    parts = [(96, 64), (64, 32), (32, 64), (64, 32)]
    expected = sum(n * k * (0.25 + 0.05 * 10) * 1e-9 for n, k in parts)
    assert sum(map(table.seconds, linears)) == pytest.approx(expected, rel=1e-9)


def test_hidden_states_reach_all_members_of_a_group() -> None:
    given = _equal(4, others=(2.0,), latency=1e-5, bytes_per_s=1e9)
    profile = with_groups(given, (2, 4), _part_costs(given)).profile
    for source, target, members in (("d4", "d0 x4", 4), ("d0", "d0 x4", 4), ("d0 x2", "d2 x2", 2), ("d0 x2", "d0", 1)):
        expected = 1e-5 + 8e-3 + (members - 1) * (8e-3 / members + 1e-5)
        assert profile.link(source, target).seconds(8_000_000) == pytest.approx(expected, rel=1e-9)


def _lines(singles: int, others: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Pipelines by their stages: of how many equal devices each is, or 0 for one of the others."""
    sizes = (0,) * (others > 0) + (1, *degrees)
    for length in range(1, singles + others + 1):
        for line in itertools.product(sizes, repeat=length):
            if sum(line) <= singles and line.count(0) <= others:
                yield line


def _program(costs: Costs, given: Instance, line: Sequence[int], slow: float, sizes: tuple[Phase, Phase]) -> Program:
    """What a pipeline costs, each stage by what one of its members computes, holds and exchanges: by definition."""
    spec, work, limits, (prefill, decode) = given.spec, given.workload, given.constraints, sizes
    link = given.profile.links[0]
    parts = [spec.part(max(1, k)) for k in line]
    options = [option.on("cpu", limits.activations) for option in limits.options]
    tables = [cost_table(part, tuple(options), slowness=1.0 if k else slow, step=STEP) for k, part in zip(line, parts)]

    def ring(k: int, size: float) -> float:
        return (k - 1) * (size / k / link.bytes_per_s + link.latency_s) if k else 0.0

    def unit_seconds(d: int, unit: str, option: Precision, phase: Phase, context: float) -> float:
        ops = unit_ops(parts[d], unit, option, phase.tokens, phase.size, context)
        reduced = 2 * ring(line[d], phase.tokens * spec.hidden_size * 4)
        exchanged = {"embedding": reduced, "head": ring(line[d], line[d] * phase.size * 8)}.get(unit, 2 * reduced)
        return sum(map(tables[d].seconds, ops)) + exchanged

    def array(phase: Phase, context: float) -> Any:
        places = range(len(line))
        return np.array(
            [[[unit_seconds(d, u, o, phase, context) for o in options] for d in places] for u in spec.units]
        )

    def links(phase: Phase) -> Any:
        sizes = [phase.tokens * spec.hidden_size * 4] * (len(line) - 1) + [phase.size * TOKEN_BYTES]
        ends = zip((*line[1:], line[0]), sizes)
        return np.array([link.seconds(size) + ring(k, size) for k, size in ends] if len(line) > 1 else [])

    single = Device("any", "cpu")
    last, steps = len(line) - 1, np.array([table.seconds(Op("step")) for table in tables])
    slots, length = work.batch_size, work.max_length
    tokens, rows = max(prefill.size * work.prompt_len, decode.size), max(prefill.size, decode.size)
    held = [
        [[memory.unit_bytes(part, unit, o, single, slots, length) for o in limits.options] for part in parts]
        for unit in spec.units
    ]
    fixed = [
        memory.fixed_bytes(
            part,
            single,
            tokens=tokens,
            rows=rows,
            holds_head=d == last,
            wire="float32",
            wires=memory.neighbours(d, len(line)),
            overhead=1000,
        )
        for d, part in enumerate(parts)
    ]
    equal, other = given.cluster.devices[0].memory_bytes, given.cluster.devices[-1].memory_bytes
    return replace(
        costs.program(Choice((0,), prefill, decode)),  # but for what follows, programs are alike
        prefill=array(prefill, (work.prompt_len + 1) / 2),
        decode=array(decode, work.prompt_len + work.output_len / 2),
        prefill_step=steps,
        decode_step=steps,
        prefill_links=links(prefill),
        decode_links=links(decode),
        memory=np.array(held, dtype=float),
        memory_fixed=np.array(fixed, dtype=float),
        capacity=np.array([math.inf if cap is None else cap for cap in (equal if k else other for k in line)]),
        shared=np.array([memory.shared_bytes(parts[0], o) for o in limits.options], dtype=float),
    )


def _random(seed: int) -> tuple[Instance, int, float | None]:
    """Equal devices with a cap that often matters, perhaps another one, links on which exchanging costs something."""
    rng = np.random.default_rng(seed)
    count, slow = int(rng.integers(2, 5)), float(rng.uniform(0.3, 2.0)) if rng.random() < 0.5 else None
    spec = replace(SPEC, num_layers=1 if slow else 2, tied_embeddings=bool(rng.integers(2)))
    work = Workload(int(rng.choice([1, 2, 4])), int(rng.integers(4, 40)), int(rng.integers(1, 30)))
    units = sum(memory.unit_bytes(spec, u, Precision(8, 32), Device("any", "cpu"), 4, 40) for u in spec.units)
    cap = None if rng.random() < 0.3 else int(units * rng.uniform(0.1, 0.6)) + 20_000
    given = _equal(
        count,
        others=() if slow is None else (slow,),
        spec=spec,
        memory=(cap,) * (count + (slow is not None)),
        workload=work,
        latency=float(rng.choice([0, 1e-6, 1e-4])),
        bytes_per_s=float(rng.choice([1e8, 1e10])),
        omega_seed=seed,
        bits=(4, 16),
    )
    return given, count, slow


def _stages_by_brute_force(seed: int) -> list[int]:
    """How many devices each stage of the best plan has, after comparing it; none if there is no plan."""
    given, count, slow = _random(seed)
    degrees = tuple(k for k in (2, 4)[: 1 + seed % 2] if k <= count)
    grouped = with_groups(given, degrees, _part_costs(given))
    costs = Costs.of(grouped)
    best = min(
        brute_force(_program(costs, given, line, slow or 1.0, sizes))
        for line in _lines(count, int(slow is not None), degrees)
        if len(line) <= len(given.spec.units)
        for sizes in itertools.product(costs.prefill, costs.decode)
    )
    if math.isinf(best):
        with pytest.raises(InfeasibleError):
            planner.solve(grouped)
        return []
    plan = planner.solve(grouped)
    assert _objective(plan) == pytest.approx(best, rel=1e-6), f"seed {seed}"
    used = [plan.cluster.device(stage.device) for stage in plan.stages]
    assert sum(device.members for device in used if device.host == "localhost") <= count
    assert plan.predicted is not None
    assert plan.predicted.memory_bytes == memory.stage_bytes(plan, given.spec, grouped.profile)
    assert Plan.from_dict(plan.to_dict()) == plan
    return [device.members for device in used]


def test_search_with_groups_equals_brute_force_over_members() -> None:
    found = [_stages_by_brute_force(seed) for seed in (*range(20), 32)]
    assert sum(max(stages, default=1) > 1 for stages in found) >= 8
    assert sum(stages == [2, 2] for stages in found) >= 2


@pytest.mark.parametrize("seed", range(100, 110))
def test_a_problem_with_groups_is_never_worse(seed: int) -> None:
    given, count, _ = _random(seed)
    grouped = with_groups(given, [k for k in (2, 4) if k <= count], _part_costs(given))
    without, with_them = [
        {kind: _objective(plan) for kind, plan in planner.baselines(of).items()} for of in (given, grouped)
    ]
    for kind in ("single", "balanced"):  # the others use as many devices as there are
        assert with_them.get(kind, math.inf) <= without.get(kind, math.inf) * (1 + 1e-9)
    try:
        alone = _objective(planner.solve(given))
    except InfeasibleError:
        return
    assert _objective(planner.solve(grouped)) <= alone * (1 + 1e-6)


def test_groups_pay_where_one_sequence_waits_for_its_tokens_on_fast_links_alone() -> None:
    one = Workload(1, 16, 64)
    for bytes_per_s, latency, members in ((1e12, 1e-9, [4]), (1e5, 1e-2, [1])):
        given = _equal(4, workload=one, bytes_per_s=bytes_per_s, latency=latency)
        plan = planner.solve(with_groups(given, (2, 4), _part_costs(given)))
        assert [plan.cluster.device(stage.device).members for stage in plan.stages] == members


def test_the_runtime_refuses_a_plan_with_groups() -> None:
    given = _equal(2, workload=Workload(1, 16, 64), bytes_per_s=1e12, latency=1e-9)
    plan = planner.solve(with_groups(given, (2,), _part_costs(given)))
    assert [stage.device for stage in plan.stages] == ["d0 x2"]
    with pytest.raises(UsageError, match="d0 x2 stands for 2 devices that share a stage, which can be planned for"):
        plan.check_model(given.spec)
    planner.solve(given).check_model(given.spec)


@pytest.mark.parametrize("case", [case for case in tensor_parallel.CASES if "T4" in case.name or "3060" in case.name])
def test_every_cost_that_a_group_needs_is_in_the_analytic_tables(case: tensor_parallel.Case) -> None:
    spec = replace(MODELS["Llama-2-70B"], num_layers=8)
    given = tensor_parallel.problem(case, spec, 8, time_limit_s=5.0)
    grouped = tensor_parallel.grouped(given)
    costs = Costs.of(grouped)
    sizes = microbatch_sizes(8, len(grouped.cluster.devices))
    assert [phase.size for phase in costs.prefill] == [phase.size for phase in costs.decode] == sizes
    assert {device.members for device in grouped.cluster.devices} == ({1, 2, 4} if "T4" in case.name else {1, 2})
    plan = planner.solve(grouped)
    assert _objective(plan) <= _objective(planner.solve(given)) * 1.01
    members = [plan.cluster.device(stage.device).members for stage in plan.stages]
    assert max(members) > 1
    assert plan.predicted is not None
    full = planner.predict(plan, spec, grouped.profile, [512] * 8, [100] * 8)
    assert full.tokens_per_s == pytest.approx(plan.predicted.tokens_per_s, rel=0.1)
