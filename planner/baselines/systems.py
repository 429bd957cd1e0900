"""What other systems would do with the same devices, in the same cost model and under the same constraints.

    uniform        One bit width, layers split evenly over the devices: pipeline parallelism as it usually is (vLLM's).
    proportional   One bit width, layers in proportion to the devices' memory, by largest remainder, one each at least:
                   llama.cpp's default tensor split, exo's ring partition. Left out where a device has no cap.
    balanced       One bit width, layers so that the slowest stage is as fast as can be: PipeEdge. See balanced.py.
    adabits        Bits of the least summed sensitivity that memory allows, time ignored: LLM-PQ's ablation of that
                   name. See adabits.py.
    transfer       LLM-PQ's heuristic: from adabits on, it moves layers off the slowest stage. See transfer.py.
    single         One bit width, everything on one device.

Each is the best of its kind in the planner's objective, which is more than these systems look for: all device orders of
orders.py are tried (they have one, or go over the types of devices), and all widths (LLM-PQ's uniform and PipeEdge take
the first of 16, 8, 4 and 3 bits that fits). Uniform, adabits and transfer use as many devices as may be used
together, which mostly are all, the others any of them.

All stages have KV caches of one width, 16 or 8 bits where either is allowed, whichever is better.

Micro-batch sizes: all pairs for uniform, proportional and single, which leave them to the user; one size for both
phases for balanced, adabits and transfer, where LLM-PQ takes the batch over the number of devices; for adabits and
transfer also that size in decode with the sizes that divide it in prefill, as in LLM-PQ's search. Balanced balances
either phase; PipeEdge has one phase only, and LLM-PQ balances decode.

Where the plan of a system breaks pins or limits of latency, which it does not have, there is no baseline. The others
are candidates of the search, so a plan is never worse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from planner.baselines.adabits import least_sensitive
from planner.baselines.balanced import balanced_layers
from planner.baselines.one_cache import among_both, by_cache
from planner.baselines.ordered_costs import OrderedCosts, Sizes
from planner.baselines.transfer import transferred
from planner.clock import NEVER, Clock
from planner.cost_arrays import Costs
from planner.objective import SLACK, FloatArray, IntArray
from planner.solver.candidate import Candidate

MAX_ORDERS = 1000  # of several devices, those of the most, that are tried
MAX_STARTS = 32  # of plans of least sensitivity, the best ones, that transfers start from

Baseline = Literal["uniform", "proportional", "balanced", "adabits", "transfer", "single"]


def best_baselines(
    costs: Costs, clock: Clock = NEVER, kinds: Collection[Baseline] = get_args(Baseline)
) -> dict[Baseline, Candidate]:
    """The best feasible plan of each of these kinds that has one, of those that there is time to look at.

    All stages of one have the same KV cache.
    """
    found: dict[Baseline, Candidate] = {}
    for i, of_cache in enumerate(by_cache(costs)):
        share = clock.part(1 / (len(costs.kv_bits) - i))
        for kind, candidate in _of_one_cache(of_cache, share, kinds).items():
            if kind not in found or candidate.value.objective < found[kind].value.objective:
                found[kind] = candidate if of_cache is costs else among_both(costs, candidate, of_cache)
    return {kind: found[kind] for kind in get_args(Baseline) if kind in found}


def _of_one_cache(costs: Costs, clock: Clock, kinds: Collection[Baseline]) -> dict[Baseline, Candidate]:
    best, sizes, layers = _Best(costs), Sizes.of(costs), costs.spec.num_layers
    if "single" in kinds:
        for order in costs.orders(max_stages=1):
            best.one_width("single", OrderedCosts.of(sizes, order), np.array([layers]))
            if clock.over:
                break
    orders = list(itertools.islice(costs.orders(), MAX_ORDERS))
    several = [order for order in orders if len(order) > 1]
    most = len(orders[0]) if orders and costs.constraints.at_most else len(costs.kinds)
    ordered = clock.part(1 / 2)
    for order in several:
        line, positions = OrderedCosts.of(sizes, order), len(order)
        if "uniform" in kinds and positions == most <= layers:
            best.one_width("uniform", line, even(layers, positions))
        caps = [costs.cluster.devices[d].memory_bytes for d in order]
        if "proportional" in kinds and positions <= layers and None not in caps:
            best.one_width("proportional", line, proportional(layers, np.array(caps, dtype=float)))
        if "balanced" in kinds:
            best.balanced(line, _one_size(sizes), ordered)
        if ordered.over:
            break
    if {"adabits", "transfer"} & set(kinds) and not clock.over:
        whole = [OrderedCosts.of(sizes, order) for order in orders if len(order) == most and not clock.over]
        best.least_sensitive(whole, sorted({*_one_size(sizes), *_one_decode_a_device(sizes, most)}), clock)
    return {kind: candidate for kind, candidate in best.found.items() if kind in kinds}


def even(layers: int, positions: int) -> IntArray:
    """Layers [positions], alike as far as possible."""
    counts: IntArray = np.bincount(np.arange(layers) * positions // layers, minlength=positions)
    return counts


def proportional(layers: int, memory: FloatArray) -> IntArray:
    """Layers [positions] in proportion to memory [positions], by largest remainder; none goes without."""
    share = layers * memory / memory.sum()
    counts: IntArray = np.floor(share).astype(np.int64)
    counts[np.argsort(counts - share, kind="stable")[: layers - counts.sum()]] += 1
    for empty in np.flatnonzero(counts == 0):
        counts[counts.argmax()] -= 1
        counts[empty] += 1
    return counts


def _one_size(sizes: Sizes) -> list[int]:
    """Pairs of one size for both phases."""
    return [i for i, (prefill, decode) in enumerate(sizes.pairs) if prefill.size == decode.size]


def _one_decode_a_device(sizes: Sizes, devices: int) -> list[int]:
    """Pairs with as many decode micro-batches as devices, of sizes that those of prefill divide."""
    size = -(-sizes.costs.workload.batch_size // devices)
    return [i for i, (p, d) in enumerate(sizes.pairs) if d.size == size and size % p.size == 0]


@dataclass
class _Best:
    """The best feasible plan of each kind so far."""

    costs: Costs
    found: dict[Baseline, Candidate] = field(default_factory=dict)

    def offer(self, kind: Baseline, found: Candidate) -> None:
        if found.value.feasible and found.value.objective < self._least(kind):
            self.found[kind] = found

    def one_width(self, kind: Baseline, line: OrderedCosts, counts: IntArray) -> None:
        """These layers [positions], at every width and for every pair of sizes."""
        widths, pairs = np.meshgrid(self._widths, np.arange(len(line.sizes.pairs)), indexing="ij")
        self._offer(kind, line, np.broadcast_to(counts, (widths.size, len(counts))), widths.ravel(), pairs.ravel())

    def balanced(self, line: OrderedCosts, pairs: Sequence[int], clock: Clock) -> None:
        """For every width, some pairs and each phase the layers for which the slowest stage is fastest."""
        for width in self._widths:
            for phase in (line.prefill, line.decode):
                if clock.over:
                    return
                counts, of = balanced_layers(line, phase, int(width), pairs)
                self._offer("balanced", line, counts, np.full(len(counts), width), of)

    def least_sensitive(self, lines: Sequence[OrderedCosts], pairs: Sequence[int], clock: Clock) -> None:
        """adabits, and transfer from the best of these."""
        starts = []
        for line, pair, assignment in least_sensitive(lines, pairs, clock):
            found = line.found(assignment, pair)
            self.offer("adabits", found)
            if found.value.feasible:
                starts.append((found, line, pair))
        for found, line, pair in sorted(starts, key=lambda start: start[0].value.objective)[:MAX_STARTS]:
            self.offer("transfer", line.found(transferred(line, pair, found.assignment, clock), pair))
            if clock.over:
                return

    @property
    def _widths(self) -> IntArray:
        """The options that are within the budget when all units have them."""
        return np.flatnonzero(self.costs.omega.sum(axis=0) <= self.costs.omega_budget * (1 + SLACK))

    def _least(self, kind: Baseline) -> float:
        return self.found[kind].value.objective if kind in self.found else math.inf

    def _offer(self, kind: Baseline, line: OrderedCosts, counts: IntArray, width: IntArray, pair: IntArray) -> None:
        """The best of these layers [splits, positions], each at one width [splits]."""
        splits = line.uniform(counts, width, pair)
        objective = line.seconds(splits) + self.costs.constraints.theta * self.costs.omega.sum(axis=0)[width]
        objective *= self.costs.per_second(line.order)
        objective[~line.allows(counts, width)] = math.inf
        for s in np.argsort(objective, kind="stable").tolist():
            if not objective[s] < self._least(kind):
                return
            self.offer(kind, line.found(line.assignment(splits, s), int(pair[s])))
