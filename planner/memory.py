"""The memory model: bytes a stage holds above its idle worker process.

    weights with scales, norms and biases   of its units; a tied table once, if both users are here in one precision
    keys and values                         of its layers, for all slots at their full length
    activations                             of the largest micro-batch of either phase, at the widest point of a layer
    logits                                  of one row per sequence of the largest micro-batch, on the head's stage
    wire buffers                            two incoming messages and one outgoing, if there is more than one stage
    overhead                                measured: thread stacks, communication, allocator, kernel scratch

The first two are linear in the units and enter the integer program unit by unit (`unit_bytes`); the rest depends only
on the device, its place in the pipeline and the micro-batch sizes (`fixed_bytes`).
"""

from __future__ import annotations

from llmpq.spec import DTYPE_BYTES, Device, Dtype, ModelSpec, Plan, Precision, Profile
from planner.lengths import decode_steps, largest_step, prefill_steps

LOGIT_COPIES = 2  # on a GPU: float32 logits, and what sampling makes of them
SAMPLED_ROWS = 4  # on a CPU: what sampling makes of one row, in float64
WIRE_BUFFERS = 3  # two incoming in turn, one on its way out


def wire_dtype(devices: list[Device], spec: ModelSpec) -> Dtype:
    """What hidden states travel in: the type all stages compute in, or float32 where they differ."""
    dtypes = {spec.compute_dtype(device.kind) for device in devices}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


def unit_bytes(spec: ModelSpec, unit: str, precision: Precision, device: Device, slots: int, max_length: int) -> int:
    """Weights of a unit and, for a layer, its keys and values for all slots; of all members of a device together."""
    part = spec.part(device.members)
    size = part.unit_bytes(unit, precision, max_length)
    if unit not in ("embedding", "head"):
        size += part.kv_bytes(slots * max_length, spec.compute_dtype(device.kind))
    return device.members * size


def shared_bytes(spec: ModelSpec, precision: Precision) -> int:
    """What is saved if embedding and head are on one stage in one precision."""
    return precision.weight_bytes(spec.table.n, spec.table.k) if spec.tied_embeddings else 0


def fixed_bytes(
    spec: ModelSpec,
    device: Device,
    *,
    tokens: int,
    rows: int,
    holds_head: bool,
    wire: Dtype,
    wires: int,
    overhead: int,
) -> int:
    """Everything but `unit_bytes`, for `tokens` in the largest step, `rows` sequences, and links to neighbours.

    `overhead` is that of all members of the device.
    """
    spec = spec.part(device.members)
    activations = tokens * _values_per_token(spec, device) * DTYPE_BYTES[spec.compute_dtype(device.kind)]
    logit_rows = rows + SAMPLED_ROWS if device.kind == "cpu" else LOGIT_COPIES * rows
    logits = logit_rows * spec.vocab_size * 4 if holds_head else 0
    buffers = wires * WIRE_BUFFERS * tokens * spec.hidden_size * DTYPE_BYTES[wire]
    return device.members * (activations + logits + buffers) + overhead


def _values_per_token(spec: ModelSpec, device: Device) -> int:
    """Numbers that a step holds for each token at the widest point of a layer."""
    if device.kind == "cpu":  # hidden states as they come in, and what llmpq/models/arena.py has room for ...
        held = 3 * spec.hidden_size + spec.widest_activations
        return held + 2 * spec.head_dim + 2 * spec.kv_dim  # ... what queries and keys are rotated by; keys and values
    q_dim = spec.num_heads * spec.head_dim
    attention = q_dim + 2 * spec.kv_dim + q_dim  # q, k and v; the result
    mlp = (3 if spec.gated_mlp else 2) * spec.intermediate_size  # gate and up, or up; the activated product
    return 3 * spec.hidden_size + max(attention, mlp)  # residual, its norm, and a linear's output beside them


def neighbours(position: int, positions: int) -> int:
    """Stages that hidden states come from or go to."""
    return (position > 0) + (position < positions - 1)


def stage_bytes(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, ...]:
    """Bytes of each stage of a plan."""
    tokens, rows = largest_step(
        prefill_steps(plan.workload, plan.prefill_microbatch), decode_steps(plan.workload, plan.decode_microbatch)
    )
    last = len(plan.stages) - 1
    totals = []
    for i, stage in enumerate(plan.stages):
        device = plan.cluster.device(stage.device)
        total = fixed_bytes(
            spec,
            device,
            tokens=tokens,
            rows=rows,
            holds_head=i == last,
            wire=plan.wire_dtype,
            wires=neighbours(i, len(plan.stages)),
            overhead=profile.table(stage.device).overhead_bytes,
        )
        for unit in plan.units_of(i):
            total += unit_bytes(spec, unit, plan.precision(unit), device, plan.slots, plan.max_length)
        if last == 0 and plan.embedding.precision == plan.head.precision:
            total -= shared_bytes(spec, plan.head.precision)
        totals.append(total)
    return tuple(totals)
