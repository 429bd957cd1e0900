"""The operations that a unit and a stage run in one step; their seconds add up to the step's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmpq.spec.costs import CostTable, Op
from llmpq.spec.model import ModelSpec
from llmpq.spec.plan import Plan
from llmpq.spec.precision import ActivationMode, UnitPrecision


@dataclass(frozen=True)
class Context:
    """How many keys the queries of a step attend to.

    Each of `spans` stands for consecutive queries of one sequence: the keys up to its first and up to its last query,
    each query's own included.
    """

    spans: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, *keys: float) -> Context:
        """One query for each of these numbers of keys."""
        return cls(tuple((count, count) for count in keys))

    @classmethod
    def of_prompts(cls, *lens: int) -> Context:
        """All queries of prompts of these lengths."""
        return cls(tuple((1, length) for length in lens))

    def keys(self, window: int | None = None) -> float:
        """Keys of a query on average, where none attends to more than `window`."""
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


def unit_ops(
    spec: ModelSpec,
    unit: str,
    option: UnitPrecision,
    activations: ActivationMode,
    tokens: int,
    rows: int,
    context: Context,
) -> list[Op]:
    """What a unit runs in a step of `tokens` tokens of `rows` sequences, whose queries have this context.

    The stage multiplies quantized weights in the mode `activations`.
    """
    linears, precisions = spec.linears(unit), spec.linear_precisions(unit, option)

    def linear(name: str, m: int) -> Op:
        shape, precision = linears[name], precisions[name]
        return Op("linear", m, shape.n, shape.k, precision=precision, activations=precision.multiplied(activations))

    if unit == "embedding":
        return [Op("embedding", tokens, spec.table.n, spec.table.k, precision=precisions["table"])]
    if unit == "head":
        return [linear("table", rows), Op("head_rest", m=rows, n=spec.table.n)]
    keys = context.keys(spec.layer_kind(int(unit.removeprefix("layer."))).window)
    attention = Op("attention", m=tokens, n=spec.num_heads * spec.head_dim, k=spec.kv_dim, context=keys)
    return [
        *(linear(name, tokens) for name in linears),
        attention,
        Op("layer_rest", m=tokens, n=spec.hidden_size, k=spec.intermediate_size),
    ]


def stage_ops(plan: Plan, spec: ModelSpec, index: int, tokens: int, rows: int, context: Context) -> Iterator[Op]:
    """What stage `index` of a plan runs in such a step."""
    yield Op("step")
    for unit in plan.units_of(index):
        yield from unit_ops(spec, unit, plan.precision(unit), plan.stages[index].activations, tokens, rows, context)


def stage_seconds(plan: Plan, spec: ModelSpec, index: int, table: CostTable) -> Callable[[int, int, Context], float]:
    """A function that returns the seconds of a stage's step by a device's table, given its tokens, rows and context.

    They are the sum of its `stage_ops` and, if there are other stages, of its messages. The function raises
    NotMeasuredError outside the measured range.
    """
    # Layers of one group and one precision are looked up once.
    groups = spec.layer_groups
    alike = {f"layer.{i}": f"layer.{groups.index(group)}" for i, group in enumerate(groups)}
    units = Counter((alike.get(unit, unit), plan.precision(unit)) for unit in plan.units_of(index))
    activations = plan.stages[index].activations
    message_s = table.message_s if len(plan.stages) > 1 else 0.0

    @functools.cache
    def seconds(tokens: int, rows: int, context: Context) -> float:
        fixed = table.seconds(Op("step")) + message_s
        return fixed + sum(
            count * sum(table.seconds(op) for op in unit_ops(spec, unit, precision, activations, tokens, rows, context))
            for (unit, precision), count in units.items()
        )

    return seconds
