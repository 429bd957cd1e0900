"""Small models, devices and costs for the planner's tests, and a brute force written apart from the planner's code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

import planner
from llmpq.spec import (
    NATIVE,
    ActivationMode,
    Cluster,
    CostRow,
    CostTable,
    Device,
    LayerKind,
    Link,
    ModelSpec,
    Op,
    Precision,
    Profile,
    Sensitivity,
    Workload,
)
from llmpq.spec.sensitivity import KV_CACHE
from planner.cost_arrays import Configuration, Costs
from planner.objective import Assignment, Narrow, Program

FAR = 1 << 18  # rows and keys up to which the tables here are "measured"


def model(num_layers: int = 4, **changes: Any) -> ModelSpec:
    spec = ModelSpec(
        name="tiny",
        content_hash="0" * 16,
        num_layers=num_layers,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        max_positions=2048,
        dtype="bfloat16",
        tied_embeddings=True,
        embedding_dim=64,
        norm_eps=1e-5,
        norm="rms",
        activation="silu",
        gated_mlp=True,
        final_norm=True,
        position_offset=None,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
    return replace(spec, **changes)


def cost_table(
    spec: ModelSpec,
    options: tuple[Precision, ...],
    activations: ActivationMode = "a16",
    *,
    slowness: float = 1.0,
    step: float = 1e-4,
    bits_cost: dict[int, float] | None = None,
    max_rows: int = FAR,
    overhead: int = 1000,
    attention: float = 2e-10,
) -> CostTable:
    """A device whose seconds are linear in rows and context.

    `bits_cost` scales the weight-bound part by width; `attention` is seconds of a query, a key and a hidden dimension.
    """

    def linear(n: int, k: int, bits: int, m: int) -> float:
        weight = (bits_cost or {}).get(bits, bits / 16)
        return slowness * n * k * (weight + 0.05 * m) * 1e-9

    rows = [(Op("step"), step)]
    for m in (1, max_rows):
        for precision in options:
            for n, k in {*((x.n, x.k) for x in spec.linears("layer.0").values()), (spec.table.n, spec.table.k)}:
                mode = precision.multiplied(activations)
                product = Op("linear", m, n, k, precision=precision, activations=mode)
                rows.append((product, linear(n, k, precision.bits, m)))
            table = Op("embedding", m, spec.table.n, spec.table.k, precision=precision)
            rows.append((table, slowness * m * spec.hidden_size * 1e-9))
        for context in (1.0, float(FAR)):
            op = Op("attention", m, spec.num_heads * spec.head_dim, spec.kv_dim, context=context)
            rows.append((op, slowness * m * context * spec.hidden_size * attention))
        rest = Op("layer_rest", m, spec.hidden_size, spec.intermediate_size)
        rows.append((rest, slowness * (1e-6 + m * spec.hidden_size * 1e-9)))
        rows.append((Op("head_rest", m, spec.vocab_size), slowness * m * spec.vocab_size * 1e-9))
    return CostTable(
        device="test",
        kernels="0" * 12,
        threads=1,
        isa=None,
        overhead_bytes=overhead,
        rows=tuple(CostRow(op, seconds, "reference", "float32", 0) for op, seconds in rows),
    )


class Instance(planner.Problem):
    """A problem to plan for."""

    def constrained(self, **changes: Any) -> Instance:
        return replace(self, constraints=replace(self.constraints, **changes))


def instance(
    num_layers: int = 4,
    *,
    slowness: tuple[float, ...] = (1.0, 2.0),
    memory: tuple[int | None, ...] = (None, None),
    kinds: tuple[Literal["cpu", "cuda"], ...] | None = None,
    workload: Workload | None = None,
    latency: float = 2e-5,
    bytes_per_s: float = 1e9,
    omega_seed: int = 0,
    spec: ModelSpec | None = None,
    step: float = 1e-4,
    max_rows: int = FAR,
    attention: float = 2e-10,
    **constraints: Any,
) -> Instance:
    """Devices d0, d1, ... of the given slowness, memory and kinds (CPUs); sensitivities fall with the bits."""
    spec = spec or model(num_layers)
    limits = planner.Constraints(**{"group_size": 32, "gap": 1e-9, "memory_reserve": 0.0, **constraints})
    options = tuple(limits.precision(bits) for bits in (3, 4, 8, 16))
    known = tuple(dict.fromkeys((*options, *spec.stored_layouts)))
    kinds = kinds or ("cpu",) * len(memory)
    devices = tuple(
        Device(f"d{i}", kind, memory_bytes=size) for i, (kind, size) in enumerate(zip(kinds, memory, strict=True))
    )
    links = tuple(Link(a.name, b.name, latency, bytes_per_s) for a, b in itertools.permutations(devices, 2))
    tables = {
        device.name: cost_table(
            spec,
            known,
            device.activations(limits.activations),
            slowness=slow,
            step=step,
            max_rows=max_rows,
            attention=attention,
        )
        for device, slow in zip(devices, slowness, strict=True)
    }
    rng = np.random.default_rng(omega_seed)
    omega = {
        unit: {str(options[i]): float(scale * rng.uniform(0.5, 1.5)) for i, scale in enumerate((4.0, 1.0, 0.01))}
        for unit in spec.units
    }
    return Instance(
        spec,
        Cluster(devices, links),
        workload or Workload(batch_size=4, prompt_len=16, output_len=8),
        Profile(tables, links),
        Sensitivity(spec.name, spec.content_hash, "synthetic", "none", omega),
        limits,
    )


def priced(given: Instance, prices: Sequence[float]) -> Instance:
    """With a price per hour for each device, to be planned for the least cost."""
    devices = tuple(replace(d, price_per_hour=price) for d, price in zip(given.cluster.devices, prices, strict=True))
    return replace(given, cluster=replace(given.cluster, devices=devices)).constrained(objective="cost")


def with_cache_8(given: Instance, ratios: Sequence[float], omega: float, **constraints: Any) -> Instance:
    """With costs of a KV cache of 8 bits: of each device these ratios to 16 bits; and what it loses in all layers."""

    def table(old: CostTable, ratio: float) -> CostTable:
        attention = [row for row in old.rows if row.op.kind == "attention"]
        more = (replace(row, op=replace(row.op, kv_bits=8), seconds=ratio * row.seconds) for row in attention)
        return replace(old, rows=(*old.rows, *more))

    names = [device.name for device in given.cluster.devices]
    tables = {name: table(given.profile.tables[name], ratio) for name, ratio in zip(names, ratios, strict=True)}
    sensitivity = replace(given.sensitivity, omega=given.sensitivity.omega | {KV_CACHE: {"8": omega}})
    wider = replace(given, profile=replace(given.profile, tables=tables), sensitivity=sensitivity)
    return wider.constrained(**constraints)


def random_stored(spec: ModelSpec, rng: np.random.Generator) -> ModelSpec:
    """With some units that the checkpoint stores quantized, each linear in one of two precisions."""
    kinds = (Precision(4, 32, "offset", "gguf"), Precision(8, 32, quantizer="gguf"))
    units = [unit for unit in spec.units if rng.random() < 0.6]
    return replace(spec, stored={unit: {name: kinds[rng.integers(2)] for name in spec.linears(unit)} for unit in units})


def random_kinds(rng: np.random.Generator, layers: int, kinds: int) -> tuple[LayerKind, ...]:
    """Of each layer, in random order: `kinds` windows that differ, or as many as there are layers."""
    windows = [None, *(int(window) for window in rng.choice(np.arange(2, 30), 3, replace=False))]
    chosen = [windows[i] for i in rng.choice(4, min(kinds, layers), replace=False)]
    of_layers = chosen + [chosen[i] for i in rng.integers(len(chosen), size=layers - len(chosen))]
    return tuple(LayerKind(of_layers[i]) for i in rng.permutation(layers))


def random_instance(
    rng: np.random.Generator, *, max_layers: int = 4, max_devices: int = 3, kinds: int = 1, stored: bool = False
) -> Instance:
    """Mostly feasible, often only just: caps around what an even share at 4 to 8 bit needs.

    Layers of several `kinds` differ so much in attention that it matters where they are.
    """
    layers = int(rng.integers(max(1, min(kinds, max_layers)), max_layers + 1))
    devices = int(rng.integers(1, max_devices + 1))
    spec = model(layers, tied_embeddings=bool(rng.integers(2)))
    if kinds > 1:
        spec = replace(spec, layer_kinds=random_kinds(rng, layers, kinds))
    spec = random_stored(spec, rng) if stored else spec
    workload = Workload(int(rng.choice([1, 2, 3, 4, 6])), int(rng.integers(4, 40)), int(rng.integers(1, 30)))
    total = sum(spec.unit_bytes(unit, Precision(8, 32)) for unit in spec.units)
    total += layers * spec.kv_bytes(workload.batch_size * workload.max_length, "float16")
    caps = [None if rng.random() < 0.2 else int(total * rng.uniform(0.3, 2.0)) + 300_000 for _ in range(devices)]
    bits = tuple(sorted(rng.choice([3, 4, 8, 16], size=int(rng.integers(2, 4)), replace=False).tolist()))
    return instance(
        spec=spec,
        slowness=tuple(float(s) for s in rng.uniform(0.5, 4.0, devices)),
        memory=tuple(caps),
        workload=workload,
        latency=float(rng.choice([0, 1e-5, 1e-3])),
        bytes_per_s=float(rng.choice([1e7, 1e10])),
        omega_seed=int(rng.integers(1 << 30)),
        bits=(*bits, NATIVE) if stored else bits,
        theta=float(rng.choice([0.0, 1e-4])),
        all_devices=bool(rng.random() < 0.2),
        attention=2e-10 if kinds == 1 else 2e-8,
    )


def tight(given: Instance, rng: np.random.Generator) -> Instance:
    """With caps that hold the buffers of the largest micro-batches and some of the units, at 16 bits seldom all."""
    costs = Costs.of(given)
    program = costs.program(Configuration((0,), costs.prefill[-1], costs.decode[-1]))
    fixed, units = float(program.memory_fixed[0]), float(program.memory[:, 0].max(axis=1).sum())
    devices = given.cluster.devices
    caps = [int(1.5 * fixed + units * rng.uniform(0.3, 1.2) / len(devices)) for _ in devices]
    capped = tuple(replace(device, memory_bytes=cap) for device, cap in zip(devices, caps, strict=True))
    return replace(given, cluster=replace(given.cluster, devices=capped))


def random_program(rng: np.random.Generator, *, caches: bool = False) -> Program:
    """Arrays without any structure: every unit has costs of its own; with `caches` of two widths also of these."""
    layers, positions, options = int(rng.integers(1, 5)), int(rng.integers(1, 4)), int(rng.integers(2, 4))
    if layers + 2 < positions:
        positions = layers + 2
    shape, links = (layers + 2, positions, options), positions if positions > 1 else 0
    memory = rng.uniform(1, 5, shape) * 1e6
    omega = rng.uniform(0, 1, (layers + 2, options)) * np.linspace(2, 0.1, options)
    program = Program(
        prefill=rng.uniform(0.1, 2, shape),
        decode=rng.uniform(0.01, 0.2, shape),
        prefill_step=rng.uniform(0, 0.2, positions),
        decode_step=rng.uniform(0, 0.02, positions),
        prefill_links=rng.uniform(0, 2, links),
        decode_links=rng.uniform(0, 0.3, links),
        memory=memory,
        memory_fixed=rng.uniform(0, 1e6, positions),
        capacity=np.where(rng.random(positions) < 0.3, math.inf, memory.mean() * (layers + 2) * rng.uniform(0.3, 1.2)),
        shared=rng.choice([0.0, 1e6], options),
        omega=np.broadcast_to(omega[:, None], shape),
        omega_budget=float(rng.choice([math.inf, omega.mean(axis=1).sum(), omega.min(axis=1).sum() * 1.3])),
        theta=float(rng.choice([0.0, 0.5])),
        prefill_microbatches=int(rng.integers(2, 6)),
        decode_rounds=tuple((int(rng.integers(20)), int(rng.integers(1, 5))) for _ in range(rng.integers(1, 4))),
        prefill_longest=1.0 if rng.random() < 0.5 else 1.6,
    )
    narrow = Narrow(
        prefill=rng.uniform(-0.1, 0.1, shape[:2]),
        decode=rng.uniform(-0.01, 0.01, shape[:2]),
        memory=rng.uniform(-1e6, 0, shape[:2]),
        omega=rng.uniform(0, 0.3, shape[:2]),
    )
    return replace(program, narrow=narrow) if caches else program


def assignments(units: int, positions: int, options: int) -> Iterator[Assignment]:
    """All: the first unit first, the last one last, contiguous, none empty, every choice of options."""
    for cuts in itertools.combinations(range(1, units), positions - 1):
        starts = np.zeros(units, dtype=np.int64)
        starts[list(cuts)] = 1
        for chosen in itertools.product(range(options), repeat=units):
            yield Assignment(starts.cumsum(), np.array(chosen))


def brute_force(program: Program) -> float:
    """The least objective of a program, straight from the formula; inf if nothing is feasible."""
    units, positions, options = program.shape
    if (narrow := program.narrow) is not None:

        def of_caches(caches: tuple[int, ...]) -> Program:
            more = {
                name: np.stack(
                    [getattr(program, name)[:, d] + cache * array[:, d, None] for d, cache in enumerate(caches)], axis=1
                )
                for name, array in vars(narrow).items()
            }
            return replace(program, narrow=None, **more)

        return min(brute_force(of_caches(caches)) for caches in itertools.product((0, 1), repeat=positions))
    p, best = program, math.inf
    prefill, decode, memory = p.prefill.tolist(), p.decode.tolist(), p.memory.tolist()
    for assignment in assignments(units, positions, options):
        where, which = assignment.positions.tolist(), assignment.options.tolist()
        if p.allowed is not None and not all(p.allowed[u, where[u], which[u]] for u in range(units)):
            continue
        omega = sum(p.omega[u, where[u], which[u]] for u in range(units))
        if omega > p.omega_budget * (1 + 1e-9):
            continue
        stages = [[u for u in range(units) if where[u] == d] for d in range(positions)]
        used = [sum(memory[u][d][which[u]] for u in stage) + p.memory_fixed[d] for d, stage in enumerate(stages)]
        if positions == 1 and which[0] == which[-1]:
            used[0] -= p.shared[which[0]]
        if any(size > cap * (1 + 1e-9) for size, cap in zip(used, p.capacity)):
            continue
        first = [sum(prefill[u][d][which[u]] for u in stage) + p.prefill_step[d] for d, stage in enumerate(stages)]
        later = [sum(decode[u][d][which[u]] for u in stage) + p.decode_step[d] for d, stage in enumerate(stages)]
        first, later = first + list(p.prefill_links), later + list(p.decode_links)
        ttft = p.prefill_longest * sum(first) + (p.prefill_microbatches - p.prefill_longest) * max(first)
        rest = sum(rounds * max(sum(later), count * max(later)) for rounds, count in p.decode_rounds)
        rounds = sum(rounds for rounds, _ in p.decode_rounds)
        if ttft > p.max_ttft_s * (1 + 1e-9) or rest > p.max_tpot_s * max(rounds, 1) * (1 + 1e-9):
            continue
        best = min(best, ttft + rest + p.theta * omega)
    return best
