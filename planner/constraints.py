"""Constraints: what a plan must keep to, beyond the devices' memory, and how long to look for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmpq.spec import BITS, DEFAULT_ACTIVATIONS, Device, ModelSpec, Precision, Sensitivity, UsageError

BUDGET_BITS = 4  # the default quality budget is the summed sensitivity of this width everywhere


@dataclass(frozen=True)
class Constraints:
    """Which precisions a unit may have, what quality costs, and when the search may stop."""

    bits: tuple[int, ...] = BITS
    group_size: int | None = 32  # of quantized units; None: the whole row
    activations: str = DEFAULT_ACTIVATIONS  # how CPUs multiply quantized units
    min_bits: int = 3
    fixed_bits: int | None = None  # one width for every unit; quality is then not constrained
    all_devices: bool = False  # forbid dropping a device
    theta: float = 0.0  # seconds per unit of omega
    omega_budget: float | None = None  # None: the summed sensitivity of 4 bit everywhere
    time_limit_s: float = 60.0
    gap: float = 1e-3  # relative; a plan this close to the bound is good enough

    @property
    def options(self) -> tuple[Precision, ...]:
        """The precisions a unit may be stored in, fewest bits first. Raises UsageError if there is none."""
        if self.fixed_bits is not None:
            allowed = [self.fixed_bits]
        else:
            allowed = sorted({bits for bits in self.bits if bits >= self.min_bits})
        if not allowed or not set(allowed) <= set(BITS):
            raise UsageError(
                f"no bit width can be chosen: bits {list(self.bits)}, at least {self.min_bits}; "
                f"choose among {', '.join(map(str, BITS))}"
            )
        return tuple(self.precision(bits) for bits in allowed)

    def precision(self, bits: int) -> Precision:
        """How a unit of this width is stored."""
        return Precision(bits) if bits == 16 else Precision(bits, self.group_size)

    def options_on(self, device: Device) -> tuple[Precision, ...]:
        """The same options as this device multiplies them."""
        return tuple(option.on(device.kind, self.activations) for option in self.options)

    def budget(self, spec: ModelSpec, sensitivity: Sensitivity) -> float:
        """The largest summed omega a plan may have; infinite where quality is not constrained."""
        if self.fixed_bits is not None:
            return math.inf
        if self.omega_budget is not None:
            return self.omega_budget
        precision = self.precision(BUDGET_BITS)
        return sum(sensitivity.of(unit, precision) for unit in spec.units)
