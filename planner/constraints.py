"""Constraints: the conditions of a plan beyond the devices' memory, and the limits of the search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from llmpq.spec import (
    BITS,
    DEFAULT_ACTIVATIONS,
    NATIVE,
    W16,
    WIDTHS,
    ActivationMode,
    Device,
    KvBits,
    ModelSpec,
    Native,
    Precision,
    Record,
    Sensitivity,
    UsageError,
    Width,
    ZeroKind,
)
from llmpq.spec.ranges import Count, Index, Range, Seconds
from llmpq.spec.record import check, check_distinct

Limit = Annotated[float, Range(0.0, math.inf)]
Share = Annotated[float, Range(0.0, 1.0)]
BUDGET_BITS = 4  # the default quality budget is the summed sensitivity of this width everywhere


@dataclass(frozen=True)
class DeviceLimit(Record):
    """Devices that may not all be used together: the weights of those in use sum to at most `limit`."""

    weights: Mapping[str, Annotated[float, Range(0.0, 1e9)]]  # of devices; 0 for those that are missing
    limit: float

    def weight(self, device: str) -> float:
        return self.weights.get(device, 0.0)

    def allows(self, devices: Iterable[str]) -> bool:
        """Whether these may be used together; a sum may exceed the limit by its rounding error."""
        return sum(map(self.weight, devices)) <= self.limit * (1 + 1e-9)


@dataclass(frozen=True)
class Constraints(Record):
    """Which precisions a unit may have, what quality costs, and when the search may stop."""

    bits: tuple[Width, ...] = WIDTHS
    group_size: int | None = 32  # of quantized units; None: the whole row
    per_linear: bool = False  # layers may also have a linear or some wider than the others; see planner/mixed.py
    quantizer: Literal["rtn", "gptq"] = "rtn"  # gptq reads a text before; its zero points are integers
    activations: ActivationMode = DEFAULT_ACTIVATIONS  # how CPUs multiply quantized units
    kv_bits: tuple[KvBits, ...] = (16,)  # that the KV cache of a stage may have
    min_bits: Index = 3  # of units that are not native
    fixed_bits: Width | None = None  # one width for every unit; quality is then not constrained
    all_devices: bool = False  # forbid dropping a device
    required: tuple[str, ...] = ()  # devices that must not be dropped
    excluded: tuple[str, ...] = ()  # devices that must not be used
    at_most: tuple[DeviceLimit, ...] = ()  # devices that must not all be used together
    pinned: Mapping[str, str] = field(default_factory=dict)  # unit -> the device it must be on
    unit_bits: Mapping[str, Width] = field(default_factory=dict)  # unit -> its width
    prefill_microbatch: Count | None = None  # sequences; None: whatever is best
    decode_microbatch: Count | None = None
    max_ttft_s: Limit = math.inf  # until every sequence of a batch has its first token
    max_tpot_s: Limit = math.inf  # from one token of a sequence to its next
    objective: Literal["time", "cost"] = "time"  # of a batch; cost is what the devices in use cost for that time
    theta: Annotated[float, Range(0.0, 1e9)] = 0.0  # seconds per unit of omega
    omega_budget: Limit | None = None  # None: the summed sensitivity of 4 bit everywhere
    memory_reserve: Share = 0.03  # of each cap, left free: predictions of peak memory have been up to 2 % short
    time_limit_s: Seconds = 60.0
    gap: Share = 1e-3  # relative; a plan this close to the bound is good enough

    def validate(self) -> None:
        check(len(self.kv_bits) > 0, "kv_bits", "is empty; the KV cache may have 16 or 8")
        check_distinct(self.kv_bits, "kv_bits")

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What units may be quantized to, fewest bits first."""
        bits = {width for width in self._widths if isinstance(width, int)}
        return tuple(map(self.precision, sorted(bits)))

    @property
    def _widths(self) -> tuple[Width, ...]:
        if self.fixed_bits is not None:
            return (self.fixed_bits,)
        return tuple(width for width in self.bits if isinstance(width, Native) or width >= self.min_bits)

    def options(self, spec: ModelSpec) -> tuple[Native | Precision, ...]:
        """`precisions`, then native if it is allowed and any unit can be (ModelSpec.stored); UsageError if none is."""
        native = (NATIVE,) if NATIVE in self._widths and spec.stored else ()
        if not (self.precisions or native) or not set(self._widths) <= set(WIDTHS):
            raise UsageError(
                f"no bit width can be chosen: bits {', '.join(map(str, self.bits))}, at least {self.min_bits}; "
                f"choose among {', '.join(map(str, BITS))}"
            )
        return (*self.precisions, *native)

    def precision(self, bits: int) -> Precision:
        """How a unit of this many bits is stored."""
        if bits == 16:
            return W16
        return Precision(bits, self.group_size, self.zero, self.quantizer)

    @property
    def zero(self) -> ZeroKind:
        """The kind of zero of quantized units."""
        return "sym" if self.quantizer == "rtn" else "asym"

    def option(self, width: Width) -> Native | Precision:
        """How a unit of this width is stored."""
        return self.precision(width) if isinstance(width, int) else width

    def check(self, spec: ModelSpec, devices: Collection[str], batch_size: int) -> None:
        """Raise UsageError for an unknown unit, device, width or size, and for constraints that exclude each other."""
        for phase, size in (("prefill", self.prefill_microbatch), ("decode", self.decode_microbatch)):
            if size is not None and size > batch_size:
                raise UsageError(
                    f"micro-batches of {size} sequences are asked for in {phase}, of a batch of {batch_size}; "
                    f"choose 1 to {batch_size}"
                )
        for unit in (*self.pinned, *self.unit_bits):
            if unit not in spec.units:
                raise UsageError(
                    f"{unit!r} is no unit of {spec.name}; there are embedding, layer.0 to layer.{spec.num_layers - 1} "
                    "and head"
                )
        for device in (*self.named, *(name for rule in self.at_most for name in rule.weights)):
            if device not in devices:
                raise UsageError(f"there is no device {device!r}; there are {', '.join(devices)}")
        for unit, width in self.unit_bits.items():
            if width not in [option.width for option in self.options(spec)]:
                raise UsageError(f"{unit} is to {_have(width)}, which no unit may have; allow that width")
        if set(devices) <= set(self.excluded):
            raise UsageError(f"all devices are excluded: {', '.join(self.excluded)}; keep one at least")
        for device in self.excluded:
            if self.must_use(device):
                raise UsageError(f"device {device!r} is to be used and not to be used; drop one of both")
        must = [device for device in devices if self.must_use(device)]
        for rule in self.at_most:
            if not rule.allows(must):
                raise UsageError(
                    f"not all of {', '.join(must)} may be used together: they weigh {sum(map(rule.weight, must)):g} "
                    f"of {rule.limit:g}; ask for fewer"
                )

    def easier(self) -> list[tuple[str, Constraints]]:
        """These constraints without one kind of them, and the name of that kind."""
        changes: list[tuple[str, dict[str, Any]]] = [
            ("the limits of latency", {"max_ttft_s": math.inf, "max_tpot_s": math.inf}),
            ("the sizes of micro-batches", {"prefill_microbatch": None, "decode_microbatch": None}),
            ("what units are pinned to", {"pinned": {}, "unit_bits": {}}),
            ("which devices are to be used", {"required": (), "excluded": ()}),
        ]
        return [(what, replace(self, **change)) for what, change in changes if replace(self, **change) != self]

    @property
    def named(self) -> frozenset[str]:
        """Devices that a constraint names, and so are identical to no other."""
        return frozenset((*self.required, *self.excluded, *self.pinned.values()))

    def must_use(self, device: str) -> bool:
        return self.all_devices or device in self.required or device in self.pinned.values()

    def together(self, devices: Collection[str]) -> bool:
        """Whether these devices may all be used."""
        return all(rule.allows(devices) for rule in self.at_most)

    def most_together(self, devices: Collection[str]) -> int:
        """No more of these devices may all be used."""
        most = len(devices)
        for rule in self.at_most:
            lightest = itertools.accumulate(sorted(map(rule.weight, devices)))
            most = min(most, sum(weight <= rule.limit * (1 + 1e-9) for weight in lightest))
        return most

    def room(self, device: Device) -> float:
        """Bytes of this device that a plan may use; infinite without a cap."""
        return math.inf if device.memory_bytes is None else device.memory_bytes * (1 - self.memory_reserve)

    def budget(self, spec: ModelSpec, sensitivity: Sensitivity) -> float:
        """The largest summed omega a plan may have; infinite where quality is not constrained."""
        if self.fixed_bits is not None:
            return math.inf
        if self.omega_budget is not None:
            return self.omega_budget
        precision = self.precision(BUDGET_BITS)
        return sum(sensitivity.of(unit, precision) for unit in spec.units)


def _have(width: Width) -> str:
    return f"have {width} bits" if isinstance(width, int) else f"be {width}"
