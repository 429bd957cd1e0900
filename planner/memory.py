"""The memory model: bytes a stage holds above its idle worker process.

    weights with scales, norms and biases   of its units; a tied table once, if both users are here in one precision
    keys and values                         of its layers, as many blocks as the plan says; of a layer that attends
                                            within a window, for each slot's window and the tokens of one step
    activations                             of the largest micro-batch of either phase, at the widest point of a layer;
                                            where blocks of the cache may run out, that may be a prompt with its answer
    logits                                  of one row per sequence of the largest micro-batch, on the head's stage
    wire buffers                            two incoming messages and one outgoing, if there is more than one stage
    attention's scratch, on a GPU           parts of a context of each sequence that decodes; with the backend
                                            "reference", scores of the longest prompt, or of such a one
    graphs, on a GPU                        of decode steps: their nodes, and a pool of their own for scratch
    modules and links, on a GPU             code of kernels and libraries; buffers of NCCL for each neighbour
    overhead                                measured: thread stacks, communication, allocator, kernel scratch

The three that only a GPU has are computed from the code, and not yet measured on one. Loading needs less for a moment
than graphs or overhead do later. The CUDA context is the idle worker's (llmpq/hardware.py).

The first two are linear in the units and enter the integer program unit by unit (`unit_bytes`); the rest depends only
on the device, its place in the pipeline and, linearly, the micro-batch sizes (`StageBuffers`, and what was measured).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmpq.spec import (
    DTYPE_BYTES,
    Device,
    Dtype,
    KvBits,
    LayerKind,
    ModelSpec,
    Plan,
    Profile,
    UnitPrecision,
    Workload,
    kv_dtype,
)
from llmpq.spec.layers import KV_BLOCK, blocks_for

LOGIT_COPIES = 3  # on a GPU, in float32: the logits, and what tokens drawn there weigh, in float64
SAMPLED_ROWS = 4  # on a CPU: what sampling makes of one row, in float64
WIRE_BUFFERS = 3  # two incoming in turn, one on its way out

# Of a GPU. Those of attention and products are as in llmpq/kernels/backends/.
SPLIT_POSITIONS, MOST_SPLITS = 128, 32  # of a context that is decoded in parts
SPLIT_NUMBERS = 2  # of each part and head, beside its sums
PRODUCT_SCRATCH = 2**27  # of decode steps' products, in the pool of their graphs
GRAPHS, ROWS_OF_GRAPH = 4, 8  # so many graphs, and one more for so many rows
LAYER_OPERATIONS, NODE_BYTES = 12, 4096  # launches of a layer; what a graph keeps of each
MODULE_BYTES = 2**28  # code that was loaded, and what libraries keep
NCCL_BYTES = 2**27  # of a communicator: a few MB for each of its channels, at both ends


def wire_dtype(devices: Sequence[Device], spec: ModelSpec) -> Dtype:
    """The type of hidden states on links: the one that all stages compute in, or float32 where they differ."""
    dtypes = {spec.compute_dtype(device.kind) for device in devices}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


@dataclass(frozen=True)
class CacheSize:
    """How much the KV cache of a layer must hold."""

    slots: int  # sequences
    length: int  # tokens of one sequence
    step: int  # of these, the most that one step adds where a layer keeps only the latest
    blocks: int  # for all sequences together, where all of their tokens are kept

    @classmethod
    def of(cls, workload: Workload) -> CacheSize:
        """What a plan for it has."""
        return cls(workload.batch_size, workload.max_length, workload.longest_prompt, workload.cache_blocks)

    def tokens(self, kind: LayerKind) -> int:
        """That a layer has room for, of all sequences together."""
        kept = kind.cached_tokens(self.length, self.step)
        return self.slots * kept if kept < self.length else self.blocks * KV_BLOCK

    def largest_query(self, spec: ModelSpec) -> tuple[int, int]:
        """Tokens that a step adds to one sequence at most, and how many it then has."""
        if self.blocks >= self.slots * blocks_for(self.length):
            return self.step, self.step
        keeps_all = all(kind.cached_tokens(self.length, self.step) >= self.length for kind in spec.layer_kinds)
        return self.length if keeps_all else self.step, self.length  # of one that is computed anew


def unit_bytes(
    spec: ModelSpec, unit: str, option: UnitPrecision, device: Device, cache: CacheSize, kv_bits: KvBits = 16
) -> int:
    """Weights of a unit and, for a layer, its keys and values for all slots; of all members of a device together."""
    part = spec.part(device.members)
    size = part.unit_bytes(unit, option, cache.length)
    if unit not in ("embedding", "head"):
        kind = spec.layer_kind(int(unit.removeprefix("layer.")))
        size += part.kv_bytes(cache.tokens(kind), kv_dtype(spec.compute_dtype(device.kind), kv_bits))
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
    cache: CacheSize

    @classmethod
    def of_pipeline(
        cls, stages: int, wire: Dtype, largest_step: tuple[int, int], cache: CacheSize
    ) -> list[StageBuffers]:
        """Those of each stage; `largest_step` has tokens and sequences."""
        last = stages - 1
        return [cls(*largest_step, wire, (i > 0) + (i < last), i == last, cache) for i in range(stages)]

    def size(self, spec: ModelSpec, device: Device, backend: str | None) -> int:
        """Bytes, of all members of a device together; `backend` is that of its attention.

        An affine function of tokens and rows.
        """
        spec = spec.part(device.members)
        activations = self.tokens * _values_per_token(spec, device) * DTYPE_BYTES[spec.compute_dtype(device.kind)]
        logit_rows = self.rows + SAMPLED_ROWS if device.kind == "cpu" else LOGIT_COPIES * self.rows
        logits = logit_rows * spec.vocab_size * 4 if self.holds_head else 0
        wires = self.neighbours * WIRE_BUFFERS * self.tokens * spec.hidden_size * DTYPE_BYTES[self.wire]
        return device.members * (activations + logits + wires + self._of_gpu(spec, device, backend))

    def _of_gpu(self, spec: ModelSpec, device: Device, backend: str | None) -> int:
        """What only a GPU has; `spec` is one member's part. In tables that were not measured, overhead has it all."""
        if device.kind == "cpu" or backend not in ("triton", "reference"):
            return 0
        always = MODULE_BYTES + self.neighbours * NCCL_BYTES
        if backend == "reference":
            return always + reference_scratch(spec, self.cache)
        splits = min(MOST_SPLITS, -(-self.cache.length // SPLIT_POSITIONS))
        scratch = self.rows * spec.num_heads * splits * (spec.head_dim + SPLIT_NUMBERS) * 4
        nodes = spec.num_layers * LAYER_OPERATIONS * NODE_BYTES
        graphs = PRODUCT_SCRATCH + scratch + GRAPHS * nodes + self.rows * nodes // ROWS_OF_GRAPH
        return always + scratch + graphs


def reference_scratch(spec: ModelSpec, cache: CacheSize) -> int:
    """Bytes of attention in llmpq/kernels/backends/reference.py, which takes one sequence after the other.

    In float32: queries, twice, and results; keys and values, and either as the cache has it; scores of every head
    before and after the softmax. Their mask and its positions.
    """

    def size(queries: int, keys: int) -> int:
        numbers = 3 * queries * spec.num_heads * spec.head_dim + 3 * blocks_for(keys) * KV_BLOCK * spec.kv_dim
        return 4 * (numbers + 2 * spec.num_heads * queries * keys) + (queries + 8) * keys

    return max(size(*cache.largest_query(spec)), size(1, cache.length))


def _values_per_token(spec: ModelSpec, device: Device) -> int:
    """Numbers that a step holds for each token at the widest point of a layer."""
    if device.kind == "cpu":  # hidden states as they come in, and what llmpq/models/arena.py has room for
        return 3 * spec.hidden_size + spec.widest_activations
    q_dim = spec.num_heads * spec.head_dim
    attention = q_dim + 2 * spec.kv_dim + q_dim  # q, k and v; the result
    mlp = max(_mlp_values(spec, kind) for kind in spec.layer_kinds)
    return 3 * spec.hidden_size + max(attention, mlp)  # residual, its norm, and a linear's output beside them


def _mlp_values(spec: ModelSpec, kind: LayerKind) -> int:
    """Numbers of an MLP for each token on a GPU."""
    if kind.experts is None:
        return (3 if spec.gated_mlp else 2) * spec.intermediate_size  # gate and up, or up; the activated product
    # What the arena has room for; and while an expert that all tokens go through multiplies, its rows and results.
    up = spec.linears_of(kind)["up"]
    return spec.widest_activations + kind.experts.per_token * (up.n + up.k)


def stage_bytes(plan: Plan, spec: ModelSpec, profile: Profile) -> tuple[int, ...]:
    """Bytes of each stage of a plan."""
    devices = [plan.cluster.device(stage.device) for stage in plan.stages]
    step = plan.planned_step
    cache = CacheSize(plan.slots, plan.max_length, plan.new_tokens, plan.cache_blocks)
    tables = [profile.table(device.name) for device in devices]
    totals = [
        buffers.size(spec, device, tables[i].attention_backend)
        + tables[i].overhead_bytes
        + sum(
            unit_bytes(spec, unit, plan.precision(unit), device, cache, plan.stages[i].kv_bits)
            for unit in plan.units_of(i)
        )
        for i, (device, buffers) in enumerate(
            zip(devices, StageBuffers.of_pipeline(len(devices), plan.wire_dtype, step, cache), strict=True)
        )
    ]
    if len(totals) == 1 and plan.embedding.precision == plan.head.precision:
        totals[0] -= shared_bytes(spec, plan.head.precision)
    return tuple(totals)
