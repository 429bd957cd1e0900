"""From a model and a description of devices to a plan: measures what is not known yet, then solves.

The command line and `LLM` both come through here; it is the only place that joins measuring, planning and the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import planner
from llmpq.measure.profile import profile
from llmpq.measure.sensitivity import sensitivity
from llmpq.models.checkpoint import Checkpoint, Tokenizer, load_spec, load_tokenizer, resolve
from llmpq.spec import Cluster, ModelSpec, Plan, Precision, Profile, Sensitivity, UsageError, Workload

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A model that was found and described, and whose weights have not been touched."""

    checkpoint: Checkpoint
    spec: ModelSpec
    tokenizer: Tokenizer


def open_model(name: str, load_format: str = "auto") -> Model:
    """Find a model. Raises UsageError if it is missing, broken or of an unknown architecture."""
    checkpoint = resolve(name, load_format)
    spec = load_spec(checkpoint)
    return Model(checkpoint, spec, load_tokenizer(checkpoint))


def _free_bytes() -> int:
    """Memory this machine could still give to processes, in bytes (Linux: MemAvailable)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise UsageError("this system does not tell its free memory; give each device memory=SIZE")


def with_memory(cluster: Cluster) -> Cluster:
    """The cluster with a cap on every device: those without one share what is free (a GPU: 90 % of what is free)."""
    uncapped = [device for device in cluster.devices if device.memory_bytes is None]
    share = _free_bytes() // max(1, sum(device.kind == "cpu" for device in uncapped)) if uncapped else 0

    def cap(kind: str, index: int) -> int:
        if kind == "cpu":
            return share
        import torch

        if index >= torch.cuda.device_count():
            raise UsageError(f"device cuda:{index} does not exist here; this machine has {torch.cuda.device_count()}")
        return int(0.9 * torch.cuda.mem_get_info(index)[0])

    return replace(
        cluster,
        devices=tuple(
            replace(device, memory_bytes=cap(device.kind, device.index)) if device in uncapped else device
            for device in cluster.devices
        ),
    )


def workload_of(spec: ModelSpec, prompts: Sequence[Sequence[int]], output_len: int, batch_size: int | None) -> Workload:
    """What these prompts ask for. Raises UsageError if one is empty or leaves no room in the model's context."""
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise UsageError(f"prompt {i} is empty")
        if len(prompt) >= spec.max_positions:
            raise UsageError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room for an answer: the context of {spec.name} "
                f"is {spec.max_positions} tokens; shorten it"
            )
    longest = max(map(len, prompts))
    return Workload(
        batch_size=min(len(prompts), batch_size or 32),
        prompt_len=max(1, round(sum(map(len, prompts)) / len(prompts))),
        output_len=min(output_len, spec.max_positions - longest),
        max_prompt_len=longest,
    )


def measured_profile(
    model: Model, cluster: Cluster, workload: Workload, group_size: int | None, notify: Notify
) -> Profile:
    """The costs of the model's operations on every device; measured, or from the cache."""
    notify("measuring what the model's operations cost on each device")
    return profile(model.spec, cluster, workload, group_size=group_size)


def measured_sensitivity(model: Model, group_size: int | None, notify: Notify) -> Sensitivity:
    """How much each unit minds each precision; measured, or from the cache."""
    notify("measuring how much each layer minds being quantized")
    precisions = tuple(Precision(bits, group_size) for bits in (3, 4, 8))
    return sensitivity(model.checkpoint, model.spec, precisions=precisions)


def make_plan(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: planner.Constraints,
    *,
    costs: Profile | None = None,
    omega: Sensitivity | None = None,
    notify: Notify = lambda _: None,
) -> tuple[Plan, Profile]:
    """The best plan found, and the costs it was made from. Raises InfeasibleError."""
    if costs is None:
        costs = measured_profile(model, cluster, workload, constraints.group_size, notify)
    if omega is None:
        omega = measured_sensitivity(model, constraints.group_size, notify)
    elif omega.model_hash != model.spec.content_hash:
        raise UsageError(
            f"the sensitivities are those of another model: {omega.model} ({omega.model_hash}), not {model.spec.name} "
            f"({model.spec.content_hash}); make them with `llmpq sensitivity`"
        )
    notify("solving for layer split, bits and micro-batches")
    return planner.solve(model.spec, with_memory(cluster), workload, costs, omega, constraints), costs
