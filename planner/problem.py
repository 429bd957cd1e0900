"""Problem: the inputs of the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from llmpq.spec import Cluster, ModelSpec, Plan, Profile, Sensitivity, UsageError, Workload
from planner.constraints import Constraints


@dataclass(frozen=True)
class Problem:
    """Everything that a plan depends on."""

    spec: ModelSpec
    cluster: Cluster  # devices with their memory caps, and links
    workload: Workload
    profile: Profile  # measured, analytic or made by hand: seconds of operations on every device, and links
    sensitivity: Sensitivity  # of each unit at each precision; additive
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        """Raises UsageError if the sensitivities are those of another model."""
        if self.sensitivity.model_hash != self.spec.content_hash:
            raise UsageError(
                f"the sensitivities are those of another model: {self.sensitivity.model} "
                f"({self.sensitivity.model_hash}), not {self.spec.name} ({self.spec.content_hash}); make them with "
                "`llmpq sensitivity`"
            )

    def omega(self, plan: Plan) -> float:
        """The summed sensitivity of a plan's units and KV caches. Raises UsageError if one was not measured."""
        sensitivity = self.sensitivity
        return sum(
            sensitivity.of(unit, plan.precision(unit)) + sensitivity.of_cache(self.spec, unit, stage.kv_bits)
            for i, stage in enumerate(plan.stages)
            for unit in plan.units_of(i)
        )

    def by_cache(self) -> Iterator[Problem]:
        """The problems in which all stages have the same one of the widths that the KV cache may have."""
        for bits in self.constraints.kv_bits:
            yield replace(self, constraints=replace(self.constraints, kv_bits=(bits,)))
