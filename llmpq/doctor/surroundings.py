"""What runs need around them: the planner's solver, a cache, temporary files, network interfaces."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmpq.doctor.finding import Finding, ok, problem, unanswered, warning
from llmpq.doctor.probing import Answer
from llmpq.runtime.peers import loopback
from llmpq.spec.formatting import format_bytes

_LITTLE_BYTES = 2**30
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_REINSTALL = "run `pip install --force-reinstall mip highsbox`"


def solver_finding(answer: Answer) -> Finding:
    if answer.problem:
        return unanswered("planner", "solver", answer, _REINSTALL)
    name = answer.values["solver"]
    if not answer.values["right"]:
        return problem("planner", "solver", f"{name} does not find the best of a small program", _REINSTALL)
    if name != "HIGHS":
        advice = "run `pip install highsbox`: HiGHS is much faster"
        return warning("planner", "solver", f"{name} is used, as HiGHS was not found", advice)
    return ok("planner", "solver", "HiGHS, and it solves a small program")


def cache_finding(folder: str | None, answer: Answer) -> Finding:
    """`answer`: of whether files can be written in the folder."""
    if folder is None:
        advice = "set LLMPQ_CACHE to a folder"
        return warning("folders", "cache", "there is no home folder for it, so everything is measured anew", advice)
    if answer.problem:
        advice = "set LLMPQ_CACHE to a folder that can be written: until then everything is measured anew"
        return warning("folders", "cache", f"{folder}: {answer.problem}", advice)
    free = answer.values["free_bytes"]
    found = f"{folder}, {format_bytes(free)} free"
    if free < _LITTLE_BYTES:
        advice = "free some, or set LLMPQ_CACHE to another folder: quantized models are kept there"
        return warning("folders", "cache", found, advice, {"free_bytes": free})
    return ok("folders", "cache", found, {"free_bytes": free})


def temporary_finding(folder: str, answer: Answer) -> Finding:
    """Every run writes files of its own there."""
    if answer.problem:
        named = replace(answer, problem=f"{folder}: {answer.problem}")
        return unanswered("folders", "temporary", named, "set TMPDIR to a folder that can be written")
    free = answer.values["free_bytes"]
    return ok("folders", "temporary", f"{folder}, {format_bytes(free)} free", {"free_bytes": free})


def interface_findings(
    answer: Answer, gpus: int | None, environment: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Which interfaces gloo and NCCL would use, on this host and on the way to others.

    `gpus`: how many torch sees, None if that is not known.
    """
    if answer.problem:
        advice = "look at the name service (/etc/resolv.conf, /etc/hosts)"
        if answer.late:
            yield unanswered("network", "interfaces", answer, advice)
        else:  # runs on this host may work all the same
            yield warning("network", "interfaces", answer.problem, advice)
        return
    up = answer.values["interfaces"]
    found = ", ".join(name if is_up else f"{name} (down)" for name, is_up in up.items()) or "none"
    if not up.get(loopback()):
        advice = "bring the loopback interface up (`ip link set lo up`): the stages of one host meet there"
        yield problem("network", "interfaces", found, advice)
    else:
        yield ok("network", "interfaces", found)
    yield _gloo(up, environment.get(_GLOO))
    yield _nccl(up, environment.get(_NCCL), gpus)
    for host, way in answer.values["ways"].items():
        yield _way(host, way)


def _gloo(up: Collection[str], wanted: str | None) -> Finding:
    """Of the interfaces that are listed for it, by their names."""
    if not wanted:
        return ok("network", "gloo", f"{loopback()} among stages of this host; else the interface on which ranks meet")
    absent = [name for name in wanted.split(",") if name not in up]
    if absent:
        found = f"{_GLOO}={wanted}, and this host has no {', '.join(absent)}"
        advice = f"unset it, or set it to one of {', '.join(up)}: runs that are started rank by rank read it"
        return warning("network", "gloo", found, advice)
    return ok("network", "gloo", f"{wanted} among ranks, as {_GLOO} says; else {loopback()}")


def _nccl(up: Collection[str], wanted: str | None, gpus: int | None) -> Finding:
    if gpus is None:
        return ok("network", "NCCL", "joins different GPUs; whether this host has some is not known")
    if gpus < 2:
        return ok("network", "NCCL", f"not used: it joins different GPUs, and this host has {gpus}")
    if not wanted:
        return ok("network", "NCCL", f"chooses by itself; {_NCCL}=NAME would choose for it")
    chosen = _nccl_interfaces(up, wanted)
    if not chosen:
        found = f"{_NCCL}={wanted} leaves none of this host's interfaces"
        return problem("network", "NCCL", found, f"unset it, or set it to one of {', '.join(up)}")
    return ok("network", "NCCL", f"{', '.join(chosen)}, as {_NCCL}={wanted} says")


def _nccl_interfaces(up: Collection[str], wanted: str) -> list[str]:
    """Those that a list of prefixes leaves: `=` before it makes them names, `^` before that excludes them.

    From NCCL_SOCKET_IFNAME in NCCL's documentation of environment variables.
    """
    excluded = wanted.startswith("^")
    exact = wanted[excluded:].startswith("=")
    listed = tuple(wanted[excluded + exact :].split(","))
    return [name for name in up if (name in listed if exact else name.startswith(listed)) != excluded]


def _way(host: str, way: Mapping[str, Any]) -> Finding:
    if "problem" in way:
        return problem(
            "network", host, f"there is no way to it: {way['problem']}", "correct the host in the cluster file"
        )
    found = f"through {way['interface'] or 'an interface that is not known'} ({way['address']})"
    return ok("network", f"to {host}", found, advice=f"not reachable from here: run `llmpq doctor` on {host}, too")
