"""Mixed precisions of a layer: between two neighbouring widths, one linear more is wider at each step.

The next one to be wider is the one by which all layers together lose least for its bytes. With sensitivities that add
up, such steps are the corners of all that one choice for all layers can reach; which layer takes which is the solver's
choice, as between widths. All layers have the same steps, so that layers of a group still cost the same.
"""

from __future__ import annotations

from itertools import pairwise

from llmpq.spec import Mixed, ModelSpec, Precision, Sensitivity, UnitPrecision, UsageError
from planner.problem import Problem


def options_of(problem: Problem) -> tuple[UnitPrecision, ...]:
    """What units may be stored in: `Constraints.options`, and with `per_linear` steps between quantized widths.

    Raises UsageError if no width can be chosen, or the sensitivities lack those of linears.
    """
    options = problem.constraints.options(problem.spec)
    if not problem.constraints.per_linear:
        return options
    quantized = [option for option in options if isinstance(option, Precision) and option.quantized]
    spec, sensitivity = problem.spec, problem.sensitivity
    steps: dict[UnitPrecision, list[Mixed]] = {
        few: between(spec, sensitivity, few, many) for few, many in pairwise(quantized)
    }
    return tuple(each for option in options for each in (option, *steps.get(option, ())))


def between(spec: ModelSpec, sensitivity: Sensitivity, few: Precision, many: Precision) -> list[Mixed]:
    """The steps from one precision to a wider one, without both. Raises UsageError for missing sensitivities."""

    linears = spec.linears("layer.0")
    if any(spec.linears_of(kind).keys() != linears.keys() for kind in spec.layer_kinds):
        raise UsageError(f"the layers of {spec.name} have different linears, so they cannot be planned per linear")

    def gain(name: str) -> float:
        """Sensitivity that a byte more saves."""
        units, shape = [f"{unit}.{name}" for unit in spec.units[1:-1]], linears[name]
        saved = sum(sensitivity.of(unit, few) - sensitivity.of(unit, many) for unit in units)
        return saved / (shape.weight_bytes(many) - shape.weight_bytes(few))

    by_gain = sorted(linears, key=gain, reverse=True)
    wider = (by_gain[:count] for count in range(1, len(by_gain)))
    return [Mixed(tuple((name, many if name in of else few) for name in linears)) for of in wider]
