"""Tensor parallelism on paper: stages of several equal devices, as further devices of the same problem.

A group of k equal devices of one host is one more device. Each of its members runs the model `ModelSpec.part(k)`
(Megatron-LM's split, arXiv 1909.08053, section 3), and the members exchange

    after the attention and the MLP of a layer    an all-reduce of the hidden states each
    after the embedding                           an all-reduce of the hidden states
    after the head                                each row's best logit of every member, gathered by all
    on the way in from another stage              every member gets its share of the hidden states, and all gather them
                                                  (arXiv 2104.04473, section 4.1)

all in rings: an all-reduce of `size` bytes takes 2 (k-1) / k size / bytes_per_s + 2 (k-1) latency_s, a gather half of
that. No exchange overlaps computation. Memory is exact for each member (memory.py); a group holds the sum of its
members, and its cap is k times theirs.

Equal devices are interchangeable, so they are counted and not named: a single device weighs 1, a group k, and those in
use weigh at most as much as there are devices (`DeviceLimit`). So the search decides between groups and single devices
together with all else. Every plan without groups remains, so the best plan is never worse with them.

This is planning only. The runtime refuses a plan that uses a group (`Plan.check_model`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from llmpq.spec import DTYPE_BYTES, W16, Context, CostTable, Device, Link, ModelSpec, Op, UsageError, unit_ops
from planner.constraints import DeviceLimit
from planner.problem import Problem
from planner.solver.orders import device_kinds

BEST_BYTES = 8  # of a row's best logit, float32, and its token


@dataclass(frozen=True)
class Ring:
    """Equal devices that exchange their parts of a tensor."""

    members: int
    link: Link  # between any two of them

    def all_reduce(self, size: float) -> float:
        """Seconds until every member has the sum of a tensor of `size` bytes on each."""
        return 2 * self.gather(size)

    def gather(self, size: float) -> float:
        """Seconds until every member has all of a tensor of `size` bytes, of which each has an equal share."""
        steps = self.members - 1
        return steps * (size / self.members / self.link.bytes_per_s + self.link.latency_s)

    def seconds(self, op: Op, value_bytes: int) -> float:
        """Seconds of the exchange at an operation of a unit, for hidden states of `value_bytes` per value."""
        if op.kind == "layer_rest":
            return 2 * self.all_reduce(op.m * op.n * value_bytes)
        if op.kind == "embedding":
            return self.all_reduce(op.m * op.k * value_bytes)
        if op.kind == "head_rest":
            return self.gather(self.members * op.m * BEST_BYTES)
        return 0.0


@dataclass(frozen=True)
class _Place:
    """A single device or a group, and the devices of the problem that it may consist of."""

    device: Device
    members: tuple[int, ...]
    ring: Ring | None = None


def with_groups(
    problem: Problem, degrees: Collection[int], part_costs: Callable[[Device, ModelSpec], CostTable]
) -> Problem:
    """The problem with all groups of `degrees` equal devices as further devices.

    `part_costs` returns the costs of a narrower model on one device, at the precisions and sizes of the problem's own
    table. Groups of k are called "NAME xk" after one of their devices; devices that constraints name are in none.
    Raises UsageError for a degree below 2 or one that does not divide the model, and for a problem that has groups
    already; NotMeasuredError where `part_costs` lacks a size.
    """
    devices = problem.cluster.devices
    if min(degrees, default=2) < 2 or any(device.members > 1 for device in devices):
        raise UsageError(f"groups of {sorted(degrees)} cannot be made; give degrees from 2 on, and single devices")
    places = [_Place(device, (d,)) for d, device in enumerate(devices)]
    tables, rules = dict(problem.profile.tables), []
    for alike in _alike(problem):
        weights = {devices[d].name: 1.0 for d in alike}
        for degree in sorted({degree for degree in degrees if degree <= len(alike)}):
            first = devices[alike[0]]
            ring = Ring(degree, problem.profile.link(first.name, devices[alike[1]].name))
            table = _table(problem, first, ring, part_costs(first, problem.spec.part(degree)))
            for start in range(0, len(alike) - degree + 1, degree):
                place = _group(devices, alike[start : start + degree], ring)
                places.append(place)
                tables[place.device.name] = table
                weights[place.device.name] = float(degree)
        if len(weights) > len(alike):
            rules.append(DeviceLimit(weights, float(len(alike))))
    links = (_link(problem, a, b) for a, b in itertools.permutations(places, 2) if a.ring or b.ring)
    return replace(
        problem,
        cluster=replace(problem.cluster, devices=tuple(place.device for place in places)),
        profile=replace(problem.profile, tables=tables, links=(*problem.profile.links, *links)),
        constraints=replace(
            problem.constraints, at_most=(*(_weighed(rule, places) for rule in problem.constraints.at_most), *rules)
        ),
    )


def _alike(problem: Problem) -> Iterator[list[int]]:
    """Devices of one host that are interchangeable."""
    kinds = device_kinds(problem.cluster, problem.profile, problem.constraints)
    found: dict[tuple[int, str], list[int]] = {}
    for d, kind in kinds.items():
        found.setdefault((kind, problem.cluster.devices[d].host), []).append(d)
    yield from found.values()


def _group(devices: tuple[Device, ...], members: list[int], ring: Ring) -> _Place:
    first, count = devices[members[0]], ring.members
    group = replace(
        first,
        name=f"{first.name} x{count}",
        members=count,
        memory_bytes=None if first.memory_bytes is None else count * first.memory_bytes,
        price_per_hour=count * first.price_per_hour,
    )
    return _Place(group, tuple(members), ring)


def _table(problem: Problem, device: Device, ring: Ring, part: CostTable) -> CostTable:
    """The costs of whole operations on a group of such devices, from those of its parts on one of them.

    Linears of one shape, whose parts may differ in shape, take the mean of their parts each, and so the right sum.
    """
    spec = problem.spec
    value_bytes = DTYPE_BYTES[spec.compute_dtype(device.kind)]
    parts: dict[tuple[str, int, int], list[tuple[int, int]]] = {("step", 0, 0): [(0, 0)]}
    for unit in spec.distinct_units:
        whole_ops, part_ops = (
            unit_ops(of, unit, W16, "a16", 1, 1, Context.of(1)) for of in (spec, spec.part(ring.members))
        )
        for op, split in zip(whole_ops, part_ops, strict=True):
            parts.setdefault((op.kind, op.n, op.k), []).append((split.n, split.k))
    rows = []
    for row in problem.profile.table(device.name).rows:
        shapes = parts.get((row.op.kind, row.op.n, row.op.k))
        if shapes is not None:
            seconds = statistics.fmean(part.seconds(replace(row.op, n=n, k=k)) for n, k in shapes)
            rows.append(replace(row, seconds=seconds + ring.seconds(row.op, value_bytes)))
    return replace(
        part,
        device=f"{ring.members} x {part.device}",
        rows=tuple(rows),
        overhead_bytes=ring.members * part.overhead_bytes,
    )


def _link(problem: Problem, source: _Place, target: _Place) -> Link:
    """From any member of one place to any of the other, all equally far apart, and among the members of the target."""
    names = [device.name for device in problem.cluster.devices]
    a, b = next((a, b) for a in source.members for b in target.members if a != b)
    link = problem.profile.link(names[a], names[b])
    latency_s, byte_s = link.latency_s, 1 / link.bytes_per_s
    if (ring := target.ring) is not None:
        latency_s += (ring.members - 1) * ring.link.latency_s
        byte_s += (ring.members - 1) / ring.members / ring.link.bytes_per_s
    return Link(source.device.name, target.device.name, latency_s, 1 / byte_s)


def _weighed(rule: DeviceLimit, places: list[_Place]) -> DeviceLimit:
    """The rule in which groups weigh as much as their members."""
    weights = {
        place.device.name: sum(rule.weight(places[d].device.name) for d in place.members)  # single devices come first
        for place in places
    }
    return DeviceLimit(weights, rule.limit)
