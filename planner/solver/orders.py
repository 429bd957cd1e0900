"""Which devices, and in what pipeline order: the permutations of all subsets that differ.

Identical devices (same costs, memory and links) are not permuted. Up to five devices every order is listed; of more,
identical devices stay neighbours, and more than four kinds of device keep the cluster's order or its reverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping

from llmpq.spec import Cluster, Profile
from planner.constraints import Constraints

EXHAUSTIVE = 5  # devices: up to as many, every permutation is listed
ARRANGED = 4  # kinds of device: up to as many, every permutation of the kinds is listed where there are more devices

Order = tuple[int, ...]


def exhaustive(kinds: Mapping[int, int]) -> bool:
    """Whether `device_orders` lists all orders."""
    return len(kinds) <= EXHAUSTIVE


def device_orders(
    kinds: Mapping[int, int],
    *,
    required: Collection[int],
    max_stages: int,
    together: Callable[[Order], bool] = lambda order: True,
) -> Iterator[Order]:
    """Orders of devices by index, those with the most devices first, as they are asked for; each has all `required`.

    `kinds` has for each device that may be used the first one that is identical to it; `together` returns whether
    devices may all be used, and so may any of them.
    """
    few = len(set(kinds.values())) <= ARRANGED
    for length in range(min(len(kinds), max_stages), 0, -1):
        if exhaustive(kinds):
            orders = itertools.permutations(kinds, length)
            yield from (o for o in orders if _canonical(o, kinds) and set(required) <= set(o) and together(o))
            continue
        for used in _choices(kinds, length, required, together):
            arrangements = itertools.permutations(used) if few else iter({0: used, len(used) - 1: used[::-1]}.values())
            yield from (tuple(itertools.chain.from_iterable(arrangement)) for arrangement in arrangements)


def device_kinds(cluster: Cluster, profile: Profile, constraints: Constraints) -> dict[int, int]:
    """For each device that may be used the first one that is identical to it, constraints included."""
    devices = cluster.devices
    count = len(devices)

    def link(a: int, b: int) -> tuple[float, float]:
        found = profile.link(devices[a].name, devices[b].name)
        return found.latency_s, found.bytes_per_s

    def same(a: int, b: int) -> bool:
        tables = [profile.table(devices[d].name) for d in (a, b)]
        others = [d for d in range(count) if d not in (a, b)]
        return (
            not {devices[a].name, devices[b].name} & constraints.named
            and all(rule.weight(devices[a].name) == rule.weight(devices[b].name) for rule in constraints.at_most)
            and (constraints.objective == "time" or devices[a].price_per_hour == devices[b].price_per_hour)
            and (devices[a].kind, devices[a].memory_bytes) == (devices[b].kind, devices[b].memory_bytes)
            and devices[a].members == devices[b].members
            and (tables[0].rows, tables[0].message_s) == (tables[1].rows, tables[1].message_s)
            and tables[0].overhead_bytes == tables[1].overhead_bytes
            and link(a, b) == link(b, a)
            and all(link(a, d) == link(b, d) and link(d, a) == link(d, b) for d in others)
        )

    usable = [d for d, device in enumerate(devices) if device.name not in constraints.excluded]
    return {d: next(earlier for earlier in usable if earlier == d or same(earlier, d)) for d in usable}


def device_sets(kinds: Mapping[int, int], *, least: int = 1) -> Iterator[tuple[int, ...]]:
    """Sets of at least so many devices by index, identical ones side by side, the smallest sets first.

    Of identical devices the first ones.
    """
    for length in range(least, len(kinds) + 1):
        for used in _choices(kinds, length):
            yield tuple(itertools.chain.from_iterable(used))


def _canonical(order: Order, kinds: Mapping[int, int]) -> bool:
    """Whether identical devices are used and ordered by index."""
    for kind in set(kinds.values()):
        used = [d for d in order if kinds[d] == kind]
        if used != [d for d in kinds if kinds[d] == kind][: len(used)]:
            return False
    return True


def _choices(
    kinds: Mapping[int, int],
    length: int,
    required: Collection[int] = (),
    together: Callable[[Order], bool] = lambda order: True,
) -> Iterator[list[list[int]]]:
    """The choices of so many devices, by kind: of each kind the first ones, and all that are `required`."""
    groups = [[d for d in kinds if kinds[d] == kind] for kind in dict.fromkeys(kinds.values())]
    later = list(itertools.accumulate(map(len, reversed(groups)), initial=0))[::-1]  # devices from this group on

    def choices(i: int, left: int, used: list[list[int]]) -> Iterator[list[list[int]]]:
        if i == len(groups):
            yield used
            return
        needed = max((at + 1 for at, d in enumerate(groups[i]) if d in required), default=0)
        for count in range(max(needed, left - later[i + 1]), min(len(groups[i]), left) + 1):
            more = [*used, groups[i][:count]] if count else used
            if not count or together(tuple(itertools.chain.from_iterable(more))):
                yield from choices(i + 1, left - count, more)

    return choices(0, length, [])
