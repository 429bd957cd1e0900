"""A plan's stages as worker processes of this host: what they are told, and their start."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llmpq.checkpoint.model_files import Checkpoint
from llmpq.host_limits import usable_cores
from llmpq.progress import Notify, counted
from llmpq.runtime.handshake import SECRET
from llmpq.runtime.launch import Program, device_environment, host_threads
from llmpq.runtime.peers import among_us, loopback, transports_on
from llmpq.runtime.torchrun import GRACE_S, Rank
from llmpq.runtime.worker_group import WorkerGroup
from llmpq.spec import ModelSpec, Plan, Profile, UsageError
from llmpq.temporary import writing_there


class Served(NamedTuple):
    """What a pipeline runs: a plan, and the model that it is for."""

    plan: Plan
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def longest(self) -> int:
        """Tokens of a sequence."""
        return min(self.plan.max_length, self.spec.max_positions)


@dataclass(frozen=True)
class Options:
    """How stages run, whatever the plan; see Engine. `logits` is the file for them."""

    backend: str | None
    eager: bool
    waits: Profile | None
    logits: Path | None
    rank: Rank | None
    transports: Mapping[str, str] = field(default_factory=among_us)  # of an engine's pipelines, on one host


def start(
    served: Served, options: Options, folder: Path, notify: Notify, group: WorkerGroup | None = None
) -> tuple[WorkerGroup, int]:
    """Start all stages, or this rank's, and return when they are loaded; what they are told is kept in `folder`.

    Workers of `group` that a loss has left over go on as far as they can. Returns also how many units they have kept.
    Raises as Engine does; no worker is left then, unless they outlive that.
    """
    plan, checkpoint, spec = served
    rank = options.rank
    plan.check_model(spec)
    here = _stages_here(plan, rank)
    devices = [plan.cluster.device(stage.device) for stage in plan.stages]
    with writing_there():
        folder = Path(tempfile.mkdtemp(prefix="pipeline-", dir=folder))
    store, transports = f"file:{folder / 'store'}", dict(options.transports)
    if rank is not None:
        store, transports = _among_ranks(rank, len(devices))
    host = socket.gethostname() if rank is None else rank.here
    names = {i: f"stage {i} on {devices[i].name} of {host}" for i in here}
    job = {
        "plan": plan.to_dict(),
        "spec": spec.to_dict(),
        "checkpoint": {"name": checkpoint.name, "path": str(checkpoint.path), "format": checkpoint.format},
        "backend": options.backend,
        "eager": options.eager,
        "waits": None if options.waits is None else options.waits.to_dict(),
        "logits": options.logits and str(options.logits),
        "store": store,
    }
    path = folder / "job.json"
    with writing_there():
        path.write_text(json.dumps(job), encoding="utf-8")
    programs = [
        Program(
            name,
            "llmpq.runtime.worker",
            ("--job", str(path), "--rank", str(i), "--name", name),
            device_environment(devices[i], host_threads(devices[i], devices, usable_cores())) | transports,
            devices[i].name if devices[i].kind == "cpu" and rank is None else None,
        )
        for i, name in names.items()
    ]
    if group is not None:
        group.renew(programs)
    elif rank is None:
        group = WorkerGroup(programs)
    else:
        group = WorkerGroup(programs, rank.rank, others=rank.peers, grace_s=GRACE_S, on_loss=rank.tell)
    try:
        group.await_start(counted(notify, "starting the stages", len(programs)))
        loaded = counted(notify, "loading the stages", len(programs))
        kept = 0
        for _, ready in group.collect("ready"):
            kept += ready["kept_units"]
            loaded()
    except BaseException:
        if not group.has_parted:
            group.close()
        raise
    return group, kept


def _among_ranks(rank: Rank, num_stages: int) -> tuple[str, dict[str, str]]:
    """Where the stages of torchrun's ranks meet, and the variables with which they do."""
    store, secret = rank.new_pipeline(num_stages)
    interface = loopback() if rank.one_host else rank.interface()
    found = transports_on(interface or "", secret)
    # Who started the ranks may have chosen an interface.
    return store, {name: value for name, value in found.items() if name == SECRET or (value and name not in os.environ)}


def _stages_here(plan: Plan, rank: Rank | None) -> range:
    """The stages that this process starts. Raises UsageError if it cannot."""
    devices = [plan.cluster.device(stage.device) for stage in plan.stages]
    for link in plan.cluster.links:
        ends = [plan.cluster.device(name).host for name in (link.source, link.target)]
        if link.emulated and ends[0] != ends[1]:
            raise UsageError(
                f"the link from {link.source} to {link.target} is emulated, but they are on two hosts, {ends[0]} "
                f"and {ends[1]}, whose clocks differ; leave out its `emulated`"
            )
    here = range(len(devices)) if rank is None else range(rank.rank, rank.rank + 1)
    if here.stop > len(devices):
        raise UsageError(f"rank {here.start} has no stage; the plan has {len(devices)}")
    elsewhere = [device.name for device in devices if device.host != devices[0].host]
    if rank is None and elsewhere:
        raise UsageError(f"device {elsewhere[0]} is on another host; start llmpq with torchrun on every host")
    return here
