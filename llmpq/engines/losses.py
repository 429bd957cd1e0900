"""What of a plan no other engine does, a line each."""

from __future__ import annotations

from collections.abc import Iterator

from llmpq.engines.export import Job
from llmpq.spec import KvDtype
from llmpq.spec.formatting import format_cap


def common_losses(job: Job) -> Iterator[str]:
    """What is lost in every engine. What one of them keeps it says itself: micro-batches, types, bits."""
    modes = {
        device.name: stage.activations
        for i, (stage, device) in enumerate(job.stages)
        if stage.activations != "a16" and any(job.plan.precision(u).quantized for u in job.plan.units_of(i))
    }
    if modes:
        named = ", ".join(f"{mode} on {name}" for name, mode in modes.items())
        yield f"activation modes ({named}): {job.engine} multiplies in its own way"
    caps = {device.name: format_cap(device.memory_bytes) for _, device in job.stages if device.memory_bytes is not None}
    if caps:
        named = ", ".join(f"{name} {cap}" for name, cap in caps.items())
        yield f"memory caps ({named}): {job.engine} takes what its own settings allow"
    emulated = [device.name for _, device in job.stages if device.slowdown > 1]
    if emulated or any(link.emulated for link in job.plan.cluster.links):
        yield f"emulation of slower devices and links: {job.engine} runs as fast as it can"
    yield "the plan's predicted speed and its measured quality: they are those of llmpq's kernels and weights"


def microbatch_loss(job: Job, instead: str) -> str:
    plan = job.plan
    return f"micro-batches of {plan.prefill_microbatch} (prefill) and {plan.decode_microbatch} (decode): {instead}"


def cache_dtypes(job: Job) -> list[KvDtype]:
    """What the plan's stages keep keys and values in."""
    return list(dict.fromkeys(stage.kv_dtype for stage, _ in job.stages))


def cache_loss(job: Job, who: str, where: str = "") -> list[str]:
    """A line if the plan's stages keep keys and values otherwise than in the model's type, as others do."""
    kept = [dtype for dtype in cache_dtypes(job) if dtype != job.spec.dtype]
    if not kept:
        return []
    larger = ", which takes about twice the memory" if "int8" in kept else ""
    return [f"keys and values in {' and '.join(kept)}: {who} keeps them in {job.spec.dtype}{where}{larger}"]
