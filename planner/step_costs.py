"""The seconds of a step of one phase: of each unit on each device in each option, from the profile's tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmpq.spec import (
    NATIVE,
    W16,
    ActivationMode,
    Cluster,
    CostTable,
    KvBits,
    Mixed,
    ModelSpec,
    NotMeasuredError,
    Op,
    Precision,
    Profile,
    UnitPrecision,
    unit_ops,
)
from planner.lengths import Steps
from planner.objective import FloatArray


@dataclass(frozen=True)
class StepCosts(Steps):
    """The steps of one phase, and the seconds of one of them on every device of the cluster."""

    units: FloatArray  # [units, devices, options]; where the device cannot, any finite number, which nothing chooses
    narrow: FloatArray  # [units, devices] more over the narrower of two KV caches; 0 if there is one
    step: FloatArray  # [devices]
    message: FloatArray  # [devices] also, for a stage that is not alone

    def fixed(self, devices: Sequence[int], *, alone: bool) -> FloatArray:
        """[of devices] Seconds of a step that do not depend on the units of the stage."""
        at = list(devices)
        return self.step[at] if alone else self.step[at] + self.message[at]


def per_unit(spec: ModelSpec, distinct: Sequence[object] | FloatArray) -> FloatArray:
    """Costs of the distinct units, repeated for every unit: [units, devices, options], or without options."""
    layers = [1 + group for group in spec.layer_groups]
    each: FloatArray = np.array(distinct, dtype=float)[[0, *layers, -1]]
    return each


def offered(spec: ModelSpec, unit: str, options: Sequence[UnitPrecision]) -> list[UnitPrecision]:
    """The options of one unit. For a table, a mixed one stands for its widest precision: native, if that is one."""

    def of_unit(option: UnitPrecision) -> UnitPrecision:
        if isinstance(option, Mixed) and unit in ("embedding", "head"):
            made = [precision for _, precision in option.linears if isinstance(precision, Precision)]
            return NATIVE if len(made) < len(option.linears) else max(made, key=lambda precision: precision.bits)
        return option

    return list(map(of_unit, options))


def costs_of(
    spec: ModelSpec,
    cluster: Cluster,
    profile: Profile,
    options: Sequence[UnitPrecision],
    modes: Sequence[ActivationMode],
    steps: Steps,
    kv_bits: tuple[KvBits, ...] = (16,),
) -> StepCosts:
    """Costs of such steps, on devices that multiply in `modes`; NaN where one cannot.

    Over KV caches of the first of `kv_bits`; if there is a second one, with what that changes.
    """
    tables = [profile.table(device.name) for device in cluster.devices]
    units = spec.distinct_units

    @functools.cache
    def ops(
        unit: str, option: UnitPrecision, mode: ActivationMode, bits: KvBits, whole: Callable[[float], int]
    ) -> list[Op]:
        return unit_ops(spec, unit, option, mode, whole(steps.tokens), whole(steps.rows), steps.context, bits)

    def between(of_whole: Callable[[Callable[[float], int]], float]) -> float:
        """Interpolated between the whole numbers of tokens and sequences on either side."""
        fewer = of_whole(math.floor)
        if steps.tokens % 1 == 0:
            return fewer
        more = of_whole(math.ceil)
        return fewer + steps.tokens % 1 * (more - fewer)

    def seconds(table: CostTable, mode: ActivationMode, unit: str, option: UnitPrecision) -> float:
        def of_whole(whole: Callable[[float], int]) -> float:
            needed = ops(unit, option, mode, kv_bits[0], whole)
            return math.nan if any(map(table.lacks, needed)) else sum(map(table.seconds, needed))

        return between(of_whole)

    def more_seconds(table: CostTable, mode: ActivationMode, unit: str) -> float:
        """Over the narrower cache, whatever the option: attention alone differs."""

        def of_whole(whole: Callable[[float], int]) -> float:
            wide, *narrower = (ops(unit, W16, mode, bits, whole) for bits in kv_bits)
            pairs = (pair for narrow in narrower for pair in zip(wide, narrow, strict=True))
            return sum(table.seconds(narrow) - table.seconds(wide) for wide, narrow in pairs if wide != narrow)

        return between(of_whole)

    def column(table: CostTable, mode: ActivationMode) -> FloatArray:
        """[distinct units, options, and last what a narrower cache changes] of one device."""
        each = ((unit, offered(spec, unit, options)) for unit in units)
        return np.array(
            [
                [*(seconds(table, mode, unit, option) for option in of_unit), more_seconds(table, mode, unit)]
                for unit, of_unit in each
            ]
        )

    kinds = [(id(table.rows), mode) for table, mode in zip(tables, modes, strict=True)]
    columns = {kind: column(*of_kind) for kind, of_kind in dict(zip(kinds, zip(tables, modes))).items()}
    distinct = np.stack([columns[kind] for kind in kinds], axis=1)
    return StepCosts(
        **vars(steps),
        units=per_unit(spec, distinct[..., :-1]),
        narrow=per_unit(spec, distinct[..., -1]),
        step=np.array([table.seconds(Op("step")) for table in tables]),
        message=np.array([table.message_s for table in tables]),
    )


def without_gaps(costs: StepCosts) -> StepCosts:
    """Where the device cannot: as much as its most expensive option."""
    most = np.nan_to_num(np.fmax.reduce(costs.units, axis=-1, keepdims=True))
    return replace(costs, units=np.where(np.isnan(costs.units), most, costs.units))


def measured(costs: Callable[[int], StepCosts], sizes: Sequence[int]) -> tuple[StepCosts, ...]:
    """The costs at every size at which they are known. Raises NotMeasuredError if there is none."""
    known, missing = [], None
    for size in sizes:
        try:
            known.append(costs(size))
        except NotMeasuredError as error:
            missing = missing or error
    if missing is not None and not known:
        raise missing
    return tuple(known)
