"""The order of an outline's devices for which links cost least: found by moving one device or turning a run of them.

An outline says what each device computes; in whatever order, only links differ. A heuristic: it starts with the
nearest device again and again, and ends where no single change helps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from planner.clock import Clock
from planner.objective import FloatArray, decode_seconds, prefill_seconds
from planner.solver.orders import Order
from planner.solver.pool import LayerCounts, Pool
from planner.step_costs import StepCosts

LEAST_GAIN = 1e-9  # relative; less is rounding


def fastest_links(pool: Pool, outline: LayerCounts, clock: Clock) -> Order:
    """Such an order (numbers in the pool), from the outline's first device to its last one, or the best in time."""
    prefill, decode = (_Phase.of(pool, outline, phase) for phase in (pool.prefill, pool.decode))

    def seconds(order: Sequence[int]) -> float:
        first = prefill_seconds(prefill.resources(order), pool.prefill.count, pool.prefill.longest)
        return float(first + decode_seconds(decode.resources(order), pool.decode.rounds))

    best = _nearest(outline, pool.prefill.count * prefill.links + sum(n for n, _ in pool.decode.rounds) * decode.links)
    least, improved = seconds(best), True
    while improved:
        improved = False
        for order in _changed(best):
            if clock.over:
                return tuple(best)
            if (found := seconds(order)) < least * (1 - LEAST_GAIN):
                best, least, improved = order, found, True
                break
    return tuple(best)


@dataclass(frozen=True)
class _Phase:
    stages: FloatArray  # [devices in use] seconds of a step
    links: FloatArray  # [devices, devices] seconds of its hidden states
    back: float  # of the tokens' way back

    @classmethod
    def of(cls, pool: Pool, outline: LayerCounts, phase: StepCosts) -> _Phase:
        at = list(pool.devices)
        layers = phase.units[pool.costs.group_units][:, at].swapaxes(0, 1)  # [devices, groups, options]
        stages = (outline.counts * layers).sum(axis=(1, 2)) + phase.fixed(at, alone=False)
        if outline.narrow is not None:
            changes = phase.narrow[pool.costs.group_units][:, at].T  # [devices, groups]
            stages += outline.narrow * (outline.counts.sum(axis=2) * changes).sum(axis=1)
        stages[outline.first] += phase.units[0, at[outline.first], outline.first_option]
        stages[outline.last] += phase.units[-1, at[outline.last], outline.last_option]
        hidden, tokens = pool.link_seconds(phase)
        return cls(stages[outline.used], hidden, float(tokens[outline.last, outline.first]))

    def resources(self, order: Sequence[int]) -> FloatArray:
        return np.concatenate([self.stages, self.links[order[:-1], order[1:]], [self.back]])


def _nearest(outline: LayerCounts, links: FloatArray) -> list[int]:
    """From the first device on, always to the one with the fastest link of those that are left."""
    order, left = [outline.first], [d for d in outline.used if d not in (outline.first, outline.last)]
    while left:
        order.append(left.pop(int(links[order[-1], left].argmin())))
    return [*order, outline.last]


def _changed(order: list[int]) -> Iterator[list[int]]:
    """One of the devices between the ends elsewhere between them, or a run of them the other way around."""
    inner = range(1, len(order) - 1)
    for i in inner:
        rest = order[:i] + order[i + 1 :]
        yield from ([*rest[:j], order[i], *rest[j:]] for j in inner if j != i)
    for i in inner:
        yield from (order[:i] + order[i : j + 1][::-1] + order[j + 1 :] for j in inner if j > i + 1)
