"""Devices in one order, and the objective of many splits over them at once.

The same closed form as objective.py. Layers of one group are counted, not listed, so a split is a few numbers, and
thousands of them are one array. `OrderedCosts.seconds` agrees with `evaluate`, which decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llmpq.spec import DTYPE_BYTES
from planner import memory
from planner.cost_arrays import TOKEN_BYTES, Configuration, Costs
from planner.lengths import largest_step
from planner.objective import Assignment, BoolArray, FloatArray, IntArray
from planner.solver.candidate import Candidate
from planner.solver.orders import Order
from planner.solver.pool import LayerCounts
from planner.solver.realization import draft
from planner.step_costs import StepCosts


@dataclass(frozen=True)
class Splits:
    """Any number of splits s over the positions of one order."""

    layers: FloatArray  # [splits, positions, groups, options] how many; whole if summed over groups
    first: IntArray  # [splits] option of the embedding
    last: IntArray  # [splits] option of the head
    pair: IntArray  # [splits] which pair of micro-batch sizes

    @property
    def by_option(self) -> IntArray:
        """[splits, positions, options] layers"""
        counts: IntArray = np.rint(self.layers.sum(axis=2)).astype(np.int64)
        return counts


@dataclass(frozen=True)
class Sizes:
    """All pairs of micro-batch sizes, and the costs of units with them on every device."""

    costs: Costs
    pairs: Sequence[tuple[StepCosts, StepCosts]]  # prefill and decode
    units: tuple[FloatArray, FloatArray]  # of both phases: [pairs, 2 + groups, devices, options]; ends first and last
    steps: IntArray  # [pairs, 2] tokens and rows of the largest step
    microbatches: IntArray  # [pairs] of prefill
    longest: FloatArray  # [pairs] tokens of the longest micro-batch of prefill, over those of a mean one
    rounds: FloatArray  # [2, pairs, some] of decode: how many, and of how many micro-batches each

    @classmethod
    def of(cls, costs: Costs) -> Sizes:
        pairs = [(prefill, decode) for prefill in costs.prefill for decode in costs.decode]
        distinct = [0, *costs.group_units, -1]
        rounds = np.zeros((len(pairs), max(len(decode.rounds) for decode in costs.decode), 2))
        for of_pair, (_, decode) in zip(rounds, pairs):
            of_pair[: len(decode.rounds)] = decode.rounds
        return cls(
            costs=costs,
            pairs=pairs,
            units=(
                np.stack([prefill.units[distinct] for prefill, _ in pairs]),
                np.stack([decode.units[distinct] for _, decode in pairs]),
            ),
            steps=np.array([largest_step(prefill, decode) for prefill, decode in pairs]),
            microbatches=np.array([prefill.count for prefill, _ in pairs]),
            longest=np.array([prefill.longest for prefill, _ in pairs]),
            rounds=rounds.transpose(2, 0, 1),
        )


@dataclass(frozen=True)
class Stages:
    """Seconds of one micro-batch of one phase, for each pair of micro-batch sizes."""

    layer: FloatArray  # [pairs, positions, groups, options]
    first: FloatArray  # [pairs, options] the embedding, on the first position
    last: FloatArray  # [pairs, options] the head, on the last one
    step: FloatArray  # [pairs, positions]
    links: FloatArray  # [pairs, links]

    def seconds(self, splits: Splits) -> FloatArray:
        """[splits, positions]"""
        pair = splits.pair
        stages: FloatArray = (splits.layers * self.layer[pair]).sum(axis=(2, 3)) + self.step[pair]
        stages[:, 0] += self.first[pair, splits.first]
        stages[:, -1] += self.last[pair, splits.last]
        return stages

    def sum_and_max(self, splits: Splits) -> tuple[FloatArray, FloatArray]:
        """Of stages and links: [splits] each."""
        resources = np.concatenate([self.seconds(splits), self.links[splits.pair]], axis=1)
        return resources.sum(axis=1), resources.max(axis=1)


@dataclass(frozen=True)
class OrderedCosts:
    """One order of devices, with its costs for all pairs of micro-batch sizes."""

    sizes: Sizes
    order: Order
    prefill: Stages
    decode: Stages
    layer_bytes: FloatArray  # [positions, groups, options]
    end_bytes: FloatArray  # [2, options] embedding on the first position, head on the last one
    shared: FloatArray  # [options] bytes saved if both are on one position in this one option
    free: FloatArray  # [pairs, positions] bytes beside the buffers

    @classmethod
    def of(cls, sizes: Sizes, order: Order) -> OrderedCosts:
        costs, at, alone = sizes.costs, list(order), len(order) == 1
        return cls(
            sizes=sizes,
            order=order,
            prefill=_stages(costs, order, [prefill for prefill, _ in sizes.pairs], sizes.units[0]),
            decode=_stages(costs, order, [decode for _, decode in sizes.pairs], sizes.units[1]),
            layer_bytes=costs.memory[costs.group_units][:, at].swapaxes(0, 1),
            end_bytes=np.stack([costs.memory[0, at[0]], costs.memory[-1, at[-1]]]),
            shared=costs.shared * alone,
            free=_free(sizes, order),
        )

    @property
    def costs(self) -> Costs:
        return self.sizes.costs

    @cached_property
    def _layers_before(self) -> IntArray:
        """[layers + 1, groups] layers of each group before a layer."""
        of_group = self.costs.groups[:, None] == np.arange(len(self.costs.group_sizes))
        return np.concatenate([np.zeros((1, of_group.shape[1]), dtype=np.int64), of_group.cumsum(axis=0)])

    def splits(self, counts: IntArray, first: IntArray, last: IntArray, pair: IntArray) -> Splits:
        """`counts` [splits, positions, options] layers; the options of both ends and the pairs [splits].

        The groups that are on a position share its options evenly.
        """
        layers = counts.sum(axis=2)
        ends = layers.cumsum(axis=1)
        groups = self._layers_before[ends] - self._layers_before[ends - layers]  # [splits, positions, groups]
        share = groups / np.maximum(layers, 1)[:, :, None]
        return Splits(counts[:, :, None, :] * share[:, :, :, None], first, last, pair)

    def uniform(self, counts: IntArray, option: IntArray, pair: IntArray) -> Splits:
        """`counts` [splits, positions] layers, and one option [splits] for every unit."""
        one = np.eye(len(self.costs.options), dtype=np.int64)[option]
        return self.splits(counts[:, :, None] * one[:, None, :], option, option, pair)

    def split_of(self, assignment: Assignment, pair: int) -> Splits:
        """The one split of an assignment."""
        layers = np.zeros((1, len(self.order), len(self.costs.group_sizes), len(self.costs.options)))
        np.add.at(layers[0], (assignment.positions[1:-1], self.costs.groups, assignment.options[1:-1]), 1)
        return Splits(layers, assignment.options[:1], assignment.options[-1:], np.array([pair]))

    def seconds(self, splits: Splits) -> FloatArray:
        """[splits] of the whole batch; inf where memory or a limit of latency does not hold."""
        limits, pair = self.costs.constraints, splits.pair
        total, longest = self.prefill.sum_and_max(splits)
        times = self.sizes.longest[pair]
        prefill_s = times * total + (self.sizes.microbatches[pair] - times) * longest
        total, longest = self.decode.sum_and_max(splits)
        rounds, microbatches = self.sizes.rounds[:, pair]
        decode_s = (rounds * np.maximum(total[:, None], microbatches * longest[:, None])).sum(axis=1)
        holds = (self.used(splits) <= self.free[pair]).all(axis=1) & (prefill_s <= limits.max_ttft_s)
        if math.isfinite(limits.max_tpot_s):
            holds &= decode_s <= limits.max_tpot_s * rounds.sum(axis=1)
        return np.where(holds, prefill_s + decode_s, math.inf)

    def used(self, splits: Splits) -> FloatArray:
        """Bytes [splits, positions] of weights and cache."""
        used: FloatArray = (splits.layers * self.layer_bytes).sum(axis=(2, 3))
        used[:, 0] += self.end_bytes[0, splits.first] - self.shared[splits.first] * (splits.first == splits.last)
        used[:, -1] += self.end_bytes[1, splits.last]
        return used

    def allows(self, counts: IntArray, option: IntArray) -> BoolArray:
        """[splits]: whether every unit may be where it is, with `counts` [splits, positions] layers in one option."""
        if self.costs.allowed is None:
            return np.ones(len(counts), dtype=bool)
        allowed = self.costs.allowed[:, list(self.order)]
        refused = np.concatenate([np.zeros((1, *allowed.shape[1:]), dtype=np.int64), (~allowed[1:-1]).cumsum(axis=0)])
        ends, at, o = counts.cumsum(axis=1), np.arange(len(self.order)), option[:, None]
        inside = (refused[ends, at, o] - refused[ends - counts, at, o]).sum(axis=1)
        holds: BoolArray = (inside == 0) & allowed[0, 0, option] & allowed[-1, -1, option]
        return holds

    def assignment(self, splits: Splits, s: int) -> Assignment:
        """One of the splits, unit by unit; on each position the least sensitive layers get the fewest bits."""
        last, counts = len(self.order) - 1, splits.by_option[s][:, None, :]
        outline = LayerCounts(counts, 0, last, int(splits.first[s]), int(splits.last[s]))
        return draft(outline, tuple(range(last + 1)), np.zeros_like(self.costs.groups), self.costs.omega)

    def found(self, assignment: Assignment, pair: int) -> Candidate:
        return Candidate.of(self.costs, Configuration(self.order, *self.sizes.pairs[pair]), assignment)


def _stages(costs: Costs, order: Order, phases: Sequence[StepCosts], units: FloatArray) -> Stages:
    """The costs of a phase with each pair, devices in this order; `units` as in Sizes."""
    at = list(order)
    return Stages(
        layer=units[:, 1:-1, at].swapaxes(1, 2),
        first=units[:, 0, at[0]],
        last=units[:, -1, at[-1]],
        step=np.array([phase.fixed(at, alone=len(at) == 1) for phase in phases]),
        links=_links(costs, order, phases),
    )


def _links(costs: Costs, order: Order, phases: Sequence[StepCosts]) -> FloatArray:
    """Seconds [pairs, links], the tokens' way back last; none for one device."""
    if len(order) == 1:
        return np.zeros((len(phases), 0))
    devices = [costs.cluster.devices[d] for d in order]
    hidden = costs.spec.hidden_size * DTYPE_BYTES[memory.wire_dtype(devices, costs.spec)]
    onward, back = ([phase.tokens * hidden for phase in phases], [phase.rows * TOKEN_BYTES for phase in phases])
    sizes = np.array([onward] * (len(order) - 1) + [back], dtype=float).T
    links = [costs.profile.link(a.name, b.name) for a, b in zip(devices, [*devices[1:], devices[0]])]
    seconds: FloatArray = np.array([of.latency_s for of in links]) + sizes / np.array([of.bytes_per_s for of in links])
    return seconds


def _free(sizes: Sizes, order: Order) -> FloatArray:
    """Bytes [pairs, positions] that each device has for units."""
    costs = sizes.costs
    devices = [costs.cluster.devices[d] for d in order]
    wire, cache = memory.wire_dtype(devices, costs.spec), memory.CacheSize.of(costs.workload)
    at_rest = memory.StageBuffers.of_pipeline(len(order), wire, (0, 0), cache)
    free = np.empty((len(sizes.pairs), len(order)))
    for i, (d, buffers) in enumerate(zip(order, at_rest, strict=True)):
        least = costs.buffer_bytes(d, buffers)  # buffers grow in proportion to tokens and rows
        slope = [costs.buffer_bytes(d, more) - least for more in (replace(buffers, tokens=1), replace(buffers, rows=1))]
        free[:, i] = costs.constraints.room(devices[i]) - (least + sizes.steps @ np.array(slope))
    return free
