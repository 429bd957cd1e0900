"""The operations that a unit and a stage run in one step; their seconds add up to the step's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llmpq.spec.costs import CostTable, Op
from llmpq.spec.layers import LayerKind, LinearShape
from llmpq.spec.model import KvBits, ModelSpec
from llmpq.spec.plan import Plan
from llmpq.spec.precision import ActivationMode, Precision, UnitPrecision


@dataclass(frozen=True)
class Context:
    """How many keys the queries of a step attend to.

    Each of `spans` stands for consecutive queries of one sequence: the keys up to its first and up to its last query,
    each query's own included. In a step with prompts `decoding` has those of the single queries beside them, whose keys
    no other query shares: they take longer.
    """

    spans: tuple[tuple[float, float], ...]
    decoding: tuple[float, ...] = ()

    @classmethod
    def of_step(cls, spans: Sequence[tuple[float, float]]) -> Context:
        """Of a step that is carried out, with a span for each of its sequences."""
        longer = tuple(span for span in spans if span[0] < span[1])
        if not longer:
            return cls(tuple(spans))
        return cls(longer, tuple(first for first, last in spans if first == last))

    @classmethod
    def of(cls, *keys: float) -> Context:
        """One query for each of these numbers of keys."""
        return cls(tuple((count, count) for count in keys))

    @classmethod
    def of_prompts(cls, *lens: int) -> Context:
        """All queries of prompts of these lengths."""
        return cls(tuple((1, length) for length in lens))

    def keys(self, window: int | None = None) -> float:
        """Keys of a query on average, where none attends to more than `window`; without those `decoding`."""
        if window not in self._known:
            attended = sum(_attended(first, last, window) for first, last in self.spans)
            self._known[window] = attended / sum(last - first + 1 for first, last in self.spans)
        return self._known[window]

    @functools.cached_property
    def _known(self) -> dict[int | None, float]:
        return {}


def _attended(first: float, last: float, window: int | None) -> float:
    """The sum of min(keys, window) over keys = first, first + 1, ..., last."""
    if window is None or last <= window:
        return (last - first + 1) * (first + last) / 2
    if first >= window:
        return (last - first + 1) * window
    return _attended(first, window, None) + (last - window) * window


def product_op(
    kind: LayerKind, shape: LinearShape, tokens: int, precision: Precision, activations: ActivationMode
) -> Op:
    """A linear of a layer of this kind, or that of all its experts, for so many tokens; in the mode of a stage."""
    mode = precision.multiplied(activations)
    if shape.experts == 1 or kind.experts is None:
        return Op("linear", tokens, shape.n, shape.k, precision=precision, activations=mode)
    rows, count = tokens * kind.experts.per_token, float(shape.experts)
    return Op("experts", rows, shape.n, shape.k, count, precision, mode)


def rest_op(spec: ModelSpec, kind: LayerKind, tokens: int) -> Op:
    """What a layer of this kind computes beside linears and attention."""
    experts = kind.experts
    if experts is None:
        return Op("layer_rest", tokens, spec.hidden_size, spec.intermediate_size)
    activated = experts.per_token * experts.intermediate_size + experts.shared_size
    return Op("layer_rest", tokens, spec.hidden_size, activated, float(experts.count))


def unit_ops(
    spec: ModelSpec,
    unit: str,
    option: UnitPrecision,
    activations: ActivationMode,
    tokens: int,
    rows: int,
    context: Context,
    kv_bits: KvBits = 16,
) -> list[Op]:
    """What a unit runs in a step of `tokens` tokens whose queries have this context; the head takes `rows` of them.

    The stage multiplies quantized weights in the mode `activations`, and its KV cache has `kv_bits`.
    """
    linears, precisions = spec.linears(unit), spec.linear_precisions(unit, option)
    if unit in ("embedding", "head"):
        precision = precisions["table"]
        if unit == "embedding":
            return [Op("embedding", tokens, spec.table.n, spec.table.k, precision=precision)]
        if rows == 0:
            return []
        table = product_op(LayerKind(), spec.table, rows, precision, activations)
        return [table, Op("head_rest", m=rows, n=spec.table.n)]
    kind = spec.layer_kind(int(unit.removeprefix("layer.")))
    beside = len(context.decoding)
    parts = [(tokens - beside, context), *([(beside, Context.of(*context.decoding))] if beside else [])]

    def attention(queries: int, keys: float) -> Op:
        width = spec.num_heads * spec.head_dim
        return Op("attention", m=queries, n=width, k=spec.kv_dim, context=keys, kv_bits=kv_bits)

    return [
        *(product_op(kind, shape, tokens, precisions[name], activations) for name, shape in linears.items()),
        *(attention(m, of.keys(kind.window)) for m, of in parts),
        rest_op(spec, kind, tokens),
    ]


def stage_ops(plan: Plan, spec: ModelSpec, index: int, tokens: int, rows: int, context: Context) -> Iterator[Op]:
    """What stage `index` of a plan runs in such a step."""
    stage = plan.stages[index]
    yield Op("step")
    for unit in plan.units_of(index):
        yield from unit_ops(spec, unit, plan.precision(unit), stage.activations, tokens, rows, context, stage.kv_bits)


def stage_seconds(plan: Plan, spec: ModelSpec, index: int, table: CostTable) -> Callable[[int, int, Context], float]:
    """A function that returns the seconds of a stage's step by a device's table, given its tokens, rows and context.

    They are the sum of its `stage_ops` and, if there are other stages, of its messages. The function raises
    NotMeasuredError outside the measured range.
    """
    # Layers of one group and one precision are looked up once.
    groups = spec.layer_groups
    alike = {f"layer.{i}": f"layer.{groups.index(group)}" for i, group in enumerate(groups)}
    units = Counter((alike.get(unit, unit), plan.precision(unit)) for unit in plan.units_of(index))
    activations, kv_bits = plan.stages[index].activations, plan.stages[index].kv_bits
    message_s = table.message_s if len(plan.stages) > 1 else 0.0

    @functools.cache
    def seconds(tokens: int, rows: int, context: Context) -> float:
        fixed = table.seconds(Op("step")) + message_s
        return fixed + sum(
            count * sum(map(table.seconds, unit_ops(spec, *of_unit, activations, tokens, rows, context, kv_bits)))
            for of_unit, count in units.items()
        )

    return seconds
