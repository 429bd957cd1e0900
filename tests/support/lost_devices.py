"""Plans whose devices are lost, and the processes that are there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llmpq.spec import ModelSpec, Plan
from tests.support.pipelines import make_plan


def plan_on(spec: ModelSpec, **split: int) -> Plan:
    """So many layers on each of these devices, slow enough for the plan not to be over too soon."""
    plan = make_plan(spec, list(split.values()), 2, 2)
    named = {stage.device: name for stage, name in zip(plan.stages, split)}
    devices = tuple(replace(device, name=named[device.name], slowdown=10) for device in plan.cluster.devices)
    stages = tuple(replace(stage, device=named[stage.device]) for stage in plan.stages)
    return replace(plan, cluster=replace(plan.cluster, devices=devices), stages=stages)


def worker_pids() -> set[int]:
    """Of this process's workers."""
    found = set[int]()
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with suppress(FileNotFoundError):  # it ends meanwhile
                if b"llmpq.runtime" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found
