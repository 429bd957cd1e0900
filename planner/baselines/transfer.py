"""LLM-PQ's heuristic, "bitwidth transfer": from the least sensitive bits on, relieve the slowest stage step by step.

The straggler is the stage with most work, the pioneers are the others, the one with least work first. A transfer gives
a pioneer k layers of b' bits and the straggler in turn one layer of b bits that takes their room: 16 for two of 8, 8
for two of 4, 16 for four of 4; or it moves one layer. On each stage the least sensitive layers then get the fewest
bits. The first pioneer with a transfer that improves the objective gets the best of its transfers, within memory and
the quality budget. The search ends when no transfer improves it.

LLM-PQ has just these transfers and moves layers of 8 or 4 bits; here all allowed widths take part, b over b'
(rounded down) for one. Its work of a stage is (m_p - 1) P + (m_d - 1)(n - 1) D, here m_p P + (n - 1) m_d D, as the
decode term is in objective.py; its gain is in its own formula and theta times sensitivity, here in the objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.baselines.ordered_costs import OrderedCosts, Splits
from planner.clock import NEVER, Clock
from planner.objective import Assignment, FloatArray, IntArray

LEAST_GAIN = 1e-9  # relative; less is rounding


@dataclass(frozen=True)
class _State:
    split: Splits  # one
    assignment: Assignment
    objective: float


def transferred(line: OrderedCosts, pair: int, assignment: Assignment, clock: Clock = NEVER) -> Assignment:
    """The assignment that transfers lead to from a feasible one in time."""
    state = _state(line, pair, assignment)
    while (better := _step(line, state, clock)) is not None:
        state = better
    return state.assignment


def _state(line: OrderedCosts, pair: int, assignment: Assignment) -> _State:
    """Its objective is inf if memory, a limit of latency or the quality budget does not hold."""
    split = line.split_of(assignment, pair)
    omega = float(line.costs.omega[np.arange(len(assignment.options)), assignment.options].sum())
    objective = float(line.seconds(split)[0]) + line.costs.constraints.theta * omega
    return _State(split, assignment, objective if omega <= line.costs.omega_budget else math.inf)


def _step(line: OrderedCosts, state: _State, clock: Clock) -> _State | None:
    """The first gain, pioneer after pioneer; None: there is none, or no time."""
    split, pair = state.split, int(state.split.pair[0])
    work = line.sizes.microbatches[pair] * line.prefill.seconds(split)[0]
    work = work + line.sizes.rounds[:, pair].prod(axis=0).sum() * line.decode.seconds(split)[0]
    *pioneers, straggler = np.argsort(work, kind="stable").tolist()
    for pioneer in pioneers:
        if clock.over:
            break
        moved = split.by_option + _transfers(line)[:, None, :] * _signs(len(work), pioneer, straggler)
        moved = moved[(moved >= 0).all(axis=(1, 2)) & (moved[:, 1:-1].sum(axis=2) > 0).all(axis=1)]
        candidates = line.splits(moved, *(np.repeat(of, len(moved)) for of in (split.first, split.last, split.pair)))
        seconds: FloatArray = line.seconds(candidates)
        for s in np.argsort(seconds, kind="stable").tolist():
            if not seconds[s] < state.objective:
                break
            found = _state(line, pair, line.assignment(candidates, s))
            if found.objective < state.objective * (1 - LEAST_GAIN):
                return found
    return None


def _transfers(line: OrderedCosts) -> IntArray:
    """Layers by option [transfers, options] that a pioneer gets; it gives those below 0."""
    bits = line.costs.bits
    one = np.eye(len(bits), dtype=np.int64)
    moves = [one[o] for o in range(len(bits))]
    swaps = [b // c * one[j] - one[i] for i, b in enumerate(bits) for j, c in enumerate(bits) if b > c]
    return np.array(moves + swaps)


def _signs(positions: int, pioneer: int, straggler: int) -> IntArray:
    """[positions, 1]: 1 for the stage that gets, -1 for the one that gives."""
    signs = np.zeros((positions, 1), dtype=np.int64)
    signs[pioneer], signs[straggler] = 1, -1
    return signs
