"""Pool: devices without an order, with both micro-batch sizes, and what is known of it without a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmpq.spec import DTYPE_BYTES, Dtype
from planner import memory
from planner.cost_arrays import TOKEN_BYTES, Costs
from planner.lengths import largest_step
from planner.objective import SLACK, BoolArray, FloatArray, IntArray
from planner.step_costs import StepCosts


@dataclass(frozen=True)
class LayerCounts:
    """What an optimum determines of a plan."""

    counts: IntArray  # [devices, groups, options] layers
    first: int  # device with the embedding
    last: int  # device with the head
    first_option: int
    last_option: int
    narrow: BoolArray | None = None  # [devices] of two widths of the KV cache the narrower one; None: nowhere

    @property
    def used(self) -> list[int]:
        ends = (self.first, self.last)
        return [d for d in range(len(self.counts)) if self.counts[d].any() or d in ends]


@dataclass(frozen=True)
class Pool:
    """Devices of a cluster for a pipeline of several of them, or one that is `alone`."""

    costs: Costs
    prefill: StepCosts
    decode: StepCosts
    devices: tuple[int, ...]  # indices in the cluster, identical ones being neighbours
    alone: bool
    all_used: bool = False  # no plan leaves one of them out

    def buffer_bytes(self, device: int, neighbours: int, *, holds_head: bool = False) -> int:
        """Bytes beside the units of a stage on this device of the cluster, at least: links may carry a smaller type."""
        step = largest_step(self.prefill, self.decode)
        cache = memory.CacheSize.of(self.costs.workload)
        buffers = memory.StageBuffers(*step, self._wire, neighbours, holds_head, cache)
        return self.costs.buffer_bytes(device, buffers)

    @property
    def _wire(self) -> Dtype:
        dtypes = {self.costs.spec.compute_dtype(self.costs.cluster.devices[i].kind) for i in self.devices}
        return min(dtypes, key=DTYPE_BYTES.__getitem__)

    def link_seconds(self, phase: StepCosts) -> tuple[FloatArray, FloatArray]:
        """[devices, devices] Seconds of the hidden states of a step, and of its tokens, from one device to another."""
        latency_s, byte_s = (costs[np.ix_(self.devices, self.devices)] for costs in self.costs.link_costs)
        hidden = phase.tokens * self.costs.spec.hidden_size * DTYPE_BYTES[self._wire]
        return latency_s + hidden * byte_s, latency_s + phase.rows * TOKEN_BYTES * byte_s

    @property
    def least_bytes(self) -> float:
        """Bytes that the stage of a device that is alone needs at least: of the smallest options and cache."""
        (d,) = self.devices
        units = self.costs.least_memory[:, d].sum() - self.costs.shared.max()
        return self.buffer_bytes(d, 0, holds_head=True) + float(units)

    def floor(self) -> float:
        """A bound without a solver: quality aside, and layers spread until all devices are equally busy.

        Devices are weighted in inverse proportion to their mean seconds of a layer. The longest of all is at least
        their weighted mean; to that, a layer adds at least the least that it adds on any device.
        """
        if self.alone and self.least_bytes > self.costs.room(self.devices[0]) * (1 + SLACK):
            return math.inf
        at, layers, sizes = list(self.devices), self.costs.spec.num_layers, self.costs.group_sizes
        sums, longest = [], []
        for phase in (self.prefill, self.decode):
            least = phase.units.min(axis=2) + np.minimum(phase.narrow, 0.0)
            layer = least[self.costs.group_units][:, at]  # [groups, devices]
            mean = (sizes / layers) @ layer
            fixed = phase.fixed(at, alone=self.alone)
            step = fixed if self.alone or self.all_used else np.zeros(len(at))
            ends = phase.units[[0, -1]][:, at].min(axis=(1, 2)).sum()
            sums.append(sizes @ layer.min(axis=1) + ends + step.sum())
            if mean.min() > 0:
                spread = sizes @ (layer / mean).min(axis=1) + (step / mean).sum()
                longest.append(spread / (1 / mean).sum())
            else:
                longest.append(0.0)
        prefill_s = self.prefill.longest * sums[0] + (self.prefill.count - self.prefill.longest) * longest[0]
        decode_s = sum(rounds * max(sums[1], count * longest[1]) for rounds, count in self.decode.rounds)
        return float(self.costs.per_second(self.devices) * (prefill_s + decode_s))


def run_limits(groups: IntArray) -> list[list[tuple[float, float]]]:
    """[groups] Lines (slope, most): of c layers in a row, at most slope * c + most are of the group.

    They are the upper hull of the most layers of the group that any c layers in a row have, c = 0, 1, ..., L, without
    the lines of slope 0 and 1, which hold anyway.
    """
    starts = np.arange(len(groups) + 1)
    limits = []
    for group in range(int(groups.max()) + 1):
        before = np.concatenate([[0], (groups == group).cumsum()])
        most = [int((before[c:] - before[: len(before) - c]).max()) for c in starts]
        lines, at = [], 0
        while at < len(groups):
            slopes = (np.array(most[at + 1 :]) - most[at]) / np.arange(1, len(groups) - at + 1)
            slope = float(slopes.max())
            if 0 < slope < 1:
                lines.append((slope, most[at] - slope * at))
            at += 1 + int(np.flatnonzero(slopes == slopes.max())[-1])
        limits.append(lines)
    return limits
