"""A plan as the page draws it."""

from __future__ import annotations

from typing import Any

from llmpq.spec import Plan, Solved
from llmpq.spec.layers import KV_BLOCK


def describe(plan: Plan, solved: Solved | None) -> dict[str, Any]:
    """Stages with their devices, memory in bytes and units, each with its bits; what is predicted, if it is solved."""
    return {
        "model": plan.model,
        "slots": plan.slots,
        "max_length": plan.max_length,
        "kv_tokens": plan.cache_blocks * KV_BLOCK,
        "tokens_per_s": None if solved is None else solved.prediction.tokens_per_s,
        "stages": [_stage(plan, index, solved) for index in range(len(plan.stages))],
    }


def _stage(plan: Plan, index: int, solved: Solved | None) -> dict[str, Any]:
    device = plan.cluster.device(plan.stages[index].device)
    return {
        "device": device.name,
        "kind": " ".join(filter(None, (device.kind, device.isa))),
        "activations": plan.stages[index].activations,
        "kv_bits": plan.stages[index].kv_bits,
        "cap_bytes": device.memory_bytes,
        "memory_bytes": None if solved is None else solved.prediction.memory_bytes[index],
        "units": [{"name": unit, "bits": str(plan.precision(unit).width)} for unit in plan.units_of(index)],
    }
