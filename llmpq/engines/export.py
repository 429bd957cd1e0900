"""A plan in another engine's words."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from llmpq.checkpoint.configuration import family_of_config
from llmpq.checkpoint.family import Family
from llmpq.checkpoint.model_files import DEMO, Description, Model, describe
from llmpq.spec import Device, ModelSpec, Plan, Stage, UsageError


@dataclass(frozen=True)
class Export:
    """`files` by name, the first of them to be run or read first; `lost`: what of the plan the engine does not do."""

    files: Mapping[str, str]
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A plan to export, and the model that it was made for."""

    plan: Plan
    model: Model
    engine: str  # its name, for messages

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @cached_property
    def described(self) -> Description:
        return describe(self.model.checkpoint)

    @property
    def family(self) -> Family:
        """As transformers has it, whatever the checkpoint's form."""
        return family_of_config(self.described.config)

    @property
    def name(self) -> str:
        """What names the model in commands: `demo`, a hub id or a path."""
        checkpoint = self.model.checkpoint
        named = checkpoint.name == DEMO or "/" in checkpoint.name
        return checkpoint.name if named else str(checkpoint.path.resolve())

    @property
    def stages(self) -> list[tuple[Stage, Device]]:
        return [(stage, self.plan.cluster.device(stage.device)) for stage in self.plan.stages]

    def refuse(self, reason: str) -> UsageError:
        """To raise."""
        return UsageError(f"{self.engine} cannot take this plan: {reason}")

    def check_one_host(self) -> None:
        """Raise UsageError if its stages are on several hosts."""
        hosts = list(dict.fromkeys(device.host for _, device in self.stages))
        if len(hosts) > 1:
            raise self.refuse(f"it has stages on {' and '.join(hosts)}, and this engine is one process on one host")

    def check_own_gpus(self) -> None:
        """Raise UsageError if two stages share a GPU."""
        seen: dict[tuple[str, int], str] = {}
        for _, device in self.stages:
            other = seen.setdefault((device.host, device.index), device.name) if device.kind == "cuda" else device.name
            if other != device.name:
                raise self.refuse(f"{other} and {device.name} are one GPU, and each of its stages has one of its own")


def named_cpus(job: Job) -> str:
    """The plan's CPUs, as the subject of a sentence."""
    cpus = [device.name for _, device in job.stages if device.kind == "cpu"]
    return f"{cpus[0]} is a CPU" if len(cpus) == 1 else f"{', '.join(cpus)} are CPUs"


def layer_count(stage: Stage) -> int:
    first, end = stage.layers
    return end - first


class Expanded(str):
    """A word that a shell is to expand: it stands in a script as it is, with its own quotes."""


def shell_script(commands: Iterable[Sequence[str]], variables: Mapping[str, str] | None = None) -> str:
    """Commands for `sh`, after variables that they need; an option and its value on a line."""
    lines = ["#!/bin/sh", "set -e", 'cd "$(dirname "$0")"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    for command in commands:
        groups: list[list[str]] = []
        for word in command:
            with_value = len(groups) > 1 and len(groups[-1]) > 1
            if not groups or word.startswith("-") or with_value:
                groups.append([])
            groups[-1].append(word if isinstance(word, Expanded) else shlex.quote(word))
        lines.append(" \\\n  ".join(" ".join(group) for group in groups))
    return "\n".join(lines) + "\n"
