"""The runs that predictions are judged by, as prediction_runs.json lists them: models, clusters, and plans for both.

The list was written before any of them ran. A cluster's `reach` is what its cost tables are measured for; tables have
powers of two, the runs lie between them. Widths are written as the command line prints them: "4x10 8x12".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.machine import ROOT
from llmpq.checkpoint.model_files import Model, open_model
from llmpq.spec import (
    DEFAULT_ACTIVATIONS,
    Cluster,
    Device,
    Link,
    ModelSpec,
    Placement,
    Plan,
    Precision,
    Record,
    Stage,
    Workload,
)

GROUP_SIZE = 32
PATH = ROOT / "bench" / "predictions" / "prediction_runs.json"


@dataclass(frozen=True, slots=True)
class Source(Record):
    """A model as the command line takes it; a folder counts from the project's."""

    model: str
    load_format: Literal["auto", "dummy"]

    def open(self) -> Model:
        folder = ROOT / self.model
        return open_model(str(folder) if folder.is_dir() else self.model, self.load_format)


@dataclass(frozen=True, slots=True)
class Place(Record):
    """A cluster, and the largest workload that runs on it."""

    reach: Workload
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.devices, self.links)


@dataclass(frozen=True, slots=True)
class Case(Record):
    """One run: `batch` prompts of `prompt` tokens, `output` more of each, by a plan."""

    model: str
    cluster: str
    batch: int
    prompt: int
    output: int
    prefill_microbatch: int
    decode_microbatch: int
    embedding: int  # bits
    stages: dict[str, str]  # device -> bits of its layers, in the pipeline's order
    head: int  # bits

    @property
    def name(self) -> str:
        return f"{self.model}-{self.cluster}-b{self.batch}-s{self.prompt}-n{self.output}"

    @property
    def key(self) -> tuple[str, str]:
        """What one measurement of costs is for: a model on a cluster."""
        return self.model, self.cluster

    @property
    def bits(self) -> set[int]:
        """All widths that occur."""
        return {self.embedding, self.head}.union(*map(_widths, self.stages.values()))

    def plan(self, spec: ModelSpec, cluster: Cluster) -> Plan:
        """The listed plan. Raises UsageError or InvalidField if it is none for this model and cluster."""
        stages: list[Stage] = []
        for name, text in self.stages.items():
            first, bits = stages[-1].layers[1] if stages else 0, tuple(_widths(text))
            stages.append(Stage(name, (first, first + len(bits)), tuple(map(_precision, bits)), DEFAULT_ACTIVATIONS))
        plan = Plan(
            model=spec.name,
            model_hash=spec.content_hash,
            cluster=cluster,
            workload=Workload(self.batch, self.prompt, self.output),
            stages=tuple(stages),
            embedding=Placement(0, _precision(self.embedding)),
            head=Placement(len(stages) - 1, _precision(self.head)),
            wire_dtype="float32",
            slots=self.batch,
            max_length=self.prompt + self.output,
            prefill_microbatch=self.prefill_microbatch,
            decode_microbatch=self.decode_microbatch,
        )
        plan.check_model(spec)
        return plan


@dataclass(frozen=True, slots=True)
class Listed(Record):
    """The whole list."""

    models: dict[str, Source]
    clusters: dict[str, Place]
    runs: tuple[Case, ...]


def _widths(text: str) -> list[int]:
    """ "4x2 8" as [4, 4, 8]: the inverse of format_widths."""
    runs = [part.partition("x") for part in text.split()]
    return [int(bits) for bits, _, count in runs for _ in range(int(count or 1))]


def _precision(bits: int) -> Precision:
    return Precision(16) if bits == 16 else Precision(bits, GROUP_SIZE)
