"""Layers so that the slowest stage is as fast as can be: PipeEdge's split.

PipeEdge finds it by dynamic programming. Where all layers are of one group, taking the cheapest places for them has the
same result and is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from planner.baselines.ordered_costs import OrderedCosts, Stages
from planner.objective import BoolArray, FloatArray, IntArray


def balanced_layers(line: OrderedCosts, phase: Stages, width: int, pairs: Sequence[int]) -> tuple[IntArray, IntArray]:
    """Layers [splits, positions] of the fastest slowest stage with each of some pairs, and the pair [splits] of each.

    Every unit is in the option `width`. Pairs with which nothing fits are left out.
    """
    at, layers, groups = np.array(pairs, dtype=np.int64), line.costs.spec.num_layers, line.costs.groups
    least = np.array([0, *[1] * (len(line.order) - 2), 0])
    base = phase.step[at].copy()
    base[:, 0] += phase.first[at, width]
    base[:, -1] += phase.last[at, width]
    room = line.free[at].copy()
    room[:, [0, -1]] -= line.end_bytes[:, width]
    seconds, sizes = phase.layer[at, :, :, width], line.layer_bytes[:, :, width]
    if len(line.costs.group_sizes) > 1:
        counts, fits = slowest_least_of_runs(base, seconds[:, :, groups], room, sizes[:, groups], least)
        return counts[fits], at[fits]
    most = np.clip(np.floor(room / sizes[:, 0]), -1, layers).astype(np.int64)
    fits = (most >= least).all(axis=1)
    if not fits.any():
        return np.zeros((0, len(line.order)), dtype=np.int64), at[fits]
    return slowest_least(base, seconds[:, :, 0], least, most, layers)[fits], at[fits]


def slowest_least(base: FloatArray, layer: FloatArray, least: IntArray, most: IntArray, layers: int) -> IntArray:
    """Layers [splits, positions] for which the slowest position is as fast as can be; those of no use where none fit.

    Position p takes base[s, p] + c layer[s, p] seconds with c layers, of which it has `least` [positions] to `most`
    [splits, positions]. Of all places for a layer, the c-th on p costing that much, the cheapest are taken.
    """
    c = np.arange(1, layers + 1)
    places = base[:, :, None] + layer[:, :, None] * c
    places[np.broadcast_to(c <= least[:, None], places.shape)] = -math.inf
    places[c > most[:, :, None]] = math.inf
    flat = places.reshape(len(places), -1)
    taken = np.argpartition(flat, layers - 1, axis=1)[:, :layers] // layers
    counts: IntArray = (taken[:, :, None] == np.arange(base.shape[1])).sum(axis=1)
    return counts


def slowest_least_of_runs(
    base: FloatArray, layer: FloatArray, room: FloatArray, sizes: FloatArray, least: IntArray
) -> tuple[IntArray, BoolArray]:
    """Layers [splits, positions] as in `slowest_least`, where each layer differs, and whether any fit [splits].

    Position p takes base[s, p] seconds and layer[s, p, i] for each of its layers i, which have sizes[p, i] bytes of
    its room[s, p].
    """
    seconds, held, cuts = _sums_before(layer), _sums_before(sizes), np.arange(layer.shape[2] + 1)
    best = np.where(cuts == 0, 0.0, np.full((len(base), 1), math.inf))  # of the positions so far, by where they end
    came_from = []
    for p in range(base.shape[1]):
        run = base[:, p, None, None] + seconds[:, p, None, :] - seconds[:, p, :, None]  # [splits, start, end]
        fits = (held[p] - held[p, :, None] <= room[:, p, None, None]) & (cuts - cuts[:, None] >= least[p])
        through = np.where(fits, np.maximum(best[:, :, None], run), math.inf)
        came_from.append(through.argmin(axis=1))
        best = through.min(axis=1)
    ends = [np.full(len(base), cuts[-1])]
    for starts in reversed(came_from):
        ends.append(starts[np.arange(len(base)), ends[-1]])
    counts: IntArray = np.diff(np.array(ends[::-1]).T, axis=1)
    fitting: BoolArray = np.isfinite(best[:, -1])
    return counts, fitting


def _sums_before(costs: FloatArray) -> FloatArray:
    """[..., layers + 1] The sums of [..., layers] over all layers before each, and over all."""
    return np.concatenate([np.zeros((*costs.shape[:-1], 1)), costs.cumsum(axis=-1)], axis=-1)
