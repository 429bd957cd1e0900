"""What a unit and a stage run in one step: the operations whose seconds add up to the step's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator

from llmpq.spec.costs import CostTable, Op
from llmpq.spec.model import ModelSpec
from llmpq.spec.plan import Plan
from llmpq.spec.precision import Precision


def unit_ops(spec: ModelSpec, unit: str, precision: Precision, tokens: int, rows: int, context: float) -> list[Op]:
    """What a unit runs in a step of `tokens` tokens of `rows` sequences; a query sees `context` keys on average."""
    table = spec.table
    if unit == "embedding":
        return [Op("embedding", m=tokens, n=table.n, k=table.k, precision=precision)]
    if unit == "head":
        return [Op("linear", m=rows, n=table.n, k=table.k, precision=precision), Op("head_rest", m=rows, n=table.n)]
    linears = [
        Op("linear", m=tokens, n=linear.n, k=linear.k, precision=precision) for linear in spec.layer_linears.values()
    ]
    attention = Op("attention", m=tokens, n=spec.num_heads * spec.head_dim, k=spec.kv_dim, context=context)
    return [*linears, attention, Op("layer_rest", m=tokens, n=spec.hidden_size, k=spec.intermediate_size)]


def stage_ops(plan: Plan, spec: ModelSpec, index: int, tokens: int, rows: int, context: float) -> Iterator[Op]:
    """What stage `index` of a plan runs in such a step."""
    yield Op("step")
    for unit in plan.units_of(index):
        yield from unit_ops(spec, unit, plan.precision(unit), tokens, rows, context)


def stage_seconds(plan: Plan, spec: ModelSpec, index: int, table: CostTable) -> Callable[[int, int, float], float]:
    """How long a stage is at a step by a device's table: seconds, given its tokens, rows and context.

    They are what its `stage_ops` add up to and, if there are other stages, what its messages take. What is returned
    raises NotMeasuredError outside the measured range.
    """
    # Layers are alike; those of one precision are looked up once.
    units = Counter((unit.partition(".")[0], plan.precision(unit)) for unit in plan.units_of(index))
    message_s = table.message_s if len(plan.stages) > 1 else 0.0

    @functools.cache
    def seconds(tokens: int, rows: int, context: float) -> float:
        fixed = table.seconds(Op("step")) + message_s
        return fixed + sum(
            count * sum(table.seconds(op) for op in unit_ops(spec, unit, precision, tokens, rows, context))
            for (unit, precision), count in units.items()
        )

    return seconds
