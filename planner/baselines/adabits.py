"""Bits and split of the least summed sensitivity that memory allows, time ignored: what LLM-PQ calls adabits.

LLM-PQ solves an integer program for it. Here two dynamic programs are enough, as time is ignored: one over the layers
of a run, for the least sum of every run of layers in every room that a device may have for it; one over the devices of
an order, for the runs that they take. The first is shared by all orders and micro-batch sizes.

The first counts bytes beyond each layer's smallest option, in steps of their greatest common divisor; the result is
then the least there is. Where that divisor is too small (scales for whole rows), sizes are rounded up to 1 / MAX_STEPS
of the largest difference, and the result may miss the least by what that much memory is worth. Of equally good splits
the most even one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.baselines.ordered_costs import OrderedCosts
from planner.clock import NEVER, Clock, OutOfTime
from planner.cost_arrays import Costs
from planner.objective import Assignment, FloatArray, IntArray

MAX_STEPS = 256  # between the smallest and the largest option of a layer
EVEN = 1e-9  # of the summed sensitivity; how uneven a split is decides among sums that differ by less

Room = tuple[float, tuple[float, ...]]  # bytes that a device has for layers; bytes of one of each group at the smallest


def least_sensitive(
    lines: Sequence[OrderedCosts], pairs: Sequence[int], clock: Clock = NEVER
) -> Iterator[tuple[OrderedCosts, int, Assignment]]:
    """The assignment of the least summed omega for each line and each of some pairs, if anything fits in time."""
    rooms: dict[Room, int] = {}
    tasks = [(line, pair, _Rooms.of(line, pair, rooms)) for line in lines if not clock.over for pair in pairs]
    if not tasks:
        return
    costs = lines[0].costs
    try:
        runs = Runs(costs.omega[1:-1], costs.groups, lines[0].layer_bytes[0], list(rooms), clock)
    except OutOfTime:
        return
    for line, pair, task in tasks:
        if clock.over:
            return
        found = _alone(costs, runs, task) if len(line.order) == 1 else _pipeline(costs, runs, task)
        if found is not None:
            yield line, pair, found


class Runs:
    """The least summed omega of every run of consecutive layers in every room, and the options that give it."""

    def __init__(
        self, omega: FloatArray, groups: IntArray, sizes: FloatArray, rooms: Sequence[Room], clock: Clock = NEVER
    ) -> None:
        """`omega` [layers, options], `groups` [layers].

        `sizes` [groups, options] are bytes of a layer on any device: differences between options are the same on all.
        Raises OutOfTime.
        """
        self._layers, self._groups = len(omega), groups
        beyond = (sizes - sizes.min(axis=1, keepdims=True)).astype(np.int64)
        self._step = max(int(np.gcd.reduce(beyond, axis=None)), -(-int(beyond.max()) // MAX_STEPS), 1)
        self._extra: IntArray = -(-beyond // self._step)  # [groups, options] steps
        self._free = np.array([free for free, _ in rooms])
        smallest = np.array([of_groups for _, of_groups in rooms])[:, groups]
        self._before = np.concatenate([np.zeros((len(rooms), 1)), smallest.cumsum(axis=1)], axis=1)
        self._chosen: list[NDArray[np.uint8]] = []
        self.omega = np.full((len(rooms), self._layers + 1, self._layers + 1), math.inf)  # [rooms, start, end]
        sums = np.zeros((self._layers + 1, 1))
        self._keep(0, sums)
        for length in range(1, self._layers + 1):
            clock.check()
            sums = self._longer(sums, omega[length - 1 :], groups[length - 1 :])
            self._keep(length, sums)

    def _longer(self, sums: FloatArray, omega: FloatArray, groups: IntArray) -> FloatArray:
        """From sums [starts, spare] of runs to those with a layer more each, of this omega [starts, options]."""
        most = int(self._extra.max())
        shorter = np.concatenate([sums[: len(omega)], np.repeat(sums[: len(omega), -1:], most, axis=1)], axis=1)
        longer, chosen = np.empty(shorter.shape), np.empty(shorter.shape, dtype=np.uint8)
        for group, extras in enumerate(self._extra):
            rows = groups == group
            longer[rows], chosen[rows] = _with_a_layer(shorter[rows], omega[rows], extras)
        self._chosen.append(chosen)
        return longer

    def _spare(self, starts: IntArray, length: int, most: int) -> IntArray:
        """[rooms, starts] Steps that runs leave free at their smallest, at most `most`; -1: they do not fit."""
        smallest = self._before[:, starts + length] - self._before[:, starts]
        spare = np.floor((self._free[:, None] - smallest) / self._step)
        steps: IntArray = np.clip(spare, -1, most).astype(np.int64)
        return steps

    def _keep(self, length: int, sums: FloatArray) -> None:
        starts = np.arange(len(sums))
        spare = self._spare(starts, length, sums.shape[1] - 1)
        self.omega[:, starts, starts + length] = np.where(spare < 0, math.inf, sums[starts, spare])

    def options(self, room: int, start: int, end: int) -> list[int]:
        """Of the layers of a run."""
        most = self._chosen[end - start - 1].shape[1] - 1 if end > start else 0
        spare, found = int(self._spare(np.array([start]), end - start, most)[room, 0]), []
        for length in range(end - start, 0, -1):
            chosen = self._chosen[length - 1]
            option = int(chosen[start, min(spare, chosen.shape[1] - 1)])
            found.append(option)
            spare -= int(self._extra[self._groups[start + length - 1], option])
        return found[::-1]


def _with_a_layer(sums: FloatArray, omega: FloatArray, extras: IntArray) -> tuple[FloatArray, NDArray[np.uint8]]:
    """The least sums [runs, spare] with one more layer each, whose options take `extras` steps, and its option."""
    longer, chosen = np.full(sums.shape, math.inf), np.zeros(sums.shape, dtype=np.uint8)
    for option, extra in enumerate(extras):
        with_it = sums[:, : sums.shape[1] - extra] + omega[:, option, None]
        better = with_it < longer[:, extra:]
        longer[:, extra:][better] = with_it[better]
        chosen[:, extra:][better] = option
    return longer, chosen


@dataclass(frozen=True)
class _Rooms:
    """The numbers of the rooms of a line's positions; those of the ends depend on the options of embedding and head."""

    first: list[int]  # [options], or of one device [options of the embedding * options of the head]
    middle: list[int]
    last: list[int]  # [options]

    @classmethod
    def of(cls, line: OrderedCosts, pair: int, rooms: dict[Room, int]) -> _Rooms:
        free, smallest, ends = line.free[pair], line.layer_bytes.min(axis=2).tolist(), line.end_bytes

        def number(size: float, position: int) -> int:
            return rooms.setdefault((float(size), tuple(smallest[position])), len(rooms))

        if len(free) == 1:
            both = ends[0][:, None] + ends[1] - np.diag(line.shared)
            return cls([number(free[0] - size, 0) for size in both.ravel()], [], [])
        return cls(
            [number(free[0] - size, 0) for size in ends[0]],
            [number(free[p], p) for p in range(1, len(free) - 1)],
            [number(free[-1] - size, -1) for size in ends[1]],
        )


def _alone(costs: Costs, runs: Runs, rooms: _Rooms) -> Assignment | None:
    layers, options = costs.spec.num_layers, len(costs.options)
    sums = np.add.outer(costs.omega[0], costs.omega[-1]).ravel() + runs.omega[rooms.first, 0, layers]
    best = int(sums.argmin())
    if math.isinf(sums[best]):
        return None
    chosen = [best // options, *runs.options(rooms.first[best], 0, layers), best % options]
    return Assignment(np.zeros(layers + 2, dtype=np.int64), np.array(chosen))


def _pipeline(costs: Costs, runs: Runs, rooms: _Rooms) -> Assignment | None:
    layers = costs.spec.num_layers
    cuts = np.arange(layers + 1)
    uneven = EVEN * (costs.omega.max(axis=1).sum() or 1.0) * ((cuts - cuts[:, None]) / layers) ** 2
    first = costs.omega[0][:, None] + runs.omega[rooms.first, 0]  # [options, end]
    last = costs.omega[-1][:, None] + runs.omega[rooms.last, :, layers]  # [options, start]
    so_far, came_from = first.min(axis=0) + uneven[0], []
    inner = np.where(cuts > cuts[:, None], uneven, math.inf)  # a stage between others has a layer at least
    for room in rooms.middle:
        through = so_far[:, None] + runs.omega[room] + inner
        came_from.append(through.argmin(axis=0))
        so_far = through.min(axis=0)
    total = so_far + last.min(axis=0) + uneven[:, layers]
    cut = int(total.argmin())
    if math.isinf(total[cut]):
        return None
    ends = [layers, cut]
    for back in reversed(came_from):
        ends.append(int(back[ends[-1]]))
    starts = [0, *ends[:0:-1]]
    first_option, last_option = int(first[:, starts[1]].argmin()), int(last[:, cut].argmin())
    used = [rooms.first[first_option], *rooms.middle, rooms.last[last_option]]
    chosen = [first_option]
    for room, start, end in zip(used, starts, [*starts[1:], layers]):
        chosen += runs.options(room, start, end)
    positions = np.searchsorted(starts[1:], cuts[:-1], "right")
    return Assignment(np.array([0, *positions, len(used) - 1]), np.array([*chosen, last_option]))
