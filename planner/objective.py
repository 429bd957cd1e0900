"""The objective in closed form, as a plain function of a concrete assignment.

A `Program` holds the inputs of the integer program: devices in order, both micro-batch sizes chosen. `evaluate` returns
the objective of an assignment in it. The integer program, the baselines, the brute force of the tests and the
predictions all refer to this one definition.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

Rounds = tuple[tuple[float, float], ...]  # of decode: (number of rounds, micro-batches in each)

SLACK = 1e-9  # relative; a sum of floats may exceed a limit by this much


@dataclass(frozen=True)
class Narrow:
    """What each unit takes more on a position whose KV cache is narrow, in any option; mostly less, so below 0."""

    prefill: FloatArray  # [units, positions] seconds
    decode: FloatArray  # [units, positions] seconds
    memory: FloatArray  # [units, positions] bytes
    omega: FloatArray  # [units, positions]

    def groups(self) -> list[IntArray]:
        """The units that take the same more everywhere, group by group, without those that take none."""
        kinds, group = np.unique(np.concatenate([*vars(self).values()], axis=1), axis=0, return_inverse=True)
        return [np.flatnonzero(group.ravel() == g) for g, kind in enumerate(kinds) if kind.any()]


@dataclass(frozen=True)
class Program:
    """Arrays over units u, pipeline positions d and options o; seconds are those of one micro-batch.

    With one position there are no links; else link d leads from position d to the next, and the last one leads the
    tokens back to the first. Where the KV cache of a position may have one of two widths, the arrays are those of wide
    ones, and `narrow` says what differs: a position has one cache for all its layers.
    """

    prefill: FloatArray  # [units, positions, options] seconds
    decode: FloatArray  # [units, positions, options] seconds, at the mean context
    prefill_step: FloatArray  # [positions] seconds of a step that do not depend on the stage's units
    decode_step: FloatArray  # [positions]
    prefill_links: FloatArray  # [links] seconds
    decode_links: FloatArray  # [links]
    memory: FloatArray  # [units, positions, options] bytes of weights and cache
    memory_fixed: FloatArray  # [positions] bytes of buffers and overhead
    capacity: FloatArray  # [positions] bytes, inf: no cap
    shared: FloatArray  # [options] bytes saved if the first and the last unit are on one position in this option
    omega: FloatArray  # [units, positions, options]
    omega_budget: float  # inf: none
    theta: float  # seconds per unit of omega
    prefill_microbatches: int
    decode_rounds: Rounds
    allowed: BoolArray | None = None  # [units, positions, options]; None: every unit may go anywhere in any option
    prefill_longest: float = 1.0  # seconds of the longest micro-batch over those of a mean one
    max_ttft_s: float = math.inf  # of the whole batch
    max_tpot_s: float = math.inf
    per_second: float = 1.0  # the objective's factor for a second: 1, or the price of the devices
    narrow: Narrow | None = None  # None: there is one width for all

    def of_caches(self, narrow: BoolArray | None) -> Program:
        """The program in which the caches of these positions [positions] are narrow; None: those of none."""
        if self.narrow is None or narrow is None:
            return replace(self, narrow=None)
        more = {name: getattr(self, name) + (of * narrow)[:, :, None] for name, of in vars(self.narrow).items()}
        return replace(self, narrow=None, **more)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Units, positions, options."""
        units, positions, options = self.prefill.shape
        return units, positions, options

    @property
    def rounds(self) -> float:
        """Of decode."""
        return sum(rounds for rounds, _ in self.decode_rounds)


@dataclass(frozen=True)
class Assignment:
    """The position and the option of each unit, and the cache of each position."""

    positions: IntArray  # [units], not decreasing
    options: IntArray  # [units]
    narrow: BoolArray | None = None  # [positions] of two widths the narrower one; None: nowhere


@dataclass(frozen=True)
class Evaluation:
    """The objective of an assignment, its parts, and its memory."""

    objective: float  # per_second * (prefill_s + decode_s + theta * omega)
    prefill_s: float
    decode_s: float
    omega: float
    memory: FloatArray  # [positions] bytes
    feasible: bool  # memory caps, quality budget, limits of latency and pins hold

    def tpot_s(self, rounds: float) -> float:
        """Seconds of a decode round: from one token of a sequence to its next."""
        return self.decode_s / rounds if rounds else 0.0


def prefill_seconds(resources: FloatArray, microbatches: int, longest: float = 1.0) -> FloatArray:
    """l Sum_P + (m_p - l) Max_P: micro-batches through stages and links, the longest one l times as long as the mean.

    `resources` [..., stages and links] includes the tokens' way back. Exact for equal micro-batches (l = 1) and for
    equal stages; else a little too much.
    """
    return np.asarray(longest * resources.sum(-1) + (microbatches - longest) * resources.max(-1))


def decode_seconds(resources: FloatArray, rounds: Rounds) -> FloatArray:
    """Sum over n rounds of m micro-batches of n max(Sum_D, m Max_D), of resources [..., stages and links].

    A round takes as long as the way around, or as the slowest resource's work for all.
    """
    total, longest = resources.sum(-1), resources.max(-1)
    return np.asarray(sum(count * np.maximum(total, microbatches * longest) for count, microbatches in rounds))


def evaluate(program: Program, assignment: Assignment) -> Evaluation:
    """Objective, its parts, and whether the limits hold."""
    program = program.of_caches(assignment.narrow)
    units, positions, _ = program.shape
    chosen = (np.arange(units), assignment.positions, assignment.options)

    def by_position(costs: FloatArray) -> FloatArray:
        totals = np.zeros(positions)
        np.add.at(totals, assignment.positions, costs[chosen])
        return totals

    prefill = np.concatenate([by_position(program.prefill) + program.prefill_step, program.prefill_links])
    decode = np.concatenate([by_position(program.decode) + program.decode_step, program.decode_links])
    memory = by_position(program.memory) + program.memory_fixed
    if positions == 1 and assignment.options[0] == assignment.options[-1]:
        memory = memory - program.shared[assignment.options[0]]
    omega = float(program.omega[chosen].sum())
    prefill_s = float(prefill_seconds(prefill, program.prefill_microbatches, program.prefill_longest))
    decode_s = float(decode_seconds(decode, program.decode_rounds))
    objective = program.per_second * (prefill_s + decode_s + program.theta * omega)
    value = Evaluation(objective, prefill_s, decode_s, omega, memory, feasible=True)
    limits = (
        (omega, program.omega_budget),
        (prefill_s, program.max_ttft_s),
        (value.tpot_s(program.rounds), program.max_tpot_s),
    )
    feasible = (
        bool(np.all(memory <= program.capacity * (1 + SLACK)))
        and all(found <= limit * (1 + SLACK) for found, limit in limits)
        and (program.allowed is None or bool(np.all(program.allowed[chosen])))
    )
    return replace(value, feasible=feasible)
