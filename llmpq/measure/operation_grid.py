"""The operations to time, so that a planner knows the cost of every plan for one model and a range of workloads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from llmpq.spec import (
    ActivationMode,
    Context,
    KvBits,
    LayerKind,
    ModelSpec,
    Op,
    Precision,
    Record,
    Workload,
    product_op,
    rest_op,
)


def _power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Ranges(Record):
    """How far a cost table must reach. Rounded up to powers of two: similar workloads share one measurement."""

    batch: int  # sequences in one step
    prompt: int  # tokens of one prompt
    length: int  # tokens of a sequence, with those of its answer
    tokens: int  # in one step of prefill

    @classmethod
    def of(cls, workload: Workload) -> Ranges:
        tokens = workload.largest_prefill(workload.batch_size)
        sizes = (workload.batch_size, workload.longest_prompt, workload.max_length, tokens)
        return cls(*map(_power_of_two, sizes))

    @property
    def positions(self) -> int:
        """Of a cache slot while attention is timed: queries of `prompt` tokens have contexts of `length` on average."""
        return max(self.length, self.prompt) + self.prompt // 2


def _grid(limit: int) -> list[int]:
    """Row counts up to a power of two: dense where kernels change from one row to few, then doubling."""
    return [m for m in (1, 2, 3, 4, 6, 8, 12) if m <= limit] + [1 << i for i in range(4, limit.bit_length())]


def plain_ops(
    spec: ModelSpec, ranges: Ranges, precisions: Sequence[Precision], activations: ActivationMode
) -> list[Op]:
    """Everything but attention: products in the mode `activations`, embeddings, the rest of layers, and of a step."""
    ops = [Op("step")]
    kinds = list(dict.fromkeys(LayerKind(experts=kind.experts) for kind in spec.layer_kinds))
    table = (spec.table.n, spec.table.k)
    for precision in precisions:
        products = {
            product_op(kind, shape, m, precision, activations): None
            for kind in kinds
            for shape in spec.linears_of(kind).values()
            for m in _grid(ranges.tokens)
        }
        heads = (product_op(LayerKind(), spec.table, m, precision, activations) for m in _grid(ranges.batch))
        ops += [*products, *(op for op in heads if op not in products)]
        ops += [Op("embedding", m, *table, precision=precision) for m in _grid(ranges.tokens)]
    ops += [rest_op(spec, kind, m) for kind in kinds for m in _grid(ranges.tokens)]
    ops += [Op("head_rest", m, spec.vocab_size) for m in _grid(ranges.batch)]
    return ops


def attention_ops(
    spec: ModelSpec, ranges: Ranges, kv_bits: Sequence[KvBits] = (16,)
) -> dict[Op, tuple[list[int], list[int]]]:
    """The attention to time, each with the lengths (query_lens, context_lens) of the sequences that make it up.

    All of it over KV caches of each of `kv_bits`.

    Up to `batch` tokens it is decode: a token of each of m sequences, over contexts up to `length`. Beyond, it is
    prefill: as many sequences as m tokens of whole prompts fill, over mean contexts up to half a prompt; and once with
    contexts of `length`, beyond the ends of prompts whose beginnings are known, and of those that are computed anew
    with their answers. Of every kind of layer; within a window, contexts are no longer than that allows.
    """
    points: dict[Op, tuple[list[int], list[int]]] = {}
    windows = list(dict.fromkeys(kind.window for kind in spec.layer_kinds))
    for m in _grid(ranges.tokens):
        decode = m <= ranges.batch
        usual = Context.of(ranges.length) if decode else Context.of_prompts(ranges.prompt)
        limits = [usual.keys(window) for window in windows]
        contexts = {x for limit in limits for x in (1.0, 1 + (limit - 1) / 3, limit)}
        contexts |= {Context.of(ranges.length).keys(window) for window in windows}
        for context, bits in product(sorted(contexts), kv_bits):
            count = m if decode else min(m, -(-m // min(ranges.prompt, int(2 * context - 1))))
            query_lens = [m // count + (i < m % count) for i in range(count)]
            # Queries at the end of their sequence: the first sees context_len - query_len + 1 keys, the last all.
            context_lens = [max(q, -int(-(context + (q - 1) / 2) // 1)) for q in query_lens]
            seen = sum(q * (c - (q - 1) / 2) for q, c in zip(query_lens, context_lens, strict=True)) / m
            op = Op("attention", m, spec.num_heads * spec.head_dim, spec.kv_dim, context=seen, kv_bits=bits)
            points[op] = (query_lens, context_lens)
    return points
