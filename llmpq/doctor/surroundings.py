"""What runs need around them: the planner's solver, a cache, temporary files, network interfaces."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from llmpq.doctor.finding import Finding, ok, problem, warning
from llmpq.doctor.probing import Answer
from llmpq.spec.formatting import format_bytes

_LITTLE_BYTES = 2**30
_SOCKETS = {"GLOO_SOCKET_IFNAME": "gloo", "NCCL_SOCKET_IFNAME": "NCCL"}


def solver_finding(answer: Answer) -> Finding:
    if answer.problem:
        return problem("planner", "solver", answer.problem, "run `pip install --force-reinstall mip highsbox`")
    name = answer.values["solver"]
    if not answer.values["right"]:
        advice = "run `pip install --force-reinstall mip highsbox`"
        return problem("planner", "solver", f"{name} does not find the best of a small program", advice)
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
        return problem(
            "folders", "temporary", f"{folder}: {answer.problem}", "set TMPDIR to a folder that can be written"
        )
    free = answer.values["free_bytes"]
    return ok("folders", "temporary", f"{folder}, {format_bytes(free)} free", {"free_bytes": free})


def interface_findings(answer: Answer, gpus: int, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Which interfaces gloo and NCCL would use, on this host and on the way to others."""
    if answer.problem:
        advice = "look at the name service (/etc/resolv.conf, /etc/hosts)"
        yield warning("network", "interfaces", answer.problem, advice)
        return
    up = answer.values["interfaces"]
    found = ", ".join(name if is_up else f"{name} (down)" for name, is_up in up.items()) or "none"
    loopback = next((name for name in up if name.startswith("lo")), None)
    if loopback is None or not up[loopback]:
        advice = "bring the loopback interface up (`ip link set lo up`): the stages of one host meet there"
        yield problem("network", "interfaces", found, advice)
    else:
        yield ok("network", "interfaces", found)
    for variable, library in _SOCKETS.items():
        wanted = environment.get(variable)
        if library == "NCCL" and gpus < 2 and wanted is None:
            yield ok("network", library, f"not used: it joins different GPUs, and this host has {gpus}")
        elif wanted is None and library == "NCCL":
            yield ok("network", library, "chooses by itself; NCCL_SOCKET_IFNAME=NAME would choose for it")
        elif wanted is None:
            yield ok(
                "network", library, f"{loopback} among stages of this host; else the interface on which ranks meet"
            )
        elif wanted.lstrip("=^").partition(",")[0].partition(":")[0] not in up and not wanted.startswith("^"):
            advice = f"unset {variable}, or set it to one of {', '.join(up)}"
            yield problem("network", library, f"{variable}={wanted}, which this host does not have", advice)
        else:
            yield ok("network", library, f"{wanted}, as {variable} says")
    for host, way in answer.values["ways"].items():
        yield _way(host, way)


def _way(host: str, way: Mapping[str, Any]) -> Finding:
    if "problem" in way:
        return problem(
            "network", host, f"there is no way to it: {way['problem']}", "correct the host in the cluster file"
        )
    found = f"through {way['interface'] or 'an interface that is not known'} ({way['address']})"
    return ok("network", f"to {host}", found, advice=f"not reachable from here: run `llmpq doctor` on {host}, too")
