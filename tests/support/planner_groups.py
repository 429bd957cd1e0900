"""Groups of equal devices: instances to form them in, and what pipelines of them cost, by what each member does.

Written apart from planner/device_groups.py; bytes are counted by planner/memory.py, which other tests are about.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmpq.spec import Context, CostTable, Device, ModelSpec, Op, Precision, Workload, unit_ops
from planner import memory
from planner.cost_arrays import TOKEN_BYTES, Configuration, Costs
from planner.objective import Program
from planner.step_costs import StepCosts
from tests.support.planner_instances import Instance, cost_table, instance, model

SPEC = model(2, num_kv_heads=4, vocab_size=256)
STEP = 1e-6  # seconds; what stages cost does not hide what units do


def equal_devices(count: int, *, others: Sequence[float] = (), **changes: Any) -> Instance:
    """`count` equal devices, and others of these kinds of slowness on another host."""
    total = count + len(others)
    usual = {"spec": SPEC, "memory": (None,) * total, "step": STEP}
    given = instance(slowness=(1.0,) * count + tuple(others), **usual | changes)
    devices = given.cluster.devices
    moved = (*devices[:count], *(replace(device, host="other") for device in devices[count:]))
    return replace(given, cluster=replace(given.cluster, devices=moved))


def part_costs(given: Instance) -> Callable[[Device, ModelSpec], CostTable]:
    """What a member of a group costs."""
    limits = given.constraints

    def costs(device: Device, part: ModelSpec) -> CostTable:
        options = tuple(limits.precision(bits) for bits in (3, 4, 8, 16))
        return cost_table(part, options, device.activations(limits.activations), step=STEP)

    return costs


def lines(singles: int, others: int, degrees: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Pipelines by their stages: of how many equal devices each is, or 0 for one of the others."""
    sizes = (0,) * (others > 0) + (1, *degrees)
    for length in range(1, singles + others + 1):
        for line in itertools.product(sizes, repeat=length):
            if sum(line) <= singles and line.count(0) <= others:
                yield line


def program_of(
    costs: Costs, given: Instance, line: Sequence[int], slow: float, sizes: tuple[StepCosts, StepCosts]
) -> Program:
    """What a pipeline costs, each stage by what one of its members computes, holds and exchanges."""
    spec, work, limits, (prefill, decode) = given.spec, given.workload, given.constraints, sizes
    link = given.profile.links[0]
    parts = [spec.part(max(1, k)) for k in line]
    options, mode = limits.precisions, limits.activations
    tables = [cost_table(part, options, mode, slowness=1.0 if k else slow, step=STEP) for k, part in zip(line, parts)]

    def ring(k: int, size: float) -> float:
        return (k - 1) * (size / k / link.bytes_per_s + link.latency_s) if k else 0.0

    def unit_seconds(d: int, unit: str, option: Precision, phase: StepCosts, context: float) -> float:
        ops = unit_ops(parts[d], unit, option, mode, phase.tokens, phase.size, Context.of(context))
        reduced = 2 * ring(line[d], phase.tokens * spec.hidden_size * 4)
        exchanged = {"embedding": reduced, "head": ring(line[d], line[d] * phase.size * 8)}.get(unit, 2 * reduced)
        return sum(map(tables[d].seconds, ops)) + exchanged

    def array(phase: StepCosts, context: float) -> Any:
        places = range(len(line))
        return np.array(
            [[[unit_seconds(d, u, o, phase, context) for o in options] for d in places] for u in spec.units]
        )

    def links(phase: StepCosts) -> Any:
        sizes = [phase.tokens * spec.hidden_size * 4] * (len(line) - 1) + [phase.size * TOKEN_BYTES]
        ends = zip((*line[1:], line[0]), sizes)
        return np.array([link.seconds(size) + ring(k, size) for k, size in ends] if len(line) > 1 else [])

    single = Device("any", "cpu")
    last, steps = len(line) - 1, np.array([table.seconds(Op("step")) for table in tables])
    cache = memory.CacheSize.of(work)
    tokens, rows = max(prefill.size * work.prompt_len, decode.size), max(prefill.size, decode.size)
    held = [
        [[memory.unit_bytes(part, unit, o, single, cache) for o in limits.precisions] for part in parts]
        for unit in spec.units
    ]
    fixed = [
        memory.StageBuffers(tokens, rows, "float32", (d > 0) + (d < last), d == last, cache).size(part, single, None)
        + 1000
        for d, part in enumerate(parts)
    ]
    equal, other = given.cluster.devices[0].memory_bytes, given.cluster.devices[-1].memory_bytes
    return replace(
        costs.program(Configuration((0,), prefill, decode)),  # but for what follows, programs are alike
        prefill=array(prefill, (work.prompt_len + 1) / 2),
        decode=array(decode, work.prompt_len + work.output_len / 2),
        prefill_step=steps,
        decode_step=steps,
        prefill_links=links(prefill),
        decode_links=links(decode),
        memory=np.array(held, dtype=float),
        omega=np.repeat(costs.omega[:, None], len(line), axis=1),
        memory_fixed=np.array(fixed, dtype=float),
        capacity=np.array([math.inf if cap is None else cap for cap in (equal if k else other for k in line)]),
        shared=np.array([memory.shared_bytes(parts[0], o) for o in limits.precisions], dtype=float),
    )


def random_devices(seed: int) -> tuple[Instance, int, float | None]:
    """Equal devices with a cap that often matters, perhaps another one, links on which exchanging costs something."""
    rng = np.random.default_rng(seed)
    count, slow = int(rng.integers(2, 5)), float(rng.uniform(0.3, 2.0)) if rng.random() < 0.5 else None
    spec = replace(SPEC, num_layers=1 if slow else 2, tied_embeddings=bool(rng.integers(2)))
    work = Workload(int(rng.choice([1, 2, 4])), int(rng.integers(4, 40)), int(rng.integers(1, 30)))
    cache = memory.CacheSize(4, 40, 40, 4)
    units = sum(memory.unit_bytes(spec, u, Precision(8, 32), Device("any", "cpu"), cache) for u in spec.units)
    cap = None if rng.random() < 0.3 else int(units * rng.uniform(0.1, 0.6)) + 20_000
    given = equal_devices(
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
