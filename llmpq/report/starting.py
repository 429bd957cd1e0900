"""What to type to run a plan, on every host that it has."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Sequence
from itertools import groupby

from llmpq.spec import Plan

_PORT = 29500  # torchrun's own


def is_on_one_host(plan: Plan) -> bool:
    """Whether a process of this host can start all of it by itself."""
    return {plan.cluster.device(stage.device).host for stage in plan.stages} == {"localhost"}


def start_commands(plan: Plan, options: Sequence[str]) -> list[str]:
    """A line for each command; of several hosts, behind the host it is for. `options` are those of `llmpq run`.

    With a new secret, by which the processes of several hosts know each other.
    """
    hosts = [plan.cluster.device(stage.device).host for stage in plan.stages]
    if is_on_one_host(plan):
        return [shlex.join(["llmpq", "run", *options])]
    secret = f"LLMPQ_SECRET={secrets.token_hex(16)}"
    nodes = [(host, len(list(stages))) for host, stages in groupby(hosts)]
    if len(nodes) == len(set(hosts)):
        return [
            f"{host}: {secret} {shlex.join([*_torchrun(nodes, node), *options])}"
            for node, (host, _) in enumerate(nodes)
        ]
    # torchrun's ranks count up from host to host.
    meeting = f"WORLD_SIZE={len(hosts)} MASTER_ADDR={shlex.quote(hosts[0])} MASTER_PORT={_PORT}"
    command = shlex.join(["llmpq", "run", *options])
    return [f"{host}: {secret} RANK={rank} {meeting} {command}" for rank, host in enumerate(hosts)]


def _torchrun(nodes: Sequence[tuple[str, int]], node: int) -> list[str]:
    """Of nodes, each a host and how many stages it has."""
    where = {
        "nnodes": len(nodes),
        "node-rank": node,
        "nproc-per-node": nodes[node][1],
        "master-addr": nodes[0][0],
        "master-port": _PORT,
    }
    return [
        "torchrun",
        *(part for name, value in where.items() for part in (f"--{name}", str(value))),
        "-m",
        "llmpq.run",
    ]
