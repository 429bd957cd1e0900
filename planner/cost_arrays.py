"""From specifications to arrays: what each unit costs on each device in each option, for each micro-batch size.

`Costs.of` asks the profile once; `Costs.program` picks what one choice of device order and micro-batch sizes needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llmpq.spec import (
    DTYPE_BYTES,
    Cluster,
    CostTable,
    ModelSpec,
    NotMeasuredError,
    Op,
    Precision,
    Profile,
    UsageError,
    Workload,
    unit_ops,
)
from planner import memory
from planner.constraints import Constraints
from planner.lengths import Steps, decode_steps, largest_step, prefill_steps
from planner.objective import BoolArray, FloatArray, Program
from planner.problem import Problem
from planner.solver.orders import device_kinds

TOKEN_BYTES = 8  # of one sampled token on its way back
HOUR_S = 3600.0
MILLION = 1e6  # tokens that a cost is given for


@dataclass(frozen=True)
class Phase(Steps):
    """The steps of one phase, and the seconds of one of them on every device of the cluster."""

    units: FloatArray  # [units, devices, options]
    step: FloatArray  # [devices]
    message: FloatArray  # [devices] besides, for a stage that is not alone

    def fixed(self, devices: Sequence[int], *, alone: bool) -> FloatArray:
        """[of devices] Seconds that a stage spends on a step however many units it has."""
        at = list(devices)
        return self.step[at] if alone else self.step[at] + self.message[at]


@dataclass(frozen=True)
class Configuration:
    """What is decided outside the integer program: devices in pipeline order, and both micro-batch sizes."""

    order: tuple[int, ...]
    prefill: Phase
    decode: Phase


@dataclass(frozen=True)
class Costs:
    """All that the search needs to know, as arrays over units, devices and options."""

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    profile: Profile
    constraints: Constraints
    options: tuple[Precision, ...]  # as stored
    omega: FloatArray  # [units, options]
    omega_budget: float
    memory: FloatArray  # [units, devices, options] bytes
    prefill: tuple[Phase, ...]
    decode: tuple[Phase, ...]

    @classmethod
    def of(cls, problem: Problem) -> Costs:
        """Raises NotMeasuredError if no micro-batch size has measured costs, UsageError for missing sensitivities."""
        spec, cluster, workload = problem.spec, problem.cluster, problem.workload
        profile, sensitivity, constraints = problem.profile, problem.sensitivity, problem.constraints
        constraints.check(spec, [device.name for device in cluster.devices], workload.batch_size)
        options = constraints.options
        if constraints.objective == "cost":
            _check_prices(cluster, constraints)
        precisions = [constraints.options_on(device) for device in cluster.devices]
        slots, length = workload.batch_size, workload.max_length

        def prefill(size: int) -> Phase:
            return _phase(spec, cluster, profile, precisions, prefill_steps(workload, size))

        def decode(size: int) -> Phase:
            return _phase(spec, cluster, profile, precisions, decode_steps(workload, size))

        def sizes(pinned: int | None) -> list[int]:
            return microbatch_sizes(workload.batch_size, len(cluster.devices)) if pinned is None else [pinned]

        return cls(
            spec=spec,
            cluster=cluster,
            workload=workload,
            profile=profile,
            constraints=constraints,
            options=options,
            omega=np.array([[sensitivity.of(unit, option) for option in options] for unit in spec.units]),
            omega_budget=constraints.budget(spec, sensitivity),
            memory=_per_unit(
                spec,
                [
                    [
                        [memory.unit_bytes(spec, unit, option, device, slots, length) for option in options]
                        for device in cluster.devices
                    ]
                    for unit in _KINDS
                ],
            ),
            prefill=_measured(prefill, sizes(constraints.prefill_microbatch)),
            decode=_measured(decode, sizes(constraints.decode_microbatch)),
        )

    @cached_property
    def kinds(self) -> dict[int, int]:
        """For each device that may be used the first one that is identical to it."""
        return device_kinds(self.cluster, self.profile, self.constraints)

    @cached_property
    def rounds(self) -> float:
        """Of decode, for a batch."""
        return self.workload.rounds

    @cached_property
    def output_tokens(self) -> float:
        """That a batch generates."""
        return self.workload.output_tokens

    @cached_property
    def required(self) -> frozenset[int]:
        """Devices that must be used."""
        devices = self.cluster.devices
        return frozenset(d for d, device in enumerate(devices) if self.constraints.must_use(device.name))

    @cached_property
    def allowed(self) -> BoolArray | None:
        """[units, devices, options] as far as units are pinned to a device or a width; None if none is."""
        constraints = self.constraints
        if not constraints.pinned and not constraints.unit_bits:
            return None
        allowed = np.ones((len(self.spec.units), len(self.cluster.devices), len(self.options)), dtype=bool)
        for u, unit in enumerate(self.spec.units):
            if unit in constraints.pinned:
                names = [device.name for device in self.cluster.devices]
                allowed[u, np.array(names) != constraints.pinned[unit]] = False
            if unit in constraints.unit_bits:
                widths = [option.bits for option in self.options]
                allowed[u, :, np.array(widths) != constraints.unit_bits[unit]] = False
        return allowed

    def per_second(self, devices: Sequence[int]) -> float:
        """What a second of a batch on these devices is worth: itself, or their price for a million tokens."""
        if self.constraints.objective == "time":
            return 1.0
        per_hour = sum(self.cluster.devices[d].price_per_hour for d in devices)
        return per_hour / HOUR_S * MILLION / self.output_tokens

    def program(self, choice: Configuration) -> Program:
        """The arrays of one choice, devices in its order."""
        order, alone = list(choice.order), len(choice.order) == 1
        devices = [self.cluster.devices[d] for d in order]
        caps = [math.inf if device.memory_bytes is None else float(device.memory_bytes) for device in devices]
        wire = memory.wire_dtype(devices, self.spec)
        tokens, rows = largest_step(choice.prefill, choice.decode)
        fixed = [
            memory.fixed_bytes(
                self.spec,
                device,
                tokens=tokens,
                rows=rows,
                holds_head=i == len(devices) - 1,
                wire=wire,
                wires=memory.neighbours(i, len(devices)),
                overhead=self.profile.table(device.name).overhead_bytes,
            )
            for i, device in enumerate(devices)
        ]
        return Program(
            prefill=choice.prefill.units[:, order],
            decode=choice.decode.units[:, order],
            prefill_step=choice.prefill.fixed(order, alone=alone),
            decode_step=choice.decode.fixed(order, alone=alone),
            prefill_links=self.links(choice.order, choice.prefill),
            decode_links=self.links(choice.order, choice.decode),
            memory=self.memory[:, order],
            memory_fixed=np.array(fixed, dtype=float),
            capacity=np.array(caps),
            shared=np.array([memory.shared_bytes(self.spec, option) for option in self.options], dtype=float),
            omega=self.omega,
            omega_budget=self.omega_budget,
            theta=self.constraints.theta,
            prefill_microbatches=choice.prefill.count,
            prefill_longest=choice.prefill.longest,
            decode_rounds=choice.decode.rounds,
            allowed=None if self.allowed is None else self.allowed[:, order],
            max_ttft_s=self.constraints.max_ttft_s,
            max_tpot_s=self.constraints.max_tpot_s,
            per_second=self.per_second(order),
        )

    def links(self, order: Sequence[int], phase: Phase) -> FloatArray:
        """Seconds of each link for one micro-batch, the tokens' way back last; none for one device."""
        if len(order) == 1:
            return np.zeros(0)
        devices = [self.cluster.devices[d] for d in order]
        wire = DTYPE_BYTES[memory.wire_dtype(devices, self.spec)]
        sizes = [phase.tokens * self.spec.hidden_size * wire] * (len(devices) - 1) + [phase.rows * TOKEN_BYTES]
        ends = zip(devices, [*devices[1:], devices[0]], sizes)
        return np.array([self.profile.link(a.name, b.name).seconds(size) for a, b, size in ends])


def _check_prices(cluster: Cluster, constraints: Constraints) -> None:
    """A device without a price would make every plan on it alone the cheapest, however slow."""
    usable = [device for device in cluster.devices if device.name not in constraints.excluded]
    if free := [device.name for device in usable if device.price_per_hour == 0]:
        raise UsageError(
            f"the objective is cost, but {', '.join(free)} ha{'s' if len(free) == 1 else 've'} no price; give each "
            "device price=PER_HOUR, or exclude it"
        )


def microbatch_sizes(batch_size: int, max_stages: int) -> list[int]:
    """Divisors of the batch, powers of two and one micro-batch a stage; the smallest size for each count of them."""
    sizes = {size for size in range(1, batch_size + 1) if batch_size % size == 0}
    sizes |= {2**i for i in range(batch_size.bit_length())}
    sizes |= {-(-batch_size // stages) for stages in range(1, max_stages + 1)}
    counts = {-(-batch_size // size) for size in sizes}
    return sorted(-(-batch_size // count) for count in counts)


_KINDS = ("embedding", "layer.0", "head")  # units that differ in cost


def _per_unit(spec: ModelSpec, kinds: Sequence[object]) -> FloatArray:
    """Costs of the three kinds of unit, repeated for every layer: [units, devices, options]."""
    return np.repeat(np.array(kinds, dtype=float), [1, spec.num_layers, 1], axis=0)


def _phase(
    spec: ModelSpec,
    cluster: Cluster,
    profile: Profile,
    precisions: Sequence[Sequence[Precision]],
    steps: Steps,
) -> Phase:
    """Costs of such steps, at `precisions` [devices, options]."""
    tables = [profile.table(device.name) for device in cluster.devices]

    def seconds(table: CostTable, unit: str, precision: Precision) -> float:
        """In proportion between those of the whole numbers of tokens and sequences on either side."""

        def of_whole(tokens: int, rows: int) -> float:
            return sum(table.seconds(op) for op in unit_ops(spec, unit, precision, tokens, rows, steps.context))

        fewer = of_whole(math.floor(steps.tokens), math.floor(steps.rows))
        beyond = steps.tokens % 1
        return fewer + (beyond and beyond * (of_whole(math.ceil(steps.tokens), math.ceil(steps.rows)) - fewer))

    kinds = [
        [[seconds(table, unit, p) for p in of_device] for table, of_device in zip(tables, precisions, strict=True)]
        for unit in _KINDS
    ]
    return Phase(
        **vars(steps),
        units=_per_unit(spec, kinds),
        step=np.array([table.seconds(Op("step")) for table in tables]),
        message=np.array([table.message_s for table in tables]),
    )


def _measured(phase: Callable[[int], Phase], sizes: Sequence[int]) -> tuple[Phase, ...]:
    """The phase at every size whose costs are known. Raises NotMeasuredError if there is none."""
    known, missing = [], None
    for size in sizes:
        try:
            known.append(phase(size))
        except NotMeasuredError as error:
            missing = missing or error
    if missing is not None and not known:
        raise missing
    return tuple(known)
