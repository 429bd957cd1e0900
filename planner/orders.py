"""Which devices, and in what pipeline order: the permutations of all subsets, as far as they differ.

Identical devices (same costs, memory and links) are not permuted. Up to four devices every order is searched; beyond,
identical devices stay neighbours, and with more than four kinds these keep the cluster's order or its reverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping

from llmpq.spec import Cluster, Profile
from planner.constraints import Constraints

EXHAUSTIVE = 4  # devices, or kinds of them, whose every permutation is searched

Order = tuple[int, ...]


def device_orders(kinds: Mapping[int, int], *, required: Collection[int], max_stages: int) -> list[Order]:
    """Orders of devices by index, those with the most devices first, with all that are `required`.

    `kinds` has for each device that may be used the first one that is identical to it.
    """
    count = len(kinds)
    if count <= EXHAUSTIVE:
        lengths = range(count, 0, -1)
        orders = [o for length in lengths for o in itertools.permutations(kinds, length) if _canonical(o, kinds)]
    else:
        orders = sorted(_grouped(kinds), key=len, reverse=True)
    return [o for o in orders if len(o) <= max_stages and set(required) <= set(o)]


def device_kinds(cluster: Cluster, profile: Profile, constraints: Constraints) -> dict[int, int]:
    """For each device that may be used the first one that is identical to it, and of which nothing else is asked."""
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
            and (devices[a].kind, devices[a].memory_bytes) == (devices[b].kind, devices[b].memory_bytes)
            and (tables[0].rows, tables[0].overhead_bytes) == (tables[1].rows, tables[1].overhead_bytes)
            and link(a, b) == link(b, a)
            and all(link(a, d) == link(b, d) and link(d, a) == link(d, b) for d in others)
        )

    usable = [d for d, device in enumerate(devices) if device.name not in constraints.excluded]
    return {d: next(earlier for earlier in usable if earlier == d or same(earlier, d)) for d in usable}


def _canonical(order: Order, kinds: Mapping[int, int]) -> bool:
    """Whether identical devices appear first come, first served."""
    for kind in set(kinds.values()):
        used = [d for d in order if kinds[d] == kind]
        if used != [d for d in kinds if kinds[d] == kind][: len(used)]:
            return False
    return True


def _grouped(kinds: Mapping[int, int]) -> Iterator[Order]:
    """Orders in which identical devices are neighbours."""
    groups = [[d for d in kinds if kinds[d] == kind] for kind in dict.fromkeys(kinds.values())]
    for counts in itertools.product(*(range(len(group) + 1) for group in groups)):
        used = [group[:count] for group, count in zip(groups, counts) if count]
        if not used:
            continue
        exhaustive = len(groups) <= EXHAUSTIVE
        arrangements = (
            itertools.permutations(used) if exhaustive else iter({0: used, len(used) - 1: used[::-1]}.values())
        )
        for arrangement in arrangements:
            yield tuple(d for group in arrangement for d in group)
