"""The memory model: bytes a stage holds above its idle worker process.

    weights with scales, norms and biases   of its units; a tied table once, if both users are here in one precision
    keys and values                         of its layers, for all slots at their full length; of a layer that attends
                                            within a window, for the window and the tokens of one step
    activations                             of the largest micro-batch of either phase, at the widest point of a layer
    logits                                  of one row per sequence of the largest micro-batch, on the head's stage
    wire buffers                            two incoming messages and one outgoing, if there is more than one stage
    overhead                                measured: thread stacks, communication, allocator, kernel scratch

The first two are linear in the units and enter the integer program unit by unit (`unit_bytes`); the rest depends only
on the device, its place in the pipeline and the micro-batch sizes (`StageBuffers`, and what was measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.spec import DTYPE_BYTES, Device, Dtype, ModelSpec, Plan, Profile, UnitPrecision, Workload, kv_dtype
from planner.lengths import decode_steps, largest_step, prefill_steps

LOGIT_COPIES = 2  # on a GPU: float32 logits, and what sampling makes of them
SAMPLED_ROWS = 4  # on a CPU: what sampling makes of one row, in float64
WIRE_BUFFERS = 3  # two incoming in turn, one on its way out


def wire_dtype(devices: Sequence[Device], spec: ModelSpec) -> Dtype:
    """The type of hidden states on links: the one that all stages compute in, or float32 where they differ."""
    dtypes = {spec.compute_dtype(device.kind) for device in devices}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


@dataclass(frozen=True)
class CacheSize:
    """How much the KV cache of a layer must hold."""

    slots: int  # sequences
    length: int  # tokens of one sequence
    step: int  # of these, the most that one step adds

    @classmethod
    def of(cls, workload: Workload) -> CacheSize:
        return cls(workload.batch_size, workload.max_length, workload.longest_prompt)


def unit_bytes(spec: ModelSpec, unit: str, option: UnitPrecision, device: Device, cache: CacheSize) -> int:
    """Weights of a unit and, for a layer, its keys and values for all slots; of all members of a device together."""
    part = spec.part(device.members)
    size = part.unit_bytes(unit, option, cache.length)
    if unit not in ("embedding", "head"):
        kind = spec.layer_kind(int(unit.removeprefix("layer.")))
        tokens = cache.slots * kind.cached_tokens(cache.length, cache.step)
        size += part.kv_bytes(tokens, kv_dtype(spec.compute_dtype(device.kind)))
    return device.members * size


def shared_bytes(spec: ModelSpec, option: UnitPrecision) -> int:
    """What is saved if embedding and head are on one stage in one option."""
    precision = spec.linear_precisions("embedding", option)["table"]
    return precision.weight_bytes(spec.table.n, spec.table.k) if spec.tied_embeddings else 0


@dataclass(frozen=True)
class StageBuffers:
    """What the buffers of a stage depend on, beside its device."""

    tokens: int  # of the largest step
    rows: int  # sequences of the largest step
    wire: Dtype
    neighbours: int  # stages that hidden states come from or go to
    holds_head: bool

    @classmethod
    def of_pipeline(cls, stages: int, wire: Dtype, largest_step: tuple[int, int]) -> list[StageBuffers]:
        """Those of each stage; `largest_step` has tokens and sequences."""
        last = stages - 1
        return [cls(*largest_step, wire, (i > 0) + (i < last), i == last) for i in range(stages)]

    def size(self, spec: ModelSpec, device: Device) -> int:
        """Bytes, of all members of a device together."""
        spec = spec.part(device.members)
        activations = self.tokens * _values_per_token(spec, device) * DTYPE_BYTES[spec.compute_dtype(device.kind)]
        logit_rows = self.rows + SAMPLED_ROWS if device.kind == "cpu" else LOGIT_COPIES * self.rows
        logits = logit_rows * spec.vocab_size * 4 if self.holds_head else 0
        wires = self.neighbours * WIRE_BUFFERS * self.tokens * spec.hidden_size * DTYPE_BYTES[self.wire]
        return device.members * (activations + logits + wires)


def _values_per_token(spec: ModelSpec, device: Device) -> int:
    """Numbers that a step holds for each token at the widest point of a layer."""
    if device.kind == "cpu":  # hidden states as they come in, and what llmpq/models/arena.py has room for
        return 3 * spec.hidden_size + spec.widest_activations
    q_dim = spec.num_heads * spec.head_dim
    attention = q_dim + 2 * spec.kv_dim + q_dim  # q, k and v; the result
    mlp = (3 if spec.gated_mlp else 2) * spec.intermediate_size  # gate and up, or up; the activated product
    return 3 * spec.hidden_size + max(attention, mlp)  # residual, its norm, and a linear's output beside them


def stage_bytes(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, ...]:
    """Bytes of each stage of a plan."""
    devices = [plan.cluster.device(stage.device) for stage in plan.stages]
    step = largest_step(
        prefill_steps(plan.workload, plan.prefill_microbatch), decode_steps(plan.workload, plan.decode_microbatch)
    )
    cache = CacheSize(plan.slots, plan.max_length, plan.workload.longest_prompt)
    totals = [
        buffers.size(spec, device)
        + profile.table(device.name).overhead_bytes
        + sum(unit_bytes(spec, unit, plan.precision(unit), device, cache) for unit in plan.units_of(i))
        for i, (device, buffers) in enumerate(
            zip(devices, StageBuffers.of_pipeline(len(devices), plan.wire_dtype, step), strict=True)
        )
    ]
    if len(totals) == 1 and plan.embedding.precision == plan.head.precision:
        totals[0] -= shared_bytes(spec, plan.head.precision)
    return tuple(totals)
