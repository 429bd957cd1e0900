"""Plans for tiny models: any split of the layers, every unit in a precision of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmpq.checkpoint.model_files import Checkpoint, load_spec, resolve
from llmpq.spec import W16, Cluster, Device, ModelSpec, Placement, Plan, Precision, Stage, Workload
from tests.support import tiny_models

MIXED = (Precision(4, 32), Precision(8, 32, zero="asym"), W16)
UNIFORM = (W16,)


def tiny_model(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Checkpoint:
    tiny_models.save_model(folder, kind, dtype, **overrides)
    return resolve(str(folder))


def make_plan(
    spec: ModelSpec,
    split: Sequence[int],
    prefill_microbatch: int,
    decode_microbatch: int,
    *,
    slots: int = 5,
    max_length: int = 40,
    precisions: Sequence[Precision] = MIXED,
    memory_bytes: int | None = None,
) -> Plan:
    """Stage i has split[i] layers on a CPU of its own. A unit's precision does not depend on the split."""
    devices = tuple(Device(f"cpu{i}", "cpu", memory_bytes=memory_bytes) for i in range(len(split)))
    stages: list[Stage] = []
    for device, layers in zip(devices, split, strict=True):
        first = stages[-1].layers[1] if stages else 0
        chosen = tuple(precisions[i % len(precisions)] for i in range(first, first + layers))
        stages.append(Stage(device.name, (first, first + layers), chosen))
    return Plan(
        model=spec.name,
        model_hash=spec.content_hash,
        cluster=Cluster(devices),
        workload=Workload(slots, 8, 10),
        stages=tuple(stages),
        embedding=Placement(0, precisions[0]),
        head=Placement(len(stages) - 1, precisions[1 % len(precisions)]),
        wire_dtype="float32",
        slots=slots,
        max_length=max_length,
        prefill_microbatch=prefill_microbatch,
        decode_microbatch=decode_microbatch,
    )


def with_eos(spec: ModelSpec, *tokens: int) -> ModelSpec:
    return replace(spec, eos_token_ids=tokens)


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, tiny_models.VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


__all__ = ["MIXED", "UNIFORM", "load_spec", "make_plan", "random_prompts", "tiny_model", "with_eos"]
