"""Profile: the seconds of every operation on every device, and of the links between them; measured once, then cached.

Each device is measured in a worker process with the device's environment, and all devices of a host at the same time:
when a plan runs they share memory bandwidth, caches and clock rates, too. A cost table is kept by what it depends on:
processor, instruction set, threads, the other devices of the host, kernels, torch, shapes and ranges.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmpq import hardware, kernels, runtime
from llmpq.cache import find_record, keep_record
from llmpq.host_limits import usable_cores
from llmpq.kernels.gemm_path import ROW_TILE
from llmpq.measure.expert_routing import ALIKE, ExpertShares
from llmpq.measure.operation_grid import Ranges
from llmpq.progress import Notify, counted, silent
from llmpq.runtime.launch import Program, device_environment, host_threads
from llmpq.runtime.peers import among_us
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import (
    DEFAULT_ACTIVATIONS,
    NATIVE,
    WIDTHS,
    ActivationMode,
    Cluster,
    CostRow,
    CostTable,
    Device,
    KvBits,
    Link,
    ModelSpec,
    Plan,
    Precision,
    Profile,
    Record,
    Stage,
    UsageError,
    Width,
    Workload,
    ZeroKind,
)
from llmpq.spec.plan import Placement
from llmpq.temporary import working_folder

R = TypeVar("R", bound=Record)

VISIT_S = 0.005  # the least time of a visit to an operation, which has several
ROUND_TRIPS = 30  # of a message of each size

_STARTING, _TIMING, _CONNECTING = (
    "starting a process for each device",
    "measuring operations on every device",
    "measuring links between devices",
)


@dataclass(frozen=True, slots=True)
class Connection(Record):
    """A measured link, and the seconds that each of its ends is at work on a message and its answer."""

    link: Link
    source_s: float
    target_s: float


def profile(
    spec: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    *,
    group_size: int | None,
    zero: ZeroKind = "sym",
    activations: ActivationMode = DEFAULT_ACTIVATIONS,
    bits: Sequence[Width] = WIDTHS,
    kv_bits: Sequence[KvBits] = (16,),
    shares: ExpertShares = ALIKE,
    notify: Notify = silent,
) -> Profile:
    """Cost tables of all devices of a cluster, for plans of `spec` for workloads up to `workload`, and all links.

    Products are measured at each of `bits` in groups of `group_size` with this kind of zero, and as the checkpoint
    stores them, on CPUs in the mode `activations`; those of experts with routers that choose them for these `shares`
    of tokens, all alike by default. Attention is measured over KV caches of each of `kv_bits`.
    Links that the cluster gives are taken as they are. Raises UsageError for devices of another host or that are
    missing here, and WorkerLostError if a measuring process dies.
    """
    for device in cluster.devices:
        if device.host != "localhost":
            raise UsageError(
                f"device {device.name} is on {device.host}; run `llmpq profile` there and give its --costs"
            )
    ranges = Ranges.of(workload)
    widths = sorted({width for width in bits if isinstance(width, int)})
    asked = [Precision(width) if width == 16 else Precision(width, group_size, zero) for width in widths]
    stored = spec.stored_layouts if NATIVE in bits else ()
    precisions = [str(precision) for precision in dict.fromkeys((*asked, *stored))]
    products = {
        device.name: {"precisions": precisions, "activations": device.activations(activations)}
        for device in cluster.devices
    }
    caches = sorted(set(kv_bits), reverse=True)
    routed = shares.to_dict()
    keys = {
        device.name: _table_key(spec, cluster, device, ranges, products[device.name], routed, caches)
        for device in cluster.devices
    }
    tables = _found("costs", keys.values(), CostTable)
    given = {(link.source, link.target) for link in cluster.links}
    pairs = [(a, b) for a in cluster.devices for b in cluster.devices if a != b]
    links = {(a.name, b.name): _link_key(spec, a, b, ranges) for a, b in pairs}
    connected = _found("links", links.values(), Connection)
    to_time = not all(key in tables for key in keys.values())
    to_connect = [(a, b) for a, b in pairs if links[a.name, b.name] not in connected]
    if to_time or to_connect:
        transports = among_us()
        programs = [_program(device, cluster, transports) for device in cluster.devices]
        with WorkerGroup(programs) as group, working_folder() as folder:
            group.await_start(counted(notify, _STARTING, len(programs)))
            if to_time:
                for name, table in _time(group, cluster, spec, ranges, shares, caches, products, notify).items():
                    tables[keys[name]] = table
                    keep_record("costs", keys[name], table)
            for i, (a, b) in enumerate(to_connect):
                notify(_CONNECTING, i / len(to_connect))
                found = _connect(group, cluster, spec, ranges, (a, b), folder / f"store{i}")
                connected[links[a.name, b.name]] = found
                keep_record("links", links[a.name, b.name], found)
    connections = {ends: connected[key] for ends, key in links.items()}
    measured = [
        replace(found.link, source=ends[0], target=ends[1]) for ends, found in connections.items() if ends not in given
    ]
    costs = {name: replace(tables[key], message_s=_message_s(name, connections)) for name, key in keys.items()}
    return Profile(costs, (*cluster.links, *measured))


def _message_s(name: str, connections: Mapping[tuple[str, str], Connection]) -> float:
    """The median seconds that a device is at work on a message and its answer, at either end of any link."""
    spent = [
        seconds
        for ends, found in connections.items()
        for end, seconds in zip(ends, (found.source_s, found.target_s), strict=True)
        if end == name
    ]
    return statistics.median(spent) if spent else 0.0


def _processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.machine()


def _machine(device: Device) -> str:
    if device.kind == "cpu":
        return _processor()
    hardware.check_present(device)
    name: str = torch.cuda.get_device_name(device.index)
    return name


def _kind(device: Device) -> str:
    """The fields of a cluster's device that decide how fast it is."""
    where = f"threads={device.threads},isa={device.isa or 'widest'}" if device.kind == "cpu" else str(device.index)
    pace = f",slowdown={device.slowdown:g}" if device.slowdown > 1 else ""
    return f"{device.kind}:{where}{pace} ({_machine(device)})"


def _key(*key: object) -> str:
    """The name in the cache of a result that depends on `key` and on the code that measures and is measured."""
    folders = (Path(__file__).parent, Path(runtime.__file__).parent)
    digest = hashlib.sha256(json.dumps([kernels.version(), torch.__version__, *key]).encode())
    for path in (path for folder in folders for path in sorted(folder.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


def _found(kind: str, keys: Iterable[str], record: type[R]) -> dict[str, R]:
    """Those of the results that are in the cache."""
    looked = {key: find_record(kind, key, record) for key in keys}
    return {key: found for key, found in looked.items() if found is not None}


def _shapes(spec: ModelSpec) -> dict[str, Any]:
    """A ModelSpec without what costs do not depend on."""
    shapes = spec.to_dict()
    for field in (
        "name",
        "content_hash",
        "eos_token_ids",
        "bos_token_id",
        "norm_eps",
        "max_positions",
        "stored",
    ):
        del shapes[field]
    for kind in shapes["layer_kinds"]:
        del kind["rope"]
    return shapes


def _table_key(
    spec: ModelSpec,
    cluster: Cluster,
    device: Device,
    ranges: Ranges,
    products: Mapping[str, Any],
    shares: Mapping[str, Any],
    caches: Sequence[KvBits],
) -> str:
    neighbours = sorted(_kind(other) for other in cluster.devices if other != device)
    more = [] if caches == [16] else [caches]
    return _key("costs", _kind(device), neighbours, _shapes(spec), ranges.to_dict(), products, shares, *more)


def _link_key(spec: ModelSpec, a: Device, b: Device, ranges: Ranges) -> str:
    return _key("links", _kind(a), _kind(b), spec.hidden_size, ranges.to_dict())


def _program(device: Device, cluster: Cluster, transports: Mapping[str, str]) -> Program:
    arguments = ("--device", json.dumps(device.to_dict()))
    environment = device_environment(device, host_threads(device, cluster.devices, usable_cores()))
    environment |= transports
    return Program(f"measuring {device.name}", "llmpq.measure.timing_worker", arguments, environment)


def _time(
    group: WorkerGroup,
    cluster: Cluster,
    spec: ModelSpec,
    ranges: Ranges,
    shares: ExpertShares,
    caches: Sequence[KvBits],
    products: Mapping[str, Mapping[str, Any]],
    notify: Notify,
) -> dict[str, CostTable]:
    """Measure all devices at the same time, each its own `products`: their precisions and their mode."""
    notify(_TIMING, 0.0)
    alike = {"spec": spec.to_dict(), "ranges": ranges.to_dict(), "shares": shares.to_dict(), "kv_bits": caches}
    for device, worker in zip(cluster.devices, group.workers, strict=True):
        worker.send("operations", **alike, **products[device.name], visit_s=VISIT_S)
    done = dict.fromkeys(group.workers, 0.0)
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(group.workers):
        worker, event = group.receive()
        if event["event"] == "progress":
            done[worker] = event["done"] / event["total"]
        else:
            results[worker.rank] = event
            done[worker] = 1.0
        # Devices may have different numbers of cases, which are not known before they report.
        notify(_TIMING, statistics.fmean(done.values()))
    for worker in group.workers:
        worker.send("done")
    overhead = {worker.rank: event["overhead_bytes"] for worker, event in group.collect("overhead")}
    return {
        device.name: CostTable(
            device=_kind(device),
            kernels=kernels.version(),
            threads=device.threads,
            isa=results[rank]["isa"],
            overhead_bytes=overhead[rank],
            rows=tuple(CostRow.from_dict(row) for row in results[rank]["rows"]),
            machine=_machine(device),
            date=date.today().isoformat(),
            slowdown=device.slowdown,
            row_tile=ROW_TILE if device.kind == "cuda" else 1,
        )
        for rank, device in enumerate(cluster.devices)
    }


def _connect(
    group: WorkerGroup, cluster: Cluster, spec: ModelSpec, ranges: Ranges, ends: tuple[Device, Device], store: Path
) -> Connection:
    """Send hidden states of several sizes from one device to another, and a token back, as a pipeline of both would."""
    sizes = sorted({1, ranges.batch, max(1, ranges.tokens // 8), max(1, ranges.tokens // 2), ranges.tokens})
    plan = _pipeline(spec, ends, ranges.tokens)
    workers = [group.workers[cluster.devices.index(device)] for device in ends]
    command = {"plan": plan.to_dict(), "spec": spec.to_dict(), "store": str(store), "sizes": sizes}
    for rank, worker in enumerate(workers):
        worker.send("link", **command, rank=rank, round_trips=ROUND_TRIPS)
    events: dict[int, dict[str, Any]] = {}
    for _ in workers:
        worker, event = group.receive()
        events[workers.index(worker)] = event
    for worker in workers:
        worker.send("done")
    whole = [(4.0 * tokens * spec.hidden_size, s) for tokens, s in zip(sizes, events[0]["seconds"], strict=True)]
    in_decode = sizes.index(ranges.batch)
    return connection(ends, whole, *(events[rank]["handling_s"][in_decode] for rank in range(2)))


def connection(
    ends: tuple[Device, Device], whole: Sequence[tuple[float, float]], source_s: float, target_s: float
) -> Connection:
    """The link that is left of (bytes of a message, seconds for it and its answer) besides what the ends are at work.

    Its latency is half of what does not grow with the bytes: the answer is little more than a header, too.
    """
    fixed, per_byte = fit_line(whole)
    latency_s = max(0.0, fixed - source_s - target_s) / 2
    return Connection(Link(ends[0].name, ends[1].name, latency_s, 1 / max(per_byte, 1e-15)), source_s, target_s)


def _pipeline(spec: ModelSpec, ends: tuple[Device, Device], tokens: int) -> Plan:
    """A plan of two stages whose largest step has `tokens` tokens; nothing is computed."""
    w16 = Precision(16)
    layers = spec.num_layers
    return Plan(
        model=spec.name,
        model_hash=spec.content_hash,
        cluster=Cluster(ends),
        workload=Workload(1, tokens, 1),
        stages=(
            Stage(ends[0].name, (0, layers), (w16,) * layers),
            Stage(ends[1].name, (layers, layers), ()),
        ),
        embedding=Placement(0, w16),
        head=Placement(1, w16),
        wire_dtype="float32",
        slots=1,
        max_length=tokens,
        prefill_microbatch=1,
        decode_microbatch=1,
    )


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), both at least 0, of a + b * x ~ y for points (x, y > 0): the least sum of squared relative errors."""
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    x_mean = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    y_mean = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    slope = sum(w * (x - x_mean) * (y - y_mean) for w, (x, y) in zip(weights, points, strict=True)) / max(
        spread, 1e-300
    )
    if slope <= 0:
        return y_mean, 0.0
    if y_mean < slope * x_mean:  # through the origin, then
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        return 0.0, sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
    return y_mean - slope * x_mean, slope
