"""Analytic devices: cost tables from public figures, for clusters that are not there to be measured.

Every operation takes the longer of reading its bytes and doing its arithmetic, each at the share of the device's peak
that its kernel reaches, plus what a call costs: a roofline. A table answers the very operations that `llmpq profile`
would time, so whatever a plan needs is in it. How good kernels are is said by a `World`:

- PAPER: LLM-PQ's (arXiv 2403.01136). Shares fitted to the times of one layer of OPT-30b on T4 and V100 in the notebooks
  of its repository, which they meet within 15 %; there a 3- or 4-bit prefill of 8 sequences takes 22 to 43 times as
  long as in 16 bit.
- MODERN: the same shares on all GPUs, such that quantized linears reach what is wanted of this project's
  (bench/kernels/rivals/goals_gpu.py): 1.8, 3.3 and 4.1 times cuBLAS at 8, 4 and 3 bits with one row, 0.95 times in
  prefill. These are ASSUMED: no GPU has been measured for this. Shares on a CPU are those of
  bench/results/rivals_cpu.json.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.plans.public_figures import DEVICES, Figures
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.spec import (
    DTYPE_BYTES,
    ActivationMode,
    Cluster,
    CostRow,
    CostTable,
    Device,
    KvBits,
    Link,
    ModelSpec,
    Op,
    Precision,
    Profile,
    Sensitivity,
    Workload,
)

NODE_LATENCY_S = 10e-6  # assumed, of a message between two devices of a node
NETWORK_LATENCY_S = 50e-6  # assumed, between nodes


@dataclass(frozen=True)
class Kernel:
    """What shares of a device's peaks a kernel reaches, and seconds for each call."""

    flop_share: float
    byte_share: float
    call_s: float = 0.0

    def seconds(self, device: Figures, flop: float, size: float) -> float:
        """The roofline, for so many operations and bytes."""
        arithmetic = flop / (self.flop_share * device.flop_per_s)
        return max(arithmetic, size / (self.byte_share * device.bytes_per_s)) + self.call_s


@dataclass(frozen=True)
class World:
    """How good kernels are: linears by device and bits, attention, and all that only moves data."""

    name: str
    group_size: int | None
    linears: Mapping[str, Mapping[int, Kernel]]  # "": devices that are not named
    attention: Kernel
    rest: Kernel
    step_s: float  # of the host, for each step of a stage; assumed

    def linear(self, device: str, bits: int) -> Kernel:
        return self.linears.get(device, self.linears[""])[bits]


_V100 = {
    16: Kernel(0.640, 0.642, 47e-6),
    8: Kernel(0.515, 0.109, 230e-6),
    4: Kernel(0.0183, 0.718, 180e-6),
    3: Kernel(0.0244, 0.218, 183e-6),
}
PAPER = World(
    name="paper",
    group_size=None,
    linears={
        "T4": {
            16: Kernel(0.313, 0.819, 204e-6),
            8: Kernel(0.494, 0.345, 19e-6),
            4: Kernel(0.00709, 0.918),
            3: Kernel(0.00915, 0.182),
        },
        # By the ratios to the V100 that are known: 16 and 4 bit, 8 sequences. 3 bit is to 4 as there; 8 bit falls back
        # to 16-bit products on this device, so it is no faster.
        "P100": {
            16: Kernel(0.249, 0.101),
            8: Kernel(0.200, 0.050, 230e-6),
            4: Kernel(0.0409, 0.435, 300e-6),
            3: Kernel(0.0545, 0.132, 300e-6),
        },
        "": _V100,  # not known of A100 and A800: the V100's
    },
    attention=Kernel(0.1, 0.2),
    rest=Kernel(1.0, 0.8),
    step_s=1e-3,
)
MODERN = World(
    name="modern",
    group_size=128,
    linears={
        "CPU host": {
            16: Kernel(0.91, 0.43, 2e-6),
            8: Kernel(0.87, 0.93, 2e-6),
            4: Kernel(0.89, 0.92, 2e-6),
            3: Kernel(0.89, 0.92, 2e-6),
        },
        "": {
            16: Kernel(0.75, 0.85, 4e-6),
            8: Kernel(0.71, 0.79, 4e-6),
            4: Kernel(0.71, 0.765, 4e-6),
            3: Kernel(0.71, 0.735, 4e-6),
        },
    },
    attention=Kernel(0.5, 0.7, 4e-6),
    rest=Kernel(1.0, 0.8, 20e-6),
    step_s=1e-4,
)
WORLDS = {world.name: world for world in (PAPER, MODERN)}


@dataclass(frozen=True)
class Analytic:
    """A device of DEVICES with the kernels of a world, running one model."""

    device: str
    world: World
    spec: ModelSpec

    @property
    def figures(self) -> Figures:
        return DEVICES[self.device]

    @property
    def _value_bytes(self) -> int:
        return DTYPE_BYTES[self.spec.compute_dtype(self.figures.kind)]

    def seconds(self, op: Op) -> float:
        """Seconds of any operation but attention."""
        rest, size = self.world.rest, self._value_bytes
        if op.kind == "step":
            return self.world.step_s
        if op.kind == "linear" and op.precision is not None:
            moved = op.precision.weight_bytes(op.n, op.k) + size * op.m * (op.n + op.k)
            kernel = self.world.linear(self.device, op.precision.bits)
            return kernel.seconds(self.figures, 2 * op.m * op.n * op.k, moved)
        if op.kind == "experts" and op.precision is not None:
            touched = op.context * (1 - (1 - 1 / op.context) ** op.m)  # expected, of rows by themselves
            read = touched * op.precision.weight_bytes(op.n, op.k)
            kernel = self.world.linear(self.device, op.precision.bits)
            return kernel.seconds(self.figures, 2 * op.m * op.n * op.k, read + size * op.m * (op.n + op.k))
        if op.kind == "embedding" and op.precision is not None:
            return rest.seconds(self.figures, 0, op.precision.weight_bytes(op.m, op.k) + size * op.m * op.k)
        if op.kind == "layer_rest":  # two norms and two sums of the hidden states, and the activation
            return rest.seconds(self.figures, 0, size * op.m * (10 * op.n + 3 * op.k))
        assert op.kind == "head_rest", op.kind
        return rest.seconds(self.figures, 0, 3 * 4 * op.m * op.n)  # float32 logits: written, read, sampled from

    def attention_seconds(self, op: Op, context_lens: Sequence[int]) -> float:
        """Seconds of attention: queries, results and the new keys are moved, each context is read once."""
        token = self._value_bytes * 2 * op.k if op.kv_bits == 16 else self.spec.kv_bytes(1, "int8")
        moved = self._value_bytes * op.m * (2 * op.n + 2 * op.k) + token * sum(context_lens)
        return self.world.attention.seconds(self.figures, 4 * op.m * op.context * op.n, moved)

    def table(self, workload: Workload, options: Sequence[Precision], kv_bits: Sequence[KvBits] = (16,)) -> CostTable:
        """What `llmpq profile` would measure for this model, at these precisions, and workloads up to this one."""
        kind = self.figures.kind
        dtype = self.spec.compute_dtype(kind)
        ranges = Ranges.of(workload)
        mode: ActivationMode = "a8x2" if kind == "cpu" else "a16"
        seconds = {op: self.seconds(op) for op in plain_ops(self.spec, ranges, options, mode)}
        for op, (_, context_lens) in attention_ops(self.spec, ranges, kv_bits).items():
            if op.m <= ranges.batch or op.context < ranges.length:  # no others: instances have whole prompts alone
                seconds[op] = self.attention_seconds(op, context_lens)
        return CostTable(
            device=f"{self.device}, {self.world.name} kernels, analytic",
            kernels="analytic",
            threads=1,
            isa=None,
            overhead_bytes=0,
            rows=tuple(CostRow(op, s, "analytic", dtype, 0) for op, s in seconds.items()),
        )


def cluster(
    nodes: Sequence[Sequence[str]], network_bytes_per_s: float, inside: tuple[float, float] | None = None
) -> Cluster:
    """Devices of DEVICES by node, named after their kind, and links both ways between any two.

    `inside`: latency_s and bytes_per_s of the links of a node; by default those of its devices.
    """
    devices: list[tuple[str, Device]] = []
    for node, kinds in enumerate(nodes):
        for kind in kinds:
            figures, number = DEVICES[kind], sum(k == kind for k, _ in devices)
            device = Device(
                f"{kind}.{number}", figures.kind, index=number, memory_bytes=figures.memory_bytes, host=f"node{node}"
            )
            devices.append((kind, device))

    def link(a: tuple[str, Device], b: tuple[str, Device]) -> Link:
        if a[1].host == b[1].host:
            if inside is not None:
                return Link(a[1].name, b[1].name, *inside)
            speed = min(DEVICES[kind].link_bytes_per_s for kind, _ in (a, b))
            return Link(a[1].name, b[1].name, NODE_LATENCY_S, speed)
        return Link(a[1].name, b[1].name, NETWORK_LATENCY_S, network_bytes_per_s)

    links = tuple(link(a, b) for a in devices for b in devices if a is not b)
    return Cluster(tuple(device for _, device in devices), links)


def kind_of(device: Device) -> str:
    """Which of DEVICES a device of a cluster made by `cluster` is."""
    return device.name.rpartition(".")[0]


def profile(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    world: World,
    options: Sequence[Precision],
    kv_bits: Sequence[KvBits] = (16,),
) -> Profile:
    """Analytic tables of a cluster made by `cluster`, and its links."""
    kinds = {device.name: kind_of(device) for device in cluster.devices}
    tables = {kind: Analytic(kind, world, spec).table(workload, options, kv_bits) for kind in set(kinds.values())}
    return Profile({name: tables[kind] for name, kind in kinds.items()}, cluster.links)


# The sensitivity of a layer by its depth (0 to 1) and a number drawn for it (0 to 1). All are SYNTHETIC.
SENSITIVITIES: dict[str, Callable[[float, float], float]] = {
    "flat": lambda depth, drawn: 1.0,
    "rising": lambda depth, drawn: 0.25 + 1.5 * depth,
    "uneven": lambda depth, drawn: 0.1 + 3.6 * drawn * drawn * drawn,
}


def sensitivity(spec: ModelSpec, name: str, options: Sequence[Precision], seed: int = 0) -> Sensitivity:
    """A synthetic sensitivity: omega falls with the square of the number of steps a weight has, on average 1 at 2 bit.

    The steps are LLM-PQ's, 2^(bits-1) - 1. Embedding and head are like a layer of weight 1.
    """
    drawn = random.Random(seed)
    weights = {"embedding": 1.0, "head": 1.0}
    for layer in range(spec.num_layers):
        weights[f"layer.{layer}"] = SENSITIVITIES[name](layer / max(1, spec.num_layers - 1), drawn.random())
    omega = {
        unit: {str(option): weights[unit] / (2 ** (option.bits - 1) - 1) ** 2 for option in options if option.quantized}
        for unit in spec.units
    }
    return Sensitivity(spec.name, spec.content_hash, f"synthetic: {name}", "none", omega)
