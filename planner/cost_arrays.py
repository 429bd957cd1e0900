"""From specifications to arrays: the costs of each unit on each device in each option, for each micro-batch size.

`Costs.of` reads the profile once; `Costs.program` selects the arrays of one device order and its micro-batch sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np

from llmpq.spec import (
    DTYPE_BYTES,
    NATIVE,
    W16,
    Cluster,
    Device,
    KvBits,
    ModelSpec,
    Profile,
    UnitPrecision,
    UsageError,
    Workload,
)
from llmpq.spec.formatting import format_width
from planner import memory
from planner.constraints import Constraints
from planner.lengths import decode_steps, largest_step, microbatch_sizes, prefill_steps
from planner.memory import CacheSize, StageBuffers
from planner.mixed import options_of
from planner.objective import BoolArray, FloatArray, IntArray, Narrow, Program
from planner.problem import Problem
from planner.solver.orders import Order, device_kinds, device_orders
from planner.step_costs import StepCosts, costs_of, measured, offered, per_unit, without_gaps

TOKEN_BYTES = 8  # of one sampled token on its way back
HOUR_S = 3600.0
MILLION = 1e6  # tokens that a cost is given for


@dataclass(frozen=True)
class Configuration:
    """The decisions outside the integer program: devices in pipeline order, and both micro-batch sizes."""

    order: tuple[int, ...]
    prefill: StepCosts
    decode: StepCosts


@dataclass(frozen=True)
class Costs:
    """All inputs of the search, as arrays over units, devices and options.

    Over KV caches of one width; where a stage may have another one, with what that changes, whatever the option.
    """

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    profile: Profile
    constraints: Constraints
    options: tuple[UnitPrecision, ...]
    kv_bits: tuple[KvBits, ...]  # the width, or two, the wider one first
    omega: FloatArray  # [units, options] with that of the KV cache
    narrow_omega: FloatArray  # [units] more with the narrower cache; 0 if there is one width, as `narrow_memory`
    omega_budget: float
    memory: FloatArray  # [units, devices, options] bytes
    narrow_memory: FloatArray  # [units, devices] bytes more, so mostly below 0
    lacking: BoolArray  # [units, devices, options] where the device cannot: it has no costs of that width
    prefill: tuple[StepCosts, ...]
    decode: tuple[StepCosts, ...]

    @classmethod
    def of(cls, problem: Problem, options: tuple[UnitPrecision, ...] | None = None) -> Costs:
        """`options` are those of the problem, if no others are given.

        Raises NotMeasuredError if no micro-batch size has measured costs, UsageError for missing sensitivities.
        """
        spec, cluster, workload = problem.spec, problem.cluster, problem.workload
        profile, sensitivity, constraints = problem.profile, problem.sensitivity, problem.constraints
        constraints.check(spec, [device.name for device in cluster.devices], workload.batch_size)
        options = options or options_of(problem)
        kv_bits = tuple(sorted(constraints.kv_bits, reverse=True))
        if constraints.objective == "cost":
            _check_prices(cluster, constraints)
        modes = [device.activations(constraints.activations) for device in cluster.devices]
        cache = CacheSize.of(workload)

        def prefill(size: int) -> StepCosts:
            return costs_of(spec, cluster, profile, options, modes, prefill_steps(workload, size), kv_bits)

        def decode(size: int) -> StepCosts:
            return costs_of(spec, cluster, profile, options, modes, decode_steps(workload, size), kv_bits)

        def sizes(pinned: int | None) -> list[int]:
            return microbatch_sizes(workload.batch_size, len(cluster.devices)) if pinned is None else [pinned]

        prefills = measured(prefill, sizes(constraints.prefill_microbatch))
        decodes = measured(decode, sizes(constraints.decode_microbatch))
        return cls(
            spec=spec,
            cluster=cluster,
            workload=workload,
            profile=profile,
            constraints=constraints,
            options=options,
            kv_bits=kv_bits,
            omega=np.array(
                [
                    [sensitivity.of(u, option) + sensitivity.of_cache(spec, u, kv_bits[0]) for option in of_unit]
                    for u, of_unit in ((unit, offered(spec, unit, options)) for unit in spec.units)
                ]
            ),
            narrow_omega=np.array(
                [
                    sensitivity.of_cache(spec, unit, kv_bits[-1]) - sensitivity.of_cache(spec, unit, kv_bits[0])
                    for unit in spec.units
                ]
            ),
            omega_budget=constraints.budget(spec, sensitivity),
            memory=per_unit(
                spec,
                [
                    [
                        [
                            memory.unit_bytes(spec, unit, option, device, cache, kv_bits[0])
                            for option in offered(spec, unit, options)
                        ]
                        for device in cluster.devices
                    ]
                    for unit in spec.distinct_units
                ],
            ),
            narrow_memory=memory_of_narrow(spec, cluster, cache, kv_bits),
            lacking=np.isnan(prefills[0].units),
            prefill=tuple(map(without_gaps, prefills)),
            decode=tuple(map(without_gaps, decodes)),
        )

    @cached_property
    def least_memory(self) -> FloatArray:
        """[units, devices] Bytes in the smallest option and cache."""
        least: FloatArray = self.memory.min(axis=2) + np.minimum(self.narrow_memory, 0.0)
        return least

    @cached_property
    def kinds(self) -> dict[int, int]:
        """For each device that may be used the first one that is identical to it."""
        return device_kinds(self.cluster, self.profile, self.constraints)

    @cached_property
    def groups(self) -> IntArray:
        """[layers] The group of each layer; layers of one group have the same costs."""
        return np.array(self.spec.layer_groups, dtype=np.int64)

    @cached_property
    def group_sizes(self) -> IntArray:
        """[groups] layers"""
        return np.bincount(self.groups)

    @cached_property
    def group_units(self) -> IntArray:
        """[groups] The unit that is the first layer of the group."""
        return 1 + np.unique(self.groups, return_index=True)[1]

    @cached_property
    def shared(self) -> FloatArray:
        """[options] Bytes saved if embedding and head are on one stage in one option."""
        options = offered(self.spec, "embedding", self.options)
        return np.array([memory.shared_bytes(self.spec, option) for option in options], dtype=float)

    @cached_property
    def bits(self) -> list[int]:
        """[options] Bits of a weight, on average over the units that can have it, rounded."""
        spec = self.spec
        units = [list(spec.stored) if option == NATIVE else [spec.units[1]] for option in self.options]
        return [round(fmean(spec.bits(u, option) for u in of)) for of, option in zip(units, self.options)]

    @cached_property
    def required(self) -> frozenset[int]:
        """Devices that must be used."""
        devices = self.cluster.devices
        return frozenset(d for d, device in enumerate(devices) if self.constraints.must_use(device.name))

    @cached_property
    def allowed(self) -> BoolArray | None:
        """[units, devices, options] that constraints, units and devices allow; None: all."""
        constraints = self.constraints
        # Where nothing is stored so, native is 16 bits by another name.
        twice = NATIVE in self.options and W16 in self.options
        never_native = {unit for unit in self.spec.units if unit not in self.spec.stored} if twice else set()
        if not (constraints.pinned or constraints.unit_bits or never_native or self.lacking.any()):
            return None
        widths = np.array([option.width for option in self.options], dtype=object)
        allowed = ~self.lacking
        for u, unit in enumerate(self.spec.units):
            if unit in constraints.pinned:
                names = [device.name for device in self.cluster.devices]
                allowed[u, np.array(names) != constraints.pinned[unit]] = False
            if unit in constraints.unit_bits:
                allowed[u, :, widths != constraints.unit_bits[unit]] = False
            elif unit in never_native:
                allowed[u, :, self.options.index(NATIVE)] = False
        return allowed

    @cached_property
    def lacking_words(self) -> str:
        """Which devices cannot have which widths, after a semicolon; "" if all can have all."""
        cannot = [
            f"{device.name} cannot have {', '.join(format_width(option.width) for option in lacked)}"
            for d, device in enumerate(self.cluster.devices)
            if (lacked := [option for o, option in enumerate(self.options) if self.lacking[:, d, o].any()])
        ]
        return f"; {'; '.join(cannot)}, as there are no costs of it" if cannot else ""

    @cached_property
    def link_costs(self) -> tuple[FloatArray, FloatArray]:
        """[devices, devices] Latency, and seconds of a byte; infinite latency where none may be used."""
        devices, count = self.cluster.devices, len(self.cluster.devices)
        latency_s, byte_s = np.full((count, count), math.inf), np.zeros((count, count))
        for a, b in itertools.permutations(self.kinds, 2):
            link = self.profile.link(devices[a].name, devices[b].name)
            latency_s[a, b], byte_s[a, b] = link.latency_s, 1 / link.bytes_per_s
        return latency_s, byte_s

    def orders(self, max_stages: int | None = None) -> Iterator[Order]:
        """Devices in order that may be used, of at most so many stages: see `device_orders`."""
        names = [device.name for device in self.cluster.devices]
        together = self.constraints.most_together([names[d] for d in self.kinds])
        return device_orders(
            self.kinds,
            required=self.required,
            max_stages=min(max_stages or self.spec.num_layers + 2, together),
            together=lambda order: self.constraints.together([names[d] for d in order]),
        )

    def room(self, device: int) -> float:
        """Bytes of a device that a plan may use; infinite without a cap."""
        return self.constraints.room(self.cluster.devices[device])

    @property
    def least_devices(self) -> int:
        """No fewer devices hold the model, even with all its units in their smallest options."""
        rooms = sorted(map(self.room, self.kinds), reverse=True)
        needed = float(self.least_memory.min(axis=1).sum() - self.shared.max())
        return 1 + sum(1 for held in itertools.accumulate(rooms[:-1]) if held < needed)

    def per_second(self, devices: Sequence[int]) -> float:
        """The objective's factor for a second of a batch on these devices: 1, or their price for a million tokens."""
        if self.constraints.objective == "time":
            return 1.0
        per_hour = sum(self.cluster.devices[d].price_per_hour for d in devices)
        return per_hour / HOUR_S * MILLION / self.workload.output_tokens

    def buffer_bytes(self, device: int, buffers: StageBuffers) -> int:
        """Memory of a stage on this device beside its units: buffers, and overhead."""
        of_stage = self.cluster.devices[device]
        table = self.profile.table(of_stage.name)
        return buffers.size(self.spec, of_stage, table.attention_backend) + table.overhead_bytes

    def program(self, choice: Configuration) -> Program:
        """The arrays of one choice, devices in its order."""
        order, alone = list(choice.order), len(choice.order) == 1
        devices = [self.cluster.devices[d] for d in order]
        wire, step = memory.wire_dtype(devices, self.spec), largest_step(choice.prefill, choice.decode)
        buffers = StageBuffers.of_pipeline(len(devices), wire, step, CacheSize.of(self.workload))
        fixed = [self.buffer_bytes(d, of_stage) for d, of_stage in zip(order, buffers, strict=True)]
        return Program(
            prefill=choice.prefill.units[:, order],
            decode=choice.decode.units[:, order],
            prefill_step=choice.prefill.fixed(order, alone=alone),
            decode_step=choice.decode.fixed(order, alone=alone),
            prefill_links=self.links(choice.order, choice.prefill),
            decode_links=self.links(choice.order, choice.decode),
            memory=self.memory[:, order],
            memory_fixed=np.array(fixed, dtype=float),
            capacity=np.array([self.constraints.room(device) for device in devices]),
            shared=self.shared,
            omega=np.broadcast_to(self.omega[:, None], (len(self.omega), len(order), len(self.options))),
            omega_budget=self.omega_budget,
            theta=self.constraints.theta,
            prefill_microbatches=choice.prefill.count,
            prefill_longest=choice.prefill.longest,
            decode_rounds=choice.decode.rounds,
            allowed=None if self.allowed is None else self.allowed[:, order],
            max_ttft_s=self.constraints.max_ttft_s,
            max_tpot_s=self.constraints.max_tpot_s,
            per_second=self.per_second(order),
            narrow=self._narrow(choice) if len(self.kv_bits) > 1 else None,
        )

    def _narrow(self, choice: Configuration) -> Narrow:
        order = list(choice.order)
        return Narrow(
            prefill=choice.prefill.narrow[:, order],
            decode=choice.decode.narrow[:, order],
            memory=self.narrow_memory[:, order],
            omega=np.broadcast_to(self.narrow_omega[:, None], (len(self.narrow_omega), len(order))),
        )

    def links(self, order: Sequence[int], phase: StepCosts) -> FloatArray:
        """Seconds of each link for one micro-batch, the tokens' way back last; none for one device."""
        if len(order) == 1:
            return np.zeros(0)
        devices = [self.cluster.devices[d] for d in order]
        wire = DTYPE_BYTES[memory.wire_dtype(devices, self.spec)]
        sizes = [phase.tokens * self.spec.hidden_size * wire] * (len(devices) - 1) + [phase.rows * TOKEN_BYTES]
        ends = zip(devices, [*devices[1:], devices[0]], sizes)
        return np.array([self.profile.link(a.name, b.name).seconds(size) for a, b, size in ends])


def memory_of_narrow(spec: ModelSpec, cluster: Cluster, cache: CacheSize, kv_bits: Sequence[KvBits]) -> FloatArray:
    """[units, devices] Bytes that a unit takes more over a KV cache of the last of these widths than of the first."""

    def more(unit: str, device: Device) -> int:
        wide, narrow = (memory.unit_bytes(spec, unit, W16, device, cache, bits) for bits in (kv_bits[0], kv_bits[-1]))
        return narrow - wide

    return per_unit(spec, [[more(unit, device) for device in cluster.devices] for unit in spec.distinct_units])


def _check_prices(cluster: Cluster, constraints: Constraints) -> None:
    """A device without a price would make every plan on it alone the cheapest, however slow."""
    usable = [device for device in cluster.devices if device.name not in constraints.excluded]
    if free := [device.name for device in usable if device.price_per_hour == 0]:
        raise UsageError(
            f"the objective is cost, but {', '.join(free)} ha{'s' if len(free) == 1 else 've'} no price; give each "
            "device price=PER_HOUR, or exclude it"
        )
