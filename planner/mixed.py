"""Mixed precisions of a layer: between two neighbouring widths, one linear more is wider at each step.

Native neighbours all widths that take fewer bytes: with what is quantized again there are linears that stay as stored.

The next one to be wider is the one by which all layers together lose least for its bytes. With sensitivities that add
up, such steps are the corners of all that one choice for all layers can reach; which layer takes which is the solver's
choice, as between widths. All layers have the same steps, so that layers of a group still cost the same.
"""

from __future__ import annotations

import math
from itertools import pairwise

from llmpq.spec import NATIVE, Mixed, ModelSpec, Native, Precision, Sensitivity, UnitPrecision, UsageError
from planner.problem import Problem


def options_of(problem: Problem) -> tuple[UnitPrecision, ...]:
    """What units may be stored in: `Constraints.options`, and with `per_linear` steps between those with fewer bits.

    Raises UsageError if no width can be chosen, or the sensitivities lack those of linears.
    """
    options = problem.constraints.options(problem.spec)
    if not problem.constraints.per_linear:
        return options
    quantized = [option for option in options if isinstance(option, Precision) and option.quantized]
    spec, sensitivity, native = problem.spec, problem.sensitivity, [option for option in options if option == NATIVE]
    pairs: list[tuple[Precision, Native | Precision]] = [*pairwise(quantized)]
    pairs += [(few, many) for few in quantized for many in native if _bytes(spec, few) < _bytes(spec, many)]
    steps: dict[UnitPrecision, list[Mixed]] = {}
    for few, many in pairs:
        steps.setdefault(few, []).extend(between(spec, sensitivity, few, many))
    return tuple(each for option in options for each in (option, *steps.get(option, ())))


def _bytes(spec: ModelSpec, option: Native | Precision, name: str | None = None) -> int:
    """Bytes of all layers' matrices, or of those of a linear."""
    return sum(
        shape.weight_bytes(spec.linear_precisions(unit, option)[linear])
        for unit in spec.units[1:-1]
        for linear, shape in spec.linears(unit).items()
        if name in (None, linear)
    )


def between(spec: ModelSpec, sensitivity: Sensitivity, few: Precision, many: Native | Precision) -> list[Mixed]:
    """The steps from one precision to a wider one, without both. Raises UsageError for missing sensitivities."""

    linears = spec.linears("layer.0")
    if any(spec.linears_of(kind).keys() != linears.keys() for kind in spec.layer_kinds):
        raise UsageError(f"the layers of {spec.name} have different linears, so they cannot be planned per linear")

    def gain(name: str) -> float:
        """Sensitivity that a byte more saves."""
        units = [f"{unit}.{name}" for unit in spec.units[1:-1]]
        saved = sum(sensitivity.of(unit, few) - sensitivity.of(unit, many) for unit in units)
        more = _bytes(spec, many, name) - _bytes(spec, few, name)
        return saved / more if more > 0 else math.inf

    by_gain = sorted(linears, key=gain, reverse=True)
    wider = (by_gain[:count] for count in range(1, len(by_gain)))
    return [Mixed(tuple((name, many if name in of else few) for name in linears)) for of in wider]
