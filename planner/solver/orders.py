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
) -> list[Order]:
    """Orders of devices by index, those with the most devices first; each has all `required` devices.

    `kinds` has for each device that may be used the first one that is identical to it; `together` returns whether
    devices may all be used.
    """
    if exhaustive(kinds):
        lengths = range(len(kinds), 0, -1)
        orders = [o for length in lengths for o in itertools.permutations(kinds, length) if _canonical(o, kinds)]
    else:
        orders = sorted(_grouped(kinds), key=len, reverse=True)
    return [o for o in orders if len(o) <= max_stages and set(required) <= set(o) and together(o)]


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


def device_sets(kinds: Mapping[int, int]) -> Iterator[tuple[int, ...]]:
    """Sets of devices by index, identical ones side by side; of identical devices the first ones."""
    for groups in _groups(kinds):
        yield tuple(itertools.chain.from_iterable(groups))


def _canonical(order: Order, kinds: Mapping[int, int]) -> bool:
    """Whether identical devices are used and ordered by index."""
    for kind in set(kinds.values()):
        used = [d for d in order if kinds[d] == kind]
        if used != [d for d in kinds if kinds[d] == kind][: len(used)]:
            return False
    return True


def _groups(kinds: Mapping[int, int]) -> Iterator[list[list[int]]]:
    """For each choice of numbers of devices of each kind the devices, by kind."""
    groups = [[d for d in kinds if kinds[d] == kind] for kind in dict.fromkeys(kinds.values())]
    for counts in itertools.product(*(range(len(group) + 1) for group in groups)):
        if any(counts):
            yield [group[:count] for group, count in zip(groups, counts) if count]


def _grouped(kinds: Mapping[int, int]) -> Iterator[Order]:
    """Orders in which identical devices are side by side."""
    few = len(set(kinds.values())) <= ARRANGED
    for used in _groups(kinds):
        arrangements = itertools.permutations(used) if few else iter({0: used, len(used) - 1: used[::-1]}.values())
        for arrangement in arrangements:
            yield tuple(d for group in arrangement for d in group)
