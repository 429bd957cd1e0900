"""From a draft to a plan that keeps the limits, and to a better one, by small changes: fast, and without any promise.

A change gives one unit another option, gives the first or the last unit of a stage to the neighbour, or exchanges the
options of two units. While limits are broken, the change is taken that mends most for the time it costs; then the one
that saves most time, until none does.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from planner.clock import Clock
from planner.objective import SLACK, Assignment, FloatArray, IntArray, Program, decode_seconds, prefill_seconds

EXCHANGED = 8  # units of one option, those that gain most by another one, that are tried for an exchange
LEAST = 1e-9  # relative; less is rounding
LEAST_COST = 1e-4  # of the objective, that mending is taken to cost at least


def improved(program: Program, assignment: Assignment, clock: Clock) -> tuple[Assignment, float]:
    """What changes lead to in time, and by how much it still breaks limits: the sum of the shares of them.

    The caches of its positions stay as they are.
    """
    program = program.of_caches(assignment.narrow)
    state = _State.of(program, assignment)
    while True:
        changes = _changes(state)
        broken, objective = state.worth(changes)
        now_broken, now = float(broken[-1]), float(objective[-1])  # the last change changes nothing
        cost = objective / now - 1
        if now_broken > 0:
            score = np.where(broken < now_broken - LEAST, (now_broken - broken) / np.maximum(cost, LEAST_COST), 0.0)
        else:
            score = np.where((broken <= 0) & (cost < -LEAST), -cost, 0.0)
        best = int(score.argmax())
        if score[best] <= 0 or clock.over:
            return state.assignment, now_broken
        state = _State.of(program, changes.applied(state.assignment, best))


@dataclass(frozen=True)
class _Changes:
    """Changes of two units each; where it is one, it is named twice."""

    units: IntArray  # [changes, 2]
    positions: IntArray  # [changes, 2] then
    options: IntArray  # [changes, 2] then

    def applied(self, assignment: Assignment, change: int) -> Assignment:
        positions, options = assignment.positions.copy(), assignment.options.copy()
        positions[self.units[change]] = self.positions[change]
        options[self.units[change]] = self.options[change]
        return replace(assignment, positions=positions, options=options)


@dataclass(frozen=True)
class _State:
    program: Program
    assignment: Assignment
    sums: FloatArray  # [3, positions] seconds of prefill and of decode, bytes
    omega: float

    @classmethod
    def of(cls, program: Program, assignment: Assignment) -> _State:
        every = np.arange(len(assignment.positions))
        sums = np.stack([program.prefill_step, program.decode_step, program.memory_fixed])
        for of_sums, costs in zip(sums, (program.prefill, program.decode, program.memory)):
            np.add.at(of_sums, assignment.positions, costs[every, assignment.positions, assignment.options])
        omega = program.omega[every, assignment.positions, assignment.options]
        return cls(program, assignment, sums, float(omega.sum()))

    def worth(self, changes: _Changes) -> tuple[FloatArray, FloatArray]:
        """[changes] By how much limits are broken then, the sum of the shares of them; and seconds and theta omega."""
        p, rows = self.program, np.arange(len(changes.units))
        sums, omega = np.repeat(self.sums[:, None], len(rows), axis=1), np.full(len(rows), self.omega)
        for i in range(2):
            unit, to, option = changes.units[:, i], changes.positions[:, i], changes.options[:, i]
            at, had = self.assignment.positions[unit], self.assignment.options[unit]
            counts = 1.0 if i == 0 else (unit != changes.units[:, 0]).astype(float)
            for of_sums, costs in zip(sums, (p.prefill, p.decode, p.memory)):
                of_sums[rows, at] -= counts * costs[unit, at, had]
                of_sums[rows, to] += counts * costs[unit, to, option]
            omega += counts * (p.omega[unit, to, option] - p.omega[unit, at, had])
        prefill, decode = _with_links(sums[0], p.prefill_links), _with_links(sums[1], p.decode_links)
        prefill_s = prefill_seconds(prefill, p.prefill_microbatches, p.prefill_longest)
        decode_s = decode_seconds(decode, p.decode_rounds)
        broken = _excess(omega, p.omega_budget) + _excess(sums[2], p.capacity).sum(axis=1)
        broken += _excess(prefill_s, p.max_ttft_s) + _excess(decode_s, p.max_tpot_s * max(p.rounds, 1))
        return broken, prefill_s + decode_s + p.theta * omega


def _with_links(stages: FloatArray, links: FloatArray) -> FloatArray:
    """[changes, stages and links] of stages [changes, positions] and links."""
    return np.concatenate([stages, np.broadcast_to(links, (len(stages), len(links)))], axis=1)


def _excess(found: FloatArray, limit: float | FloatArray) -> FloatArray:
    """By how much a limit is exceeded, as a share of it; of a limit of 0 as it is."""
    unit = np.where(np.isinf(limit) | (np.asarray(limit) == 0), 1.0, limit)
    excess: FloatArray = np.where(found > limit * (1 + SLACK), found - limit, 0.0) / unit
    return excess


def _changes(state: _State) -> _Changes:
    """All that may be made, and last one that changes nothing."""
    program, positions, options = state.program, state.assignment.positions, state.assignment.options
    units, stages, count = program.shape
    found = []

    def one(moved: IntArray, by: int) -> None:
        """Of units that go to the next position, the one before or none, in any option."""
        each, option = np.repeat(moved, count), np.tile(np.arange(count), len(moved))
        found.append([np.stack([of, of], axis=1) for of in (each, positions[each] + by, option)])

    one(np.arange(units), 0)
    last = np.flatnonzero(positions[1:] != positions[:-1])  # of each stage but the last one
    size = np.bincount(positions, minlength=stages)
    for moved, by in ((last, 1), (last + 1, -1)):
        one(moved[(size[positions[moved]] > 1) & (moved > 0) & (moved < units - 1)], by)
    omega = program.omega[np.arange(units), positions]
    for a, b in itertools.permutations(range(count), 2):
        gain = omega[:, a] - omega[:, b]  # of a unit that goes from a to b
        best, least = (np.flatnonzero(options == o) for o in (a, b))
        best = best[np.argsort(-gain[best], kind="stable")[:EXCHANGED]]
        least = least[np.argsort(gain[least], kind="stable")[:EXCHANGED]]
        pairs = np.stack([np.repeat(best, len(least)), np.tile(least, len(best))], axis=1)
        pairs = pairs[gain[pairs[:, 0]] > gain[pairs[:, 1]]]
        found.append([pairs, positions[pairs], np.broadcast_to([b, a], pairs.shape)])
    found.append([np.full((1, 2), of) for of in (0, positions[0], options[0])])
    changes = [np.concatenate(of) for of in zip(*found)]
    if program.allowed is not None:
        allowed = program.allowed[tuple(changes)].all(axis=1)
        allowed[-1] = True
        changes = [of[allowed] for of in changes]
    return _Changes(*changes)
