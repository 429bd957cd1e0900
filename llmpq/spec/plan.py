"""Plan: which device runs which layers, in which precision and in what micro-batches; all the runtime is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpq.spec.cluster import Cluster, Device
from llmpq.spec.errors import UsageError
from llmpq.spec.model import DTYPE_BYTES, Dtype, ModelSpec
from llmpq.spec.precision import Precision
from llmpq.spec.record import Record, check
from llmpq.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Stage(Record):
    """A contiguous run of decoder layers on one device (a list of devices: tensor parallelism will come)."""

    devices: tuple[str, ...]
    layers: tuple[int, int]  # first, and one past the last
    bits: tuple[int, ...]  # of each layer, for readers; follows from precisions
    precisions: tuple[Precision, ...]
    kv_bits: int = 32
    compute_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        check(len(self.devices) == 1, "devices", f"has {len(self.devices)} entries; this version runs one per stage")
        first, end = self.layers
        check(0 <= first <= end, "layers", f"is {list(self.layers)}, expected [first, one past the last]")
        count = len(self.precisions)
        check(count == end - first, "precisions", f"has {count} entries for {end - first} layers")
        bits = tuple(p.bits for p in self.precisions)
        check(self.bits == bits, "bits", f"is {list(self.bits)}, but precisions say {list(bits)}")
        kv_bits = 8 * DTYPE_BYTES[self.compute_dtype]
        check(self.kv_bits == kv_bits, "kv_bits", f"is {self.kv_bits}, expected compute_dtype's {kv_bits}")

    @property
    def device(self) -> str:
        return self.devices[0]


@dataclass(frozen=True, slots=True)
class Placement(Record):
    """Where the embedding or the LM head is, and in which precision."""

    stage: int
    precision: Precision


@dataclass(frozen=True, slots=True)
class Prediction(Record):
    """What the planner expects of a plan, and what a run measures: seconds of both phases, throughput, peak memory."""

    prefill_s: float
    decode_s: float
    tokens_per_s: float  # generated tokens over both phases
    memory_bytes: tuple[int, ...]  # of each stage, above the idle worker


@dataclass(frozen=True, slots=True)
class Solution(Record):
    """How good the plan is known to be. `objective` and `bound` are in the unit of what was minimised.

    That is seconds of a batch, plus theta * omega; or where cost is the objective, what the devices in use cost in that
    time, for a million generated tokens, in the currency of their prices.
    """

    solver: str
    objective: float
    bound: float  # no plan in the searched space is better than this
    seconds: float  # spent solving
    omega: float
    omega_budget: float | None

    @property
    def gap(self) -> float:
        return max(0.0, (self.objective - self.bound) / self.objective) if self.objective > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """All the runtime is told. Stage i runs on rank i; the first holds the embedding, the last the LM head."""

    SCHEMA = "llmpq.plan/1"

    model: str
    model_hash: str
    cluster: Cluster
    workload: Workload
    stages: tuple[Stage, ...]
    embedding: Placement
    head: Placement
    wire_dtype: Dtype
    slots: int  # sequences in the cache at once
    max_length: int  # tokens a slot can hold
    prefill_microbatch: int  # sequences
    decode_microbatch: int
    predicted: Prediction | None = None
    solution: Solution | None = None

    def __post_init__(self) -> None:
        check(len(self.stages) > 0, "stages", "is empty")
        names = {device.name for device in self.cluster.devices}
        end, used = 0, set()
        for i, stage in enumerate(self.stages):
            check(stage.layers[0] == end, f"stages[{i}].layers", f"begins at {stage.layers[0]}, expected {end}")
            check(stage.device in names, f"stages[{i}].devices", f"names {stage.device!r}, which the cluster lacks")
            check(stage.device not in used, f"stages[{i}].devices", f"names {stage.device!r} a second time")
            used.add(stage.device)
            end = stage.layers[1]
        check(self.embedding.stage == 0, "embedding.stage", f"is {self.embedding.stage}, expected the first stage, 0")
        last = len(self.stages) - 1
        check(self.head.stage == last, "head.stage", f"is {self.head.stage}, expected the last stage, {last}")
        for i, stage in enumerate(self.stages):
            for j, precision in enumerate(stage.precisions):
                self._check_multiplied(f"stages[{i}].precisions[{j}]", i, precision)
        for field in ("embedding", "head"):
            placement: Placement = getattr(self, field)
            self._check_multiplied(f"{field}.precision", placement.stage, placement.precision)
        for field in ("slots", "max_length", "prefill_microbatch", "decode_microbatch"):
            check(getattr(self, field) > 0, field, f"is {getattr(self, field)}, expected a positive number")

    def _check_multiplied(self, path: str, stage: int, precision: Precision) -> None:
        kind = self.cluster.device(self.stages[stage].device).kind
        check(
            precision == precision.on(kind, precision.activations),
            path,
            f"is {precision}, but a {kind} device multiplies in a16 alone",
        )

    @classmethod
    def single(
        cls,
        spec: ModelSpec,
        device: Device,
        precision: Precision,
        *,
        slots: int,
        max_length: int,
        dtype: Dtype = "float32",
    ) -> Plan:
        """The whole model on one device at one precision: the reference that pipelines are compared with."""
        layers = spec.num_layers
        return cls(
            model=spec.name,
            model_hash=spec.content_hash,
            cluster=Cluster((device,)),
            workload=Workload(slots, max(1, max_length - 1), 1),
            stages=(
                Stage(
                    devices=(device.name,),
                    layers=(0, layers),
                    bits=(precision.bits,) * layers,
                    precisions=(precision,) * layers,
                    kv_bits=8 * DTYPE_BYTES[dtype],
                    compute_dtype=dtype,
                ),
            ),
            embedding=Placement(0, precision),
            head=Placement(0, precision),
            wire_dtype=dtype,
            slots=slots,
            max_length=max_length,
            prefill_microbatch=slots,
            decode_microbatch=slots,
        )

    def with_precisions(self, units: Sequence[Precision]) -> Plan:
        """The same placement with these precisions: of the embedding, each layer, and the head."""
        stages = []
        for stage in self.stages:
            chosen = tuple(units[1 + stage.layers[0] : 1 + stage.layers[1]])
            stages.append(replace(stage, precisions=chosen, bits=tuple(p.bits for p in chosen)))
        return replace(
            self,
            stages=tuple(stages),
            embedding=replace(self.embedding, precision=units[0]),
            head=replace(self.head, precision=units[-1]),
            predicted=None,
            solution=None,
        )

    @property
    def cost_per_million_tokens(self) -> float | None:
        """What the devices in use cost while that many are generated, as predicted; None if one has no price."""
        prices = [self.cluster.device(stage.device).price_per_hour for stage in self.stages]
        if self.predicted is None or self.predicted.tokens_per_s == 0 or min(prices) == 0:
            return None
        return sum(prices) / 3600 * 1e6 / self.predicted.tokens_per_s

    @property
    def num_layers(self) -> int:
        return self.stages[-1].layers[1]

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step: a prefill micro-batch that was planned for, or one full slot."""
        prefill = self.workload.prefill_tokens(self.prefill_microbatch)
        return max(prefill, min(self.decode_microbatch, self.slots), self.max_length)

    @property
    def step_sequences(self) -> int:
        """Sequences of the largest step."""
        return min(self.slots, max(self.prefill_microbatch, self.decode_microbatch))

    def prefill_microbatches(self, prompt_lens: Sequence[int]) -> list[tuple[int, ...]]:
        """Sequences 0, 1, ... in order, at most prefill_microbatch of them and step_tokens tokens in each.

        Raises ValueError if a single prompt is longer than a step.
        """
        packed: list[list[int]] = []
        tokens, most = 0, self.step_tokens
        for sequence, length in enumerate(prompt_lens):
            if length > most:
                raise ValueError(f"sequence {sequence} has {length} tokens, more than the {most} of a step")
            if not packed or len(packed[-1]) == self.prefill_microbatch or tokens + length > most:
                packed.append([])
                tokens = 0
            packed[-1].append(sequence)
            tokens += length
        return [tuple(sequences) for sequences in packed]

    @property
    def instructions(self) -> Plan:
        """What of it the runtime carries out: without what is expected of it."""
        return replace(self, predicted=None, solution=None)

    def units_of(self, index: int) -> list[str]:
        """The units on stage `index`, in the model's order."""
        units = [f"layer.{i}" for i in range(*self.stages[index].layers)]
        return ["embedding"] * (index == 0) + units + ["head"] * (index == len(self.stages) - 1)

    def precision(self, unit: str) -> Precision:
        """The precision of "embedding", "head" or "layer.i"."""
        if unit in ("embedding", "head"):
            placement: Placement = getattr(self, unit)
            return placement.precision
        layer = int(unit.removeprefix("layer."))
        stage = next(s for s in self.stages if s.layers[0] <= layer < s.layers[1])
        return stage.precisions[layer - stage.layers[0]]

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UsageError unless the plan was made for this very model, and for devices that can run a stage."""
        for stage in self.stages:
            if (members := self.cluster.device(stage.device).members) > 1:
                raise UsageError(
                    f"{stage.device} stands for {members} devices that share a stage, which can be planned for but not "
                    "run yet; make a plan without groups of devices"
                )
        if any(kind.window is not None for kind in spec.layer_kinds):
            raise UsageError(
                f"{spec.name} has layers that attend within a window, which can be planned for but not run yet"
            )
        if self.model_hash != spec.content_hash or self.num_layers != spec.num_layers:
            raise UsageError(
                f"the plan was made for another model: {self.model} ({self.model_hash}), not {spec.name} "
                f"({spec.content_hash}); make one with `llmpq plan`"
            )


@dataclass(frozen=True, slots=True)
class Output(Record):
    """One finished sequence."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop": an end-of-sequence token; "length": the token limit


@dataclass(frozen=True, slots=True)
class Report(Record):
    """What a run writes: the plan, what it predicted, what was measured, what was said."""

    SCHEMA = "llmpq.report/1"

    model: str
    cluster: Cluster
    plan: Plan
    predicted: Prediction
    measured: Prediction
    outputs: tuple[Output, ...]
