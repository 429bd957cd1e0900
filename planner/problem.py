"""Problem: the inputs of the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from llmpq.spec import Cluster, ModelSpec, Profile, Sensitivity, UsageError, Workload
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

    def by_cache(self) -> Iterator[Problem]:
        """Problems with a single width of the KV cache, whose plans together are those of this one."""
        for bits in self.constraints.kv_bits:
            yield replace(self, constraints=replace(self.constraints, kv_bits=(bits,)))
