"""Plan: which device runs which layers, in which precision and in what micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmpq.spec.cluster import Cluster, Device
from llmpq.spec.errors import UsageError
from llmpq.spec.layers import LayerKind, blocks_for
from llmpq.spec.model import Dtype, KvBits, KvDtype, ModelSpec, kv_dtype
from llmpq.spec.precision import GIVEN, ActivationMode, Mixed, Native, UnitPrecision, Width
from llmpq.spec.ranges import Count, Index, Sequences
from llmpq.spec.record import Record, check
from llmpq.spec.workload import Workload


@dataclass(frozen=True, slots=True)
class Stage(Record):
    """A contiguous run of decoder layers on one device, and how the device multiplies."""

    device: str
    layers: tuple[Index, Index]  # first, and one past the last
    precisions: tuple[UnitPrecision, ...]  # of each layer
    activations: ActivationMode = "a16"
    compute_dtype: Dtype = "float32"  # of activations
    kv_bits: KvBits = 16  # of the KV cache

    def validate(self) -> None:
        first, end = self.layers
        check(0 <= first <= end, "layers", f"is {list(self.layers)}, expected [first, one past the last]")
        count = len(self.precisions)
        check(count == end - first, "precisions", f"has {count} entries for {end - first} layers")

    @property
    def widths(self) -> tuple[Width | str, ...]:
        """Of each layer; of a mixed one those of its linears, as `4/3/3/4`."""
        return tuple(precision.width for precision in self.precisions)

    @property
    def kv_dtype(self) -> KvDtype:
        """What the KV cache holds."""
        return kv_dtype(self.compute_dtype, self.kv_bits)


@dataclass(frozen=True, slots=True)
class Placement(Record):
    """Where the embedding or the LM head is, and in which precision."""

    stage: int
    precision: UnitPrecision


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """What the runtime carries out. Stage i runs on rank i; the first holds the embedding, the last the LM head."""

    SCHEMA = "llmpq.plan/2"

    model: str
    model_hash: str
    cluster: Cluster
    workload: Workload
    stages: tuple[Stage, ...]
    embedding: Placement
    head: Placement
    wire_dtype: Dtype
    slots: Sequences  # sequences in the cache at once
    max_length: Count  # tokens a slot can hold
    prefill_microbatch: Sequences  # sequences
    decode_microbatch: Sequences
    max_prompt_len: Index = 0  # tokens; 0: as in the workload
    kv_blocks: Index = 0  # of KV_BLOCK tokens, in the cache of each layer that keeps all; 0: what full slots need
    chunk_tokens: Index = 0  # of prompts, in a step in which others decode; 0: prompts are in steps of their own

    def validate(self) -> None:
        check(len(self.stages) > 0, "stages", "is empty")
        names = {device.name for device in self.cluster.devices}
        end, used = 0, set()
        for i, stage in enumerate(self.stages):
            check(stage.layers[0] == end, f"stages[{i}].layers", f"begins at {stage.layers[0]}, expected {end}")
            check(stage.device in names, f"stages[{i}].device", f"names {stage.device!r}, which the cluster lacks")
            check(stage.device not in used, f"stages[{i}].device", f"names {stage.device!r} a second time")
            used.add(stage.device)
            end = stage.layers[1]
        check(self.embedding.stage == 0, "embedding.stage", f"is {self.embedding.stage}, expected the first stage, 0")
        last = len(self.stages) - 1
        check(self.head.stage == last, "head.stage", f"is {self.head.stage}, expected the last stage, {last}")
        check(
            self.kv_blocks == 0 or self.kv_blocks >= self.slot_blocks,
            "kv_blocks",
            f"is {self.kv_blocks}, but a sequence of max_length tokens needs {self.slot_blocks}",
        )
        for i, stage in enumerate(self.stages):
            kind = self.cluster.device(stage.device).kind
            check(
                kind == "cpu" or stage.activations == "a16",
                f"stages[{i}].activations",
                f"is {stage.activations!r}, but a {kind} device multiplies in a16 alone",
            )

    @classmethod
    def single(
        cls,
        spec: ModelSpec,
        device: Device,
        precision: UnitPrecision,
        *,
        slots: int,
        max_length: int,
        activations: ActivationMode = "a16",
        dtype: Dtype = "float32",
        kv_bits: KvBits = 16,
    ) -> Plan:
        """The whole model on one device at one precision: the reference that pipelines are compared with."""
        layers = spec.num_layers
        stage = Stage(device.name, (0, layers), (precision,) * layers, activations, dtype, kv_bits)
        return cls(
            model=spec.name,
            model_hash=spec.content_hash,
            cluster=Cluster((device,)),
            workload=Workload(slots, max(1, max_length - 1), 1),
            stages=(stage,),
            embedding=Placement(0, precision),
            head=Placement(0, precision),
            wire_dtype=dtype,
            slots=slots,
            max_length=max_length,
            prefill_microbatch=slots,
            decode_microbatch=slots,
        )

    def with_precisions(self, units: Sequence[UnitPrecision]) -> Plan:
        """The same placement with these precisions: of the embedding, each layer, and the head."""
        layers = units[1:-1]
        return replace(
            self,
            stages=tuple(replace(stage, precisions=tuple(layers[slice(*stage.layers)])) for stage in self.stages),
            embedding=replace(self.embedding, precision=units[0]),
            head=replace(self.head, precision=units[-1]),
        )

    def resized(self, slots: int, max_length: int) -> Plan:
        """The same stages and weights for `slots` sequences at once, of up to `max_length` tokens.

        A step has as many, too, at most. Without the caps, which were not planned for that.
        """
        devices = tuple(replace(device, memory_bytes=None) for device in self.cluster.devices)
        return replace(
            self,
            cluster=replace(self.cluster, devices=devices),
            workload=Workload(slots, 1, max(1, max_length - 1)),
            slots=slots,
            max_length=max_length,
            prefill_microbatch=slots,
            decode_microbatch=max(1, slots // len(self.stages)),
            max_prompt_len=max_length,
            kv_blocks=0,
        )

    def reach(self, longest_prompt: int = 1) -> Workload:
        """All that the plan has room for, with prompts as long as it was made for, or longer."""
        prompt = min(max(longest_prompt, self.workload.longest_prompt), max(1, self.max_length - 1))
        return Workload(self.slots, prompt, max(1, self.max_length - prompt))

    def longest_query(self, spec: ModelSpec) -> int:
        """Tokens that one sequence may have in a step: what layers within a window have room for."""
        return self.max_length if self.keeps_all(spec) else self.new_tokens

    def keeps_all(self, spec: ModelSpec) -> bool:
        """Whether every layer keeps all positions of a slot."""
        return all(self.cached_tokens(kind) >= self.max_length for kind in spec.layer_kinds)

    def cached_tokens(self, kind: LayerKind) -> int:
        """Positions of a slot that a layer keeps, in whole blocks."""
        return kind.cached_tokens(self.max_length, self.new_tokens)

    @property
    def slot_blocks(self) -> int:
        """Blocks of the KV cache that a sequence of max_length tokens needs."""
        return blocks_for(self.max_length)

    @property
    def cache_blocks(self) -> int:
        """Blocks of the KV cache for all sequences together, where layers keep all of their tokens."""
        return self.kv_blocks or self.slots * self.slot_blocks

    @property
    def new_tokens(self) -> int:
        """The most that one step adds to a sequence; layers within a window keep room for them."""
        return self.max_prompt_len or self.workload.longest_prompt

    @property
    def kv_bits(self) -> KvBits:
        """Of the KV cache; the fewest, where stages differ."""
        return min(stage.kv_bits for stage in self.stages)

    @property
    def num_layers(self) -> int:
        return self.stages[-1].layers[1]

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step: a prefill micro-batch that was planned for, or one full slot."""
        prefill = self.workload.prefill_tokens(self.prefill_microbatch)
        return max(prefill, min(self.decode_microbatch, self.slots), self.max_length)

    @property
    def recomputes(self) -> bool:
        """Whether the blocks may run out, so that a sequence gives its own back and is computed anew."""
        return self.cache_blocks < self.slots * self.slot_blocks

    @property
    def planned_step(self) -> tuple[int, int]:
        """Tokens and sequences that memory is for: of the workload's steps, or of any where it may recompute."""
        prefill = self.step_tokens if self.recomputes else self.workload.prefill_tokens(self.prefill_microbatch)
        decode = self.decode_microbatch
        both = min(self.chunk_tokens, prefill) + min(decode, self.slots - 1) if self.chunk_tokens else 0
        return max(prefill, decode, min(both, self.step_tokens)), max(self.prefill_microbatch, decode)

    @property
    def step_sequences(self) -> int:
        """Sequences of the largest step."""
        return min(self.slots, max(self.prefill_microbatch, self.decode_microbatch))

    def prefill_microbatches(self, prompt_lens: Sequence[int]) -> list[tuple[int, ...]]:
        """Sequences 0, 1, ... in order, at most prefill_microbatch of them and step_tokens tokens in each.

        No more than the cache has blocks for. Raises ValueError if a single prompt is longer than a step.
        """
        packed: list[list[int]] = []
        tokens, blocks, most = 0, 0, self.step_tokens
        for sequence, length in enumerate(prompt_lens):
            if length > most:
                raise ValueError(f"sequence {sequence} has {length} tokens, more than the {most} of a step")
            full = tokens + length > most or blocks + blocks_for(length) > self.cache_blocks
            if not packed or len(packed[-1]) == self.prefill_microbatch or full:
                packed.append([])
                tokens = blocks = 0
            packed[-1].append(sequence)
            tokens += length
            blocks += blocks_for(length)
        return [tuple(sequences) for sequences in packed]

    def units_of(self, index: int) -> list[str]:
        """The units on stage `index`, in the model's order."""
        units = [f"layer.{i}" for i in range(*self.stages[index].layers)]
        if index == self.embedding.stage:
            units.insert(0, "embedding")
        if index == self.head.stage:
            units.append("head")
        return units

    def precision(self, unit: str) -> UnitPrecision:
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
        for unit in spec.units if self.num_layers == spec.num_layers else ():
            if isinstance(option := self.precision(unit), Mixed):
                spec.linear_precisions(unit, option)
        known = {spec.content_hash, spec.source_hash or spec.content_hash}
        if self.model_hash not in known or self.num_layers != spec.num_layers:
            raise UsageError(
                f"the plan was made for another model: {self.model} ({self.model_hash}), not {spec.name} "
                f"({spec.content_hash}); make one with `llmpq plan`"
            )
        for unit in () if self.model_hash == spec.content_hash else spec.units:
            if not _is_stored(spec, unit, wanted := self.precision(unit)):
                raise UsageError(
                    f"the plan has {unit} in {wanted}, but {spec.name} was quantized to another precision; run the "
                    "plan it was quantized for, or make one for it with `llmpq plan`"
                )


def _is_stored(spec: ModelSpec, unit: str, option: UnitPrecision) -> bool:
    """Whether a quantized model stores a unit as a plan for the model that it was made from asks for."""
    stored = spec.stored.get(unit, {})
    if option.quantized and not isinstance(option, Native):
        return stored == {name: of for name, of in spec.linear_precisions(unit, option).items() if of.quantized}
    # Native is what the source's file had, so none of what is made here.
    return bool(stored) == option.quantized and all(of.quantizer in GIVEN for of in stored.values())
