"""The clusters of `python -m bench.plans.hetero`: CPU devices of one machine that differ as those of a real cluster do.

They are emulated. A device is a process with its own instruction set and memory cap; a slow one computes as it is and
then waits (`Device.slowdown`), and a network holds messages back (`Link.emulated`).

Chosen by these rules, before any plan was made for them:

- Each stands for one way in which devices are unequal: one that could do it all beside a lesser one, a fast one with
  little memory, a newcomer among old ones, devices that differ in everything, a slow network, four of three types.
- Speed: a product takes 1, 2 and 4 times as long with avx512, avxvnni and avx2 (prefill, one thread), times the
  slowdown. No device is more than ten times slower than another, as an L4 is beside an H100; so none has the portable
  kernels, which are 35 times slower than those of avx512: a plan wins too easily by leaving such a device alone.
- Memory: a cap is `BUFFER_BYTES` and a share of what the model takes at 4 bit with its largest cache. The shares of a
  cluster sum to 1.5 to 1.7. A device alone stores a tied table once, so even one with a share of 0.6 may just hold all.
- Work: the threads of all devices, each divided by its slowdown, are at most 1.5 of the machine's two cores, so that
  devices seldom wait for each other's, and messages and the system have some, too. Each has one thread: two that wait
  for each other, and a third beside them on two cores, take many times as long as they would on cores of their own.

Two things were changed after trials, by the last rule. "big" had two threads and a slowdown of 2 and lost all its speed
to waiting; the workloads were halved then, too, so that all cells take less than an hour. And the rule was 2 cores:
four clusters kept both busy, and with three processes decode took up to a quarter longer than its stages explain. All
their slowdowns are 1.5 times those of that trial.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import permutations

from llmpq.spec import Cluster, Device, Link, ModelSpec, Precision, Workload, kv_dtype
from llmpq.spec.cluster import Isa

CORES = 1.5  # of the machine's two, that the devices of a cluster may keep busy
BUFFER_BYTES = 40 * 2**20  # for a process's own and the activations of a batch: what does not depend on the layers
ETHERNET = (2e-3, 117e6)  # seconds, bytes/s: 1 Gbit/s, and latency such that a busy machine's own is below it
RADIO = (10e-3, 20e6)


@dataclass(frozen=True)
class Emulated:
    """A cluster but for its caps, which depend on the model."""

    name: str
    about: str
    devices: tuple[Device, ...]
    shares: tuple[float, ...]  # of `needed_bytes`, for each device
    links: tuple[Link, ...] = ()  # those that are not here are the machine's own

    @property
    def cores(self) -> float:
        """That it keeps busy on average if no device ever waits."""
        return sum(device.threads / device.slowdown for device in self.devices)

    def cluster(self, needed_bytes: int) -> Cluster:
        """The cluster for a model that takes so much."""
        caps = [BUFFER_BYTES + int(share * needed_bytes) for share in self.shares]
        devices = tuple(replace(d, memory_bytes=cap) for d, cap in zip(self.devices, caps, strict=True))
        return Cluster(devices, self.links)


def needed_bytes(spec: ModelSpec, workloads: Iterable[Workload], precision: Precision) -> int:
    """Weights of all units at `precision`, and the cache of the workload that has the largest."""
    weights = sum(spec.unit_bytes(unit, precision) for unit in spec.units)
    tokens = max(workload.batch_size * workload.max_length for workload in workloads)
    return weights + spec.num_layers * spec.kv_bytes(tokens, kv_dtype(spec.compute_dtype("cpu")))


def _cpu(name: str, isa: Isa, slowdown: float = 1.0) -> Device:
    return Device(name, "cpu", isa=isa, slowdown=slowdown)


def _between(*hosts: tuple[str, ...], network: tuple[float, float]) -> tuple[Link, ...]:
    """A link for every ordered pair of devices that are on different hosts."""
    pairs = (pair for a, b in permutations(hosts, 2) for pair in ((x, y) for x in a for y in b))
    return tuple(Link(source, target, *network, emulated=True) for source, target in pairs)


CLUSTERS = (
    Emulated(
        "big and small",
        "The big device alone can hold everything.",
        (_cpu("big", "avx512"), _cpu("small", "avx2", 2)),
        (1.2, 0.5),
    ),
    Emulated(
        "fast but small",
        "The fast device holds a third, the slow one everything.",
        (_cpu("fast", "avx512", 1.5), _cpu("slow", "avx2", 1.5)),
        (0.35, 1.15),
    ),
    Emulated(
        "three unequal",
        "Each is slower than the one before, and has more memory.",
        (_cpu("first", "avx512", 1.5), _cpu("second", "avxvnni", 3), _cpu("third", "avx2", 3)),
        (0.4, 0.5, 0.6),
    ),
    Emulated(
        "two old and one new",
        "The new device has half of what is needed; each is on a host of its own.",
        (_cpu("new", "avx512", 1.5), _cpu("old0", "avx2", 3), _cpu("old1", "avx2", 3)),
        (0.5, 0.6, 0.6),
        _between(("new",), ("old0",), ("old1",), network=ETHERNET),
    ),
    Emulated(
        "slow link",
        "One device is twice as fast as the other, either can hold everything, and the network is slow.",
        (_cpu("here", "avx512"), _cpu("there", "avx512", 2)),
        (0.8, 0.8),
        _between(("here",), ("there",), network=RADIO),
    ),
    Emulated(
        "four of three types",
        "Two fast devices with little memory on one host, two slower ones with more on another.",
        (_cpu("a0", "avx512", 3), _cpu("a1", "avx512", 3), _cpu("b", "avxvnni", 3), _cpu("c", "avx2", 3)),
        (0.3, 0.3, 0.5, 0.6),
        _between(("a0", "a1"), ("b", "c"), network=ETHERNET),
    ),
)
