"""The versions of what llmpq is built on, against what it asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from llmpq import __version__
from llmpq.doctor.finding import Finding, ok, problem

_TOPIC = "versions"
_OLDEST_PYTHON = (3, 10)
# In this order. What the installed llmpq asks for counts; these are there for a source tree that was not installed.
_NEEDED = ("torch", "transformers", "mip", "highsbox", "gguf", "safetensors", "numpy", "rich", "plotly")
_OPTIONAL = {"triton": "its kernels for GPUs are not there; torch's CUDA builds bring it along"}


def package_findings(required: Sequence[str] | None = None) -> Iterator[Finding]:
    """`required`: requirements as a project declares them; None: those of the installed llmpq."""
    yield ok(_TOPIC, "llmpq", __version__)
    found = sys.version.split()[0]
    if sys.version_info < _OLDEST_PYTHON:
        yield problem(_TOPIC, "python", found, f"use Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer")
    else:
        yield ok(_TOPIC, "python", found)
    for requirement in _requirements(required):
        yield _needed(requirement)
    for name, loss in _OPTIONAL.items():
        version = _version(name)
        if version is None:
            yield ok(_TOPIC, name, f"not installed: {loss}")
        else:
            yield ok(_TOPIC, name, version)


def _needed(requirement: Requirement) -> Finding:
    name, version = requirement.name, _version(requirement.name)
    wanted = f"{name}{requirement.specifier}"
    if version is None:
        return problem(_TOPIC, name, "not installed", f"run `pip install '{wanted}'`")
    if not requirement.specifier.contains(version, prereleases=True):
        return problem(_TOPIC, name, f"{version}, but {wanted} is needed", f"run `pip install '{wanted}'`")
    return ok(_TOPIC, name, version)


def _requirements(required: Sequence[str] | None) -> list[Requirement]:
    """Those without a condition or whose condition holds, in the order of _NEEDED."""
    if required is None:
        try:
            required = metadata.requires("llmpq") or ()
        except metadata.PackageNotFoundError:
            required = ()
    parsed = {}
    for text in (*_NEEDED, *required):
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            parsed[requirement.name] = requirement
    return list(parsed.values())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
