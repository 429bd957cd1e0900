"""Problem: all that is given where something is planned."""

from __future__ import annotations

from dataclasses import dataclass

from llmpq.spec import Cluster, ModelSpec, Profile, Sensitivity, Workload
from planner.constraints import Constraints


@dataclass(frozen=True)
class Problem:
    """A model, the devices there are, what is asked of them, what things cost, and what a plan must keep to."""

    spec: ModelSpec
    cluster: Cluster
    workload: Workload
    profile: Profile
    sensitivity: Sensitivity
    constraints: Constraints
