"""The operations of `llmpq.measure.operation_grid` as calls that can be timed, under the conditions they will run in.

Up to a batch of tokens, operations are those of decode steps: where a stage replays these as graphs, they are timed in
graphs, with as many rows as a stage's graph has.

Linears, attention and the rest of a layer are timed inside real decoder layers, so that each finds caches as the others
leave them, and that together they make up the layer: on a CPU as a recorded program, which times its operations itself,
elsewhere with marks between them. Weights and KV cache are those of as many layers as the model has, up to
`cold_bytes`, and each pass takes the next layer: as in a stage, what a layer reads was last read a whole step ago.
Values do not matter for the time and are random. All this is held at once: for each precision some 128 MiB on a CPU and
8 times the L2 cache on a GPU, or a table and a layer of a larger model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from llmpq import kernels
from llmpq.kernels import Program
from llmpq.measure.expert_routing import ALIKE, ExpertShares
from llmpq.measure.operation_clock import Clock, Compute, GraphTimer
from llmpq.measure.operation_grid import Ranges, attention_ops, plain_ops
from llmpq.measure.random_layers import RandomLoader, random_weight
from llmpq.models.arena import Arena
from llmpq.models.decode_graph import Capture, graph_sizes
from llmpq.models.decoder import DecoderLayer, ForwardContext, Norm
from llmpq.models.decoder_stage import DecoderStage
from llmpq.models.ends import Embedding, Head
from llmpq.models.kv_cache import KVCache
from llmpq.models.linear import QuantLinear
from llmpq.models.rotary import rotary_tables
from llmpq.models.step import Step
from llmpq.spec import (
    W16,
    ActivationMode,
    KvBits,
    LayerKind,
    LinearShape,
    ModelSpec,
    Op,
    Precision,
    kv_dtype,
    product_op,
    rest_op,
)

CPU_COLD_BYTES = 64 * 2**20  # twice the last-level cache that a core can count on
COLD_CACHES = 4  # times the L2 cache of a GPU


def cold_bytes(device: torch.device) -> int:
    """Of weights, or of keys and values, that are read in turn, so that none is still in the device's cache."""
    if device.type == "cpu":
        return CPU_COLD_BYTES
    return COLD_CACHES * torch.cuda.get_device_properties(device).L2_cache_size


@dataclass(frozen=True, eq=False)
class Case:
    """Operations that are timed together."""

    ops: tuple[Op, ...]
    timed: Callable[[int], list[float]]  # seconds of each op, in the i-th turn
    backends: tuple[str, ...]  # of each op
    working_set_bytes: int
    graphed: bool = False


def _layer_seconds(times: list[float]) -> list[float]:
    """Of its linears in the order they run, attention and the rest, from the marks of one layer."""
    products, (before, attention, *others) = times[1::2], times[::2]
    return [*products, attention, before + sum(others)]


_QUANTIZED = Precision(4, 128)  # any
_ORDER = ("qkv", "out", "router", "up", "down", "shared_gate", "shared_up", "shared_down")  # in which products run


def _program_seconds(
    linears: Sequence[str], plain: Collection[str], names: Sequence[str], times: Sequence[float]
) -> list[float]:
    """The same from the operations of a layer's program; products that are `plain` count as the rest."""
    products = [seconds for name, seconds in zip(names, times, strict=True) if name in ("gemm", "grouped_gemm")]
    by_name = dict(zip((name for name in _ORDER if name in (*linears, *plain)), products, strict=True))
    attention = sum(seconds for name, seconds in zip(names, times) if name in ("rotate_and_store", "attention"))
    counted = [by_name[name] for name in linears]
    return [*counted, attention, sum(times) - sum(counted) - attention]


def steps(query_lens: Sequence[int], context_lens: Sequence[int], slots: int, tokens: Sequence[int] = ()) -> Step:
    """A step of these sequences, in slots 0, 1, ... and again from 0 where there are more; of `tokens`, or of 0s."""
    starts = [c - q for q, c in zip(query_lens, context_lens, strict=True)]
    step = Step.of([i % slots for i in range(len(starts))], query_lens, starts, tokens or [0] * sum(query_lens))
    step.sequences  # noqa: B018 - worked out now, not while something is recorded
    return step


def backend_of(layer: DecoderLayer) -> str:
    """That of a layer's products."""
    linear = layer.linear("qkv")
    assert isinstance(linear, QuantLinear)
    return linear.weight.backend


def without_windows(spec: ModelSpec) -> ModelSpec:
    """A model whose layers attend to all: a context of so many keys stands for a window of as many, too."""
    return replace(spec, layer_kinds=tuple(replace(kind, window=None) for kind in spec.layer_kinds))


def _read(kind: LayerKind, shape: LinearShape) -> float:
    """What part of a linear's weights is read for one token."""
    return 1.0 if shape.experts == 1 or kind.experts is None else kind.experts.per_token / shape.experts


class Cases:
    """Makes the cases of one model on one device."""

    def __init__(
        self,
        spec: ModelSpec,
        ranges: Ranges,
        device: torch.device,
        clock: Clock,
        capture: Capture | None = None,
        shares: ExpertShares = ALIKE,
        kv_bits: Sequence[KvBits] = (16,),
    ) -> None:
        """`capture` makes the graphs of decode steps, if the device's stages replay these.

        `shares` are those by which the model's routers choose. Attention is timed over KV caches of each of `kv_bits`.
        """
        self._spec, self._ranges, self._device, self._clock, self._capture = spec, ranges, device, clock, capture
        mixtures = {kind.experts for kind in spec.layer_kinds if kind.experts is not None}
        self._shares = {experts: shares.of(spec, experts) for experts in mixtures}
        self.dtype: torch.dtype = getattr(torch, spec.compute_dtype(device.type))
        self._length = ranges.positions
        self._backend = kernels.cache_backend(device, self.dtype)  # of what is no product
        self._cold_bytes = cold_bytes(device)
        self._caches = {bits: self._cold_cache(bits) for bits in kv_bits}
        self._rotary = rotary_tables(spec, self._length, self.dtype, device)
        self._arena = Arena(spec, ranges.tokens, self.dtype, device)

    def all(self, precisions: Sequence[Precision], activations: ActivationMode) -> list[Case]:
        """Every operation there is to time; products in the mode `activations`."""
        by_kind: dict[str, list[Op]] = {}
        for op in plain_ops(self._spec, self._ranges, precisions, activations):
            by_kind.setdefault(op.kind, []).append(op)
        cases = list(self._layer(precisions, activations))
        cases += [self._head_rest(op) for op in by_kind["head_rest"]]
        cases.append(self._step(Op("step")))
        for precision in precisions:
            cases += self._table(
                precision, *([op for op in by_kind[k] if op.precision == precision] for k in ("embedding", "linear"))
            )
        return cases

    def _cold_cache(self, bits: KvBits) -> KVCache:
        spec, slots = self._spec, self._ranges.batch
        dtype = kv_dtype(spec.compute_dtype(self._device.type), bits)
        layers = max(1, min(spec.num_layers, self._cold_bytes // spec.kv_bytes(slots * self._length, dtype)))
        shape = (layers, slots, self._length, spec.num_kv_heads, spec.head_dim)
        return KVCache(*shape, getattr(torch, dtype), self.dtype, self._device)

    def _graphed(self, m: int, precision: Precision = _QUANTIZED) -> bool:
        """Whether operations on m rows are timed in graphs, as are whole steps with experts of this precision."""
        if self._capture is None or m > self._ranges.batch:
            return False
        size = next(size for size in graph_sizes(self._ranges.batch) if size >= m)
        mixtures = [kind.experts for kind in self._spec.layer_kinds if kind.experts is not None]
        most = kernels.grouped_pairs(self._device, precision) if mixtures else 0
        return all(size * experts.per_token <= most for experts in mixtures)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self._device)

    def _layer(self, precisions: Sequence[Precision], activations: ActivationMode) -> Iterator[Case]:
        """Passes through layers with each mixture of experts there is, or none."""
        first = {self._spec.layer_kind(i).experts: i for i in reversed(range(self._spec.num_layers))}
        for index in sorted(first.values()):
            yield from self._layer_like(index, precisions, activations)

    def _layer_like(self, index: int, precisions: Sequence[Precision], activations: ActivationMode) -> Iterator[Case]:
        """Every precision and every context of attention at each m, in as few passes as they take."""
        spec, whole = self._spec, without_windows(self._spec)
        loader = RandomLoader(spec, self._device, self._clock, activations, self._shares)
        kind, linears = spec.layer_kind(index), spec.linears(f"layer.{index}")
        sizes = [sum(_read(kind, shape) * shape.weight_bytes(p) for shape in linears.values()) for p in precisions]
        layers = [
            [
                DecoderLayer(whole, loader, index, p)
                for _ in range(min(spec.num_layers, math.ceil(self._cold_bytes / size)))
            ]
            for p, size in zip(precisions, sizes, strict=True)
        ]
        attention: dict[int, list[tuple[Op, Step]]] = {}
        for op, lens in attention_ops(spec, self._ranges, [*self._caches]).items():
            attention.setdefault(op.m, []).append((op, steps(*lens, self._ranges.batch)))
        plain = spec.plain_linears(f"layer.{index}")
        timers = {
            bits: [self._layer_timer(stack, p, cache, [*linears], plain) for p, stack in zip(precisions, layers)]
            for bits, cache in self._caches.items()
        }
        for m, attentions in attention.items():
            rest = rest_op(spec, kind, m)
            for i in range(max(len(precisions), len(attentions))):
                which = i % len(precisions)
                precision, stack = precisions[which], layers[which]
                op, step = attentions[i % len(attentions)]
                products = [product_op(kind, s, m, precision, activations) for s in linears.values()]
                yield Case(
                    (*products, op, rest),
                    partial(timers[op.kv_bits][which], step),
                    (*[backend_of(stack[0])] * len(products), self._backend, self._backend),
                    int(len(stack) * sizes[which]),
                    self._graphed(m, precision),
                )

    def _layer_timer(
        self,
        stack: Sequence[DecoderLayer],
        precision: Precision,
        cache: KVCache,
        linears: Sequence[str],
        plain: Collection[str],
    ) -> Callable[[Step, int], list[float]]:
        """Of a step's operations in one of the layers in turn: of their `linears`, attention and the rest."""
        clock, hidden_states = self._clock, self._random(self._ranges.tokens, self._spec.hidden_size)

        def compute(tokens: torch.Tensor, sequences: kernels.Sequences, i: int) -> torch.Tensor:
            self._arena.begin(sequences.tokens)
            at = ForwardContext(sequences, self._rotary, self._arena)
            return stack[i % len(stack)](hidden_states[: sequences.tokens], at, cache, i % cache.num_layers)

        turns = max(len(stack), cache.num_layers)
        if backend_of(stack[0]) == "cpu":
            one = steps([1], [1], 1)
            programs = [Program(partial(compute, one.tokens, one.sequences, i)) for i in range(turns)]
            names = programs[0].names

            def of_program(step: Step, i: int) -> list[float]:
                return _program_seconds(linears, plain, names, clock.timed_program(programs[i % turns], step))

            return of_program
        timer = self._graph_timer(compute, turns)

        def timed(step: Step, i: int) -> list[float]:
            if timer is not None and self._graphed(step.num_tokens, precision):
                return _layer_seconds(timer(step))
            return _layer_seconds(clock.timed(lambda: compute(step.tokens, step.sequences, i)))

        return timed

    def _graph_timer(self, compute: Compute, copies: int) -> GraphTimer | None:
        if self._capture is None:
            return None
        return GraphTimer(compute, copies, self._ranges.batch, self._clock, self._capture)

    def _timed(self, compute: Compute, copies: int, step: Step) -> Callable[[int], list[float]]:
        """Of what `compute` does in a step."""
        clock, call = self._clock, partial(compute, step.tokens, step.sequences)
        if self._backend == "cpu":
            programs = [Program(partial(call, i)) for i in range(copies)]
            return lambda i: [sum(clock.timed_program(programs[i % copies], step))]
        timer = self._graph_timer(compute, copies)
        if timer is not None and self._graphed(step.num_tokens):
            return lambda i: [sum(timer(step))]
        return lambda i: [sum(clock.timed(lambda: call(i % copies)))]

    def _table(self, precision: Precision, embeddings: Sequence[Op], linears: Sequence[Op]) -> Iterator[Case]:
        """The table as embedding and as head."""
        spec, shape = self._spec, self._spec.table
        copies = min(4, -(-self._cold_bytes // precision.weight_bytes(shape.n, shape.k)))
        tables = [random_weight(shape, precision, spec, self._device) for _ in range(copies)]
        size, backend = sum(table.nbytes for table in tables), tables[0].backend

        def projection(unit: str) -> QuantLinear | None:
            of_unit = spec.plain_linears(unit).get("project")
            return None if of_unit is None else QuantLinear(random_weight(of_unit, W16, spec, self._device))

        learned = None if spec.position_offset is None else self._random(self._length, spec.hidden_size)
        modules = [Embedding(table, learned, projection("embedding")) for table in tables]
        for op in embeddings:
            whole, rest = divmod(op.m, self._length)
            lengths = [1] * op.m if self._graphed(op.m) else [self._length] * whole + [rest] * (rest > 0)
            step = steps(lengths, lengths, self._ranges.batch, torch.randint(shape.n, (op.m,)).tolist())

            def embed(tokens: torch.Tensor, sequences: kernels.Sequences, i: int) -> torch.Tensor:
                self._arena.begin(sequences.tokens)
                return modules[i](tokens, sequences, self._arena)

            yield Case((op,), self._timed(embed, copies, step), (backend,), size, self._graphed(op.m))
        most = self._ranges.batch
        hidden_states, logits = self._random(most, spec.hidden_size), self._random(most, shape.n)
        heads = [
            Head(None, projection("head"), QuantLinear(table, activations=linears[0].activations)) for table in tables
        ]
        for op in linears:
            if (op.n, op.k) == (shape.n, shape.k) and op.m <= most:

                def multiply(tokens: torch.Tensor, sequences: kernels.Sequences, i: int) -> torch.Tensor:
                    m = sequences.tokens
                    self._arena.begin(m)
                    return heads[i](hidden_states[:m], logits[:m], self._arena)

                step = steps([1] * op.m, [1] * op.m, most)
                yield Case((op,), self._timed(multiply, copies, step), (backend,), size, self._graphed(op.m))

    def _head_rest(self, op: Op) -> Case:
        """The final norm and greedy sampling."""
        spec = self._spec
        ones = torch.ones(spec.hidden_size, device=self._device)
        norm = Norm(spec.norm_eps, ones, ones if spec.norm == "layer" else None)
        step = steps([1] * op.m, [1] * op.m, self._ranges.batch)
        # As many as a graph has rows for so many sequences.
        most = next(size for size in graph_sizes(self._ranges.batch) if size >= op.m)
        hidden_states, logits = self._random(most, spec.hidden_size), self._random(most, spec.vocab_size)
        last, next_tokens = torch.empty_like(hidden_states), torch.empty(most, dtype=torch.int64, device=self._device)

        def compute(tokens: torch.Tensor, sequences: kernels.Sequences, i: int) -> torch.Tensor:
            m = sequences.tokens
            x = kernels.last_rows(hidden_states[:m], sequences, last[:m])
            if spec.final_norm:
                norm(x, hidden_states[:m])
            return kernels.argmax(logits[:m], next_tokens[:m])

        size = logits[: op.m].nbytes
        return Case((op,), self._timed(compute, 1, step), (self._backend,), size, self._graphed(op.m))

    def _step(self, op: Op) -> Case:
        """Describing a step and passing through a stage without layers."""
        recorded = self._backend == "cpu"
        cache = next(iter(self._caches.values()))
        stage = DecoderStage([], None, None, cache, self._rotary, self._arena, recorded=recorded)
        ones = [1] * self._ranges.batch
        graphed = self._graphed(len(ones))
        if graphed and self._capture is not None:
            stage.capture((len(ones),), self._capture)
        hidden_states = self._random(len(ones), self._spec.hidden_size)
        weights = torch.ones(self._cold_bytes // 4 if recorded else 0)

        def call() -> torch.Tensor:
            return stage(steps(ones, ones, len(ones)), hidden_states)

        def timed(i: int) -> list[float]:
            weights.sum()  # a step's weights drive the interpreter's own data from the caches
            return self._clock.timed(call)

        return Case((op,), timed, (self._backend,), hidden_states.nbytes, graphed)
